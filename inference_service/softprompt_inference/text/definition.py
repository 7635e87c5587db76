"""What a model's tokenizer files amount to, as transformers reads them; kept, for reading them takes seconds.

Importing transformers' tokenizers also imports torch. What comes out is a few plain values, so they are kept in
`cache_root()/tokenizers`, by the content of every file that can have a part in them and by the versions that read
them: a start that finds them imports neither.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from softprompt_api.errors import Unsupported

from softprompt_inference.cache import cache_root, keep

# Changes with what is kept or how it is found out.
_FORMAT = 1
_READERS = ("transformers", "tokenizers")
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx"}
# Weights have many other names, and none in what git keeps of a clone; no tokenizer's file is so large.
_MAX_BYTES = 2**27


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerDefinition:
    """A tokenizer in plain values.

    Attributes:
        serialized: the tokenizer as JSON, for `tokenizers.Tokenizer.from_str`.
        chat_template: Jinja; None: the model has none to take by default.
        special_tokens: what templates call them → how they are spelled: {"bos_token": "<s>", …}.
        eos_token_ids: ids that end a sequence, as the tokenizer's and the model's files name them.
    """

    serialized: str
    chat_template: str | None
    special_tokens: dict[str, str]
    eos_token_ids: Sequence[int]


def read_definition(folder: Path) -> TokenizerDefinition:
    """The definition of a local model folder's tokenizer; Unsupported where it has none that can be used."""
    path = cache_root() / "tokenizers" / f"{_digest(folder)}.json"
    try:
        return TokenizerDefinition(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # not kept yet, or broken
        definition = _make(folder)
        keep(path, json.dumps(asdict(definition)))
        return definition


def _make(folder: Path) -> TokenizerDefinition:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever the files lead it to
        raise Unsupported(f"the model's tokenizer cannot be loaded: {str(error)[:300]}") from error
    if not tokenizer.is_fast:
        raise Unsupported("the model has no tokenizer.json, and none can be made from its tokenizer's files")
    return TokenizerDefinition(
        serialized=tokenizer.backend_tokenizer.to_str(),
        chat_template=_default_template(tokenizer),
        special_tokens=dict(tokenizer.special_tokens_map),
        eos_token_ids=sorted({*_eos_ids_of_model(folder), *_ids(tokenizer.eos_token_id)}),
    )


def _default_template(tokenizer: Any) -> str | None:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:  # none, or several of which none is the default
        return None
    return template


def _digest(folder: Path) -> str:
    """Of all files but weights: any of them may decide how a tokenizer is read."""
    readers = {name: version(name) for name in _READERS}
    digest = hashlib.sha256(json.dumps([_FORMAT, readers]).encode())
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in _WEIGHTS and path.stat().st_size <= _MAX_BYTES:
            name, content = str(path.relative_to(folder)).encode(), path.read_bytes()
            digest.update(b"%d %s %d " % (len(name), name, len(content)) + content)
    return digest.hexdigest()


def _eos_ids_of_model(folder: Path) -> list[int]:
    """End-of-sequence ids that the model's own files name; newer chat models have several."""
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.exists():
            ids += _ids(json.loads(path.read_text(encoding="utf-8")).get("eos_token_id"))
    return ids


def _ids(value: Any) -> list[int]:
    """One id, several, or none, as configs spell them."""
    values = value if isinstance(value, list) else [value]
    return [token_id for token_id in values if isinstance(token_id, int)]
