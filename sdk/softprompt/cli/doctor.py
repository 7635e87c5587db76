"""`softprompt doctor`: what is installed, what is missing, and what is in the way."""

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import typer

from softprompt.cli import ports
from softprompt.cli.options import RunOptions, default_data_dir, expand_data_dir
from softprompt.cli.problems import Problem, WrongUsage
from softprompt.cli.store import find_server

_EXTRAS = ("registry", "gateway", "inference")
# What the installed package says that it needs: `redis<9,>=6; extra == "registry"`.
_REQUIREMENT = re.compile(r"""(?P<name>[\w.-]+).*extra == ["'](?P<extra>\w+)["']""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        remedy: what must be done before `softprompt run` can work.
        advice: what would make it better.
    """

    subject: str
    state: str
    remedy: str = ""
    advice: str = ""


def doctor(
    data_dir: Annotated[
        str | None, typer.Option(envvar="SOFTPROMPT_DATA_DIR", help="the data folder to look at")
    ] = None,
) -> None:
    """Print every finding; exit 1 when something must be done before `softprompt run` can work."""
    folder = [_folder(data_dir or default_data_dir())]
    is_well = True
    # Each is printed as it is found: torch, and the kernels behind it, may take half a minute.
    for finding in chain(_python(), _extras(), _store(), _ports(), folder, _torch()):
        mark = "!" if finding.remedy else "~" if finding.advice else "ok"
        typer.echo(f"{mark:>2}  {finding.subject:<14} {finding.state}")
        if finding.remedy or finding.advice:
            typer.echo(f"{'':<19}→ {finding.remedy or finding.advice}")
        is_well &= not finding.remedy
    if not is_well:
        raise typer.Exit(1)


def _python() -> Iterator[Finding]:
    yield Finding(subject="python", state=f"{sys.version.split()[0]} ({sys.executable})")
    yield Finding(subject="softprompt", state=importlib.metadata.version("softprompt"))


def _extras() -> Iterator[Finding]:
    needed = list(filter(None, map(_REQUIREMENT.match, importlib.metadata.requires("softprompt") or ())))
    for extra in _EXTRAS:
        names = [found["name"] for found in needed if found["extra"] == extra]
        missing = [name for name in names if not _is_installed(name)]
        if missing:
            remedy = f"pip install 'softprompt[{extra}]'"
            yield Finding(subject=extra, state=f"not installed: {', '.join(missing)}", remedy=remedy)
        else:
            yield Finding(subject=extra, state="installed")


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _torch() -> Iterator[Finding]:
    if importlib.util.find_spec("torch") is None:
        return
    try:
        import torch
    except Exception as error:  # whatever its libraries lack
        remedy = "install it anew, as the README does"
        yield Finding(subject="torch", state=f"cannot be imported: {error}", remedy=remedy)
        return
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device, so the CPU is used"
    yield Finding(subject="torch", state=f"{torch.__version__}, {cuda}")
    yield from _kernels()


def _store() -> Iterator[Finding]:
    try:
        yield Finding(subject="store", state=str(find_server()))
    except Problem as problem:
        yield Finding(subject="store", state="none", remedy=problem.message)


def _ports() -> Iterator[Finding]:
    for flag in ("port", "registry_port", "inference_port"):
        port = int(RunOptions.model_fields[flag].default)
        subject = f"port {port}"
        try:
            ports.claim("127.0.0.1", port, f"--{flag.replace('_', '-')}")
            yield Finding(subject=subject, state="free")
        except WrongUsage as problem:
            yield Finding(subject=subject, state="taken", remedy=problem.message)


def _folder(data_dir: str) -> Finding:
    try:
        folder = expand_data_dir(data_dir)
    except WrongUsage as problem:
        return Finding(subject="data folder", state="none", remedy=problem.message)
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return Finding(subject="data folder", state=str(folder))
    state = f"{folder} cannot be written" if existing.is_dir() else f"{existing} is not a folder"
    return Finding(subject="data folder", state=state, remedy="choose another with --data-dir")


def _kernels() -> Iterator[Finding]:
    """Compiled for real, where that was not done before: only then it is known that it can be."""
    try:
        from softprompt_inference.model.source import native_kernels_dir
        from softprompt_kernels import native
    except ImportError:  # told with the extras
        return
    try:
        native.load(native_kernels_dir())
    except native.CannotCompile as error:
        advice = (
            "install gcc, or another C compiler with OpenMP: a CPU runs models several times as slowly without"
        )
        yield Finding(subject="CPU kernels", state=str(error), advice=advice)
    else:
        yield Finding(subject="CPU kernels", state="compiled for this processor")
