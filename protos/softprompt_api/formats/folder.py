"""A PEFT folder on disk: the two files the server needs of it."""

from dataclasses import dataclass
from pathlib import Path

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats.config import MAX_CONFIG_BYTES

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFiles:
    """An adapter on disk: the config's text, not parsed yet, and where the tensors are."""

    config_json: str
    tensors_path: Path


def read_folder(path: str | Path) -> AdapterFiles:
    """The adapter in a folder that PEFT's `save_pretrained` wrote; AdapterInvalid says what is missing."""
    folder = Path(path)
    if not folder.exists():
        raise _invalid(f"there is no folder {folder}")
    if not folder.is_dir():
        raise _invalid(f"{folder} is a file; give the folder that holds {CONFIG_FILE} and {TENSORS_FILE}")
    config, tensors = folder / CONFIG_FILE, folder / TENSORS_FILE
    if not config.is_file():
        raise _invalid(
            f"{folder} has no {CONFIG_FILE}; give the folder that PEFT's save_pretrained wrote{_near(folder)}"
        )
    if not tensors.is_file():
        if (folder / _PICKLED_FILE).is_file():
            raise _invalid(
                f"{folder} has {_PICKLED_FILE}, a pickle file, which is never opened; "
                "save it again with save_pretrained(safe_serialization=True)"
            )
        raise _invalid(f"{folder} has no {TENSORS_FILE}")
    if config.stat().st_size > MAX_CONFIG_BYTES:
        raise _invalid(f"{config} has more than {MAX_CONFIG_BYTES} bytes")
    try:
        text = config.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise _invalid(f"{config} is not UTF-8") from None
    return AdapterFiles(config_json=text, tensors_path=tensors)


def _near(folder: Path) -> str:
    """PEFT saves named adapters into a folder of their own; say so when there is one."""
    inside = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_FILE}"))
    return f" (perhaps {folder / inside[0]})" if inside else ""


def _invalid(problem: str) -> AdapterInvalid:
    return AdapterInvalid(problem, field="path")
