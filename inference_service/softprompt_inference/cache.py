"""Where things are kept that can be made again at any time, so that the next start need not make them."""

import contextlib
import os
import tempfile
from pathlib import Path


def cache_root() -> Path:
    """The folder: `$SOFTPROMPT_CACHE_DIR`, else `~/.cache/softprompt`; OSError where there is no home folder."""
    try:
        return Path(os.environ.get("SOFTPROMPT_CACHE_DIR") or "~/.cache/softprompt").expanduser()
    except RuntimeError:
        raise OSError(
            "there is no home folder to keep made files in: say where with SOFTPROMPT_CACHE_DIR"
        ) from None


def keep(path: Path, text: str) -> None:
    """Write a file whole or not at all; where it cannot be written, the next start makes it again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
