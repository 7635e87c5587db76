"""Each thread that computes a step, on a core of its own.

These threads wait for each other behind every product. Whoever else wants a core for a moment makes the system put
two of them on the other one, where it may leave them for ten milliseconds after the core is free again
(docs/performance.md). OpenMP binds the threads that it makes. The thread that computes with them is bound here, at
the end of its start: what a thread starts is bound as it is.
"""

import contextlib
import os
from collections.abc import Iterator

# Whoever sets one of these has decided.
_OPENMP_SETTINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def openmp_settings(places: str) -> dict[str, str]:
    """Have OpenMP bind its threads.

    Args:
        places: as in OMP_PLACES; each thread gets one.

    Returns:
        Variables to set before it is loaded; none where somebody has decided, or where the system binds nothing.
    """
    if not hasattr(os, "sched_setaffinity") or any(name in os.environ for name in _OPENMP_SETTINGS):
        return {}
    return {"OMP_PROC_BIND": "true", "OMP_PLACES": places}


def run_anywhere() -> None:
    """Let this thread, and what it starts from now on, run on all cores that the process was given."""
    _run_on(_GIVEN)


class Binding:
    """Of the thread that computes."""

    def __init__(self) -> None:
        self._own = _GIVEN

    @contextlib.contextmanager
    def importing(self, num_threads: int | None) -> Iterator[None]:
        """Import OpenMP, with torch, within: it binds its threads if they are to be as many as there are cores.

        It binds the thread that imports it, too, which may run anywhere again behind this.

        Args:
            num_threads: of a step; None: as OpenMP's own setting says, or one for each core.
        """
        wanted = os.environ.get("OMP_NUM_THREADS", len(_GIVEN)) if num_threads is None else num_threads
        if str(wanted) == str(len(_GIVEN)):
            os.environ.update(openmp_settings("cores"))
        yield
        self._own = _read_cores()
        run_anywhere()

    def bind(self) -> None:
        """Keep this thread on the core that OpenMP chose for it, if it chose one."""
        _run_on(self._own)


def _read_cores() -> set[int]:
    """Those of this thread; none where the system does not tell them."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def _run_on(cores: set[int]) -> None:
    # A sandbox may forbid it, and cores may have been taken away: then the system decides, as it would without.
    with contextlib.suppress(OSError):
        if cores:
            os.sched_setaffinity(0, cores)


_GIVEN = _read_cores()
