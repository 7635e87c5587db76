"""Environments of other projects' clients and suites, each made once, below ~/.cache/softprompt-conformance.

Their requirements do not go together with ours, so nothing of them is installed beside us.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOME = Path.home() / ".cache" / "softprompt-conformance"
ROOT = Path(__file__).parents[3]
INSTALL_TIMEOUT_S = 1800.0
RUN_TIMEOUT_S = 1200.0


def ran(
    *command: str | Path, timeout_s: float = RUN_TIMEOUT_S, codes: tuple[int, ...] = (0,), **environment: str
) -> str:
    """What a command printed; it must end with one of these codes."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode in codes, done.stdout[-20_000:]
    return done.stdout


def made(name: str, requirements: tuple[str, ...], make: Callable[[Path], None]) -> Path:
    """The folder of an environment with these requirements."""
    wanted = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = HOME / f"{name}-{wanted}"
    complete = folder / ".complete"
    if not complete.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        make(folder)
        complete.touch()
    return folder


@pytest.fixture(scope="session")
def run() -> Callable[..., str]:
    """`run(command, …, VARIABLE=…)`: what a command printed, which must succeed."""
    return ran


@pytest.fixture(scope="session")
def python_with() -> Callable[..., Path]:
    """`python_with(name, *requirements)`: the interpreter of an environment with these packages.

    With `beside_ours` it sees our environment's packages too, behind its own: torch need not be there twice.
    """

    def get(name: str, *requirements: str, beside_ours: bool = False) -> Path:
        def make(folder: Path) -> None:
            ran(sys.executable, "-m", "venv", folder)
            python = folder / "bin" / "python"
            if beside_ours:
                where = "import sysconfig; print(sysconfig.get_path('purelib'))"
                (Path(ran(python, "-c", where).strip()) / "ours.pth").write_text(sysconfig.get_path("purelib"))
            pip: tuple[Any, ...] = (python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
            ran(*pip, *requirements, timeout_s=INSTALL_TIMEOUT_S)

        return made(name, requirements, make) / "bin" / "python"

    return get


@pytest.fixture(scope="session")
def node_with() -> Callable[..., Path]:
    """`node_with(name, *packages)`: the folder of an environment with these packages of npm."""

    def get(name: str, *packages: str) -> Path:
        def make(folder: Path) -> None:
            ran("npm", "install", "--prefix", folder, "--no-save", *packages, timeout_s=INSTALL_TIMEOUT_S)

        return made(name, packages, make)

    return get
