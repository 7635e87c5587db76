"""Compile the C sources beside this file with the machine's own compiler, once, and load them.

The library is compiled for this very processor, so its name in the cache holds what it was made of: the sources,
the compiler, the flags and the processor's features.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_FLAGS = (
    *("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC"),
    # No operation may set errno or trap, so loops can be vectorised; NaN and infinity keep their meaning.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
)
# Some 10 s on two cores of its own; beside much else it takes many times that, and without it all steps are slow.
_COMPILE_TIMEOUT_S = 900


class CannotCompile(Exception):
    """There is no compiler, or it fails; the text says which."""


def load(cache_dir: Path) -> ctypes.CDLL:
    """The library, compiled first where the cache has none for this machine.

    Raises:
        CannotCompile: it cannot be had; torch's operations do the same more slowly.
    """
    compiler = _find_compiler()
    try:
        library = cache_dir / f"ops-{_fingerprint(compiler)}.so"
        if library.exists():
            try:
                return ctypes.CDLL(str(library))
            except OSError:
                pass  # damaged: made anew
        _compile(compiler, library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise CannotCompile(f"{compiler[0]} failed: {error.stderr.strip()[-500:]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(str(error)) from error


def _find_compiler() -> list[str]:
    """The command, which may have arguments, as in CC="ccache gcc"."""
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise CannotCompile(f"CC is no command: {error}") from error
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not named and found is None:
        raise CannotCompile("no C compiler (cc, gcc or clang) is installed")
    return named or [str(found)]


def _fingerprint(compiler: list[str]) -> str:
    made_of = hashlib.sha256(b"\0".join(source.read_bytes() for source in _SOURCES))
    version = _run(*compiler, "--version")
    for part in (version.encode(), " ".join(_FLAGS).encode(), platform.machine().encode(), _processor()):
        made_of.update(b"\0" + part)
    return made_of.hexdigest()[:24]


def _processor() -> bytes:
    """What the processor can do, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    return next((line for line in lines if line.startswith((b"flags", b"Features"))), b"")


def _compile(compiler: list[str], library: Path) -> None:
    library.parent.mkdir(parents=True, exist_ok=True)
    # Under a name of its own first: another process may compile at the same time, and a killed one leaves half.
    with tempfile.TemporaryDirectory(dir=library.parent) as folder, ThreadPoolExecutor(os.cpu_count()) as threads:

        def compiled(source: Path) -> str:
            made = str(Path(folder) / f"{source.stem}.o")
            _run(*compiler, *_FLAGS, "-c", str(source), "-o", made)
            return made

        objects = threads.map(compiled, [source for source in _SOURCES if source.suffix == ".c"])
        made = Path(folder) / library.name
        _run(*compiler, *_FLAGS, "-shared", *objects, "-o", str(made), "-lm")
        with made.open("rb") as written:
            os.fsync(written.fileno())  # half of it under its name would end every process that loads it
        made.replace(library)


def _run(*command: str) -> str:
    """What a command says, in whatever encoding."""
    done = subprocess.run(
        command, capture_output=True, check=True, text=True, errors="replace", timeout=_COMPILE_TIMEOUT_S
    )
    return done.stdout
