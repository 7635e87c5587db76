"""Where and with what a run was made."""

import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
_VARIABLES = ("OMP_", "GOMP_", "KMP_", "SOFTPROMPT_")
_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a figure is worth nothing without.

    Attributes:
        started: UTC, ISO 8601.
        commit: of the working tree, "" where there is no git; `is_dirty` when files differ from it.
        load_average: over 1, 5 and 15 minutes, before anything of the bench ran.
        environment: variables that change how threads wait, or how we are set.
    """

    started: str
    commit: str
    is_dirty: bool
    python: str
    versions: dict[str, str]
    cpu: str
    num_cpus: int
    memory_bytes: int
    load_average: list[float]
    environment: dict[str, str]
    arguments: list[str]


def read_conditions(arguments: list[str]) -> Conditions:
    """The conditions now."""
    commit = _git("rev-parse", "HEAD")
    return Conditions(
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=commit,
        is_dirty=bool(commit) and bool(_git("status", "--porcelain")),
        python=platform.python_version(),
        versions=installed(_PACKAGES),
        cpu=_cpu(),
        num_cpus=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=list(os.getloadavg()),
        environment={name: os.environ[name] for name in sorted(os.environ) if name.startswith(_VARIABLES)},
        arguments=arguments,
    )


def installed(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed here."""
    found = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
