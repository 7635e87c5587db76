"""A GGUF file as a Hugging Face folder: converted once, to bf16 safetensors, and found again by its content."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_inference.model.errors import ModelFormatError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Part of the name of a converted folder: raise it when the conversion changes, and old folders are left alone.
CONVERSION_VERSION = 1

# llama.cpp's names of the pre-tokenizers that split every digit off before the GPT-2 pattern runs. transformers
# gives all GPT-2 style tokenizers the plain pattern, which disagrees with the model on some texts with numbers.
_SINGLE_DIGIT_PRE_TOKENIZERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"})
_SAMPLE_BYTES = 64 * 1024
_NUM_SAMPLES = 64

Report = Callable[[str], None]


def say_nothing(_: str) -> None:
    """The default for `report`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFacts:
    """What a GGUF file says about its tokenizer and transformers does not carry over."""

    pre_tokenizer: str
    adds_bos: bool


def converted_folder(gguf: Path, cache_dir: Path) -> Path:
    """Return the folder that holds, or will hold, the conversion of this very content."""
    return cache_dir / f"{gguf.stem}-{_content_key(gguf)}-v{CONVERSION_VERSION}"


def convert_gguf(gguf: Path, cache_dir: Path, report: Report = say_nothing) -> Path:
    """Convert a GGUF file to a bf16 Hugging Face folder, once; later calls return that folder at once.

    Safe when several processes ask at the same time: one converts, the others wait, and a folder appears under its
    final name only when it is complete.
    """
    target = converted_folder(gguf, cache_dir)
    if target.is_dir():
        return target
    with _read_once():
        facts = _read_facts(gguf)
        _convert_once(gguf, facts, target, report)
    return target


def _convert_once(gguf: Path, facts: GgufFacts, target: Path, report: Report) -> None:
    cache_dir = target.parent
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{target.name}.lock", report):
            if not target.is_dir():
                size_mb = gguf.stat().st_size / 1e6
                report(f"converting {gguf.name} ({size_mb:.0f} MB) to safetensors, once, into {cache_dir}")
                _convert_into(gguf, facts, target)
    except OSError as error:
        raise ModelFormatError(
            f"Could not convert {gguf} into {cache_dir}: {one_line(error)}. Check that the file is complete and "
            f"the folder writable with about four times the file's size free; SOFTPROMPT_CACHE_DIR moves it."
        ) from error


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


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Have transformers parse a file's tokenizer, and make the table of tensors' names, once.

    It does the former, in Python, for the config, the model and the tokenizer, and the latter for each module.
    """
    import gguf

    plain = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, plain)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = plain


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
            f"{gguf} is not a readable GGUF file ({one_line(error)}). Download it again."
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
                f"transformers cannot convert {gguf} ({one_line(error)}). Give the model as a Hugging Face "
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
