"""The bytes of each token, as they stand in running text."""

import json
import re
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Vocabulary:
    """Token id to bytes, worked out when first asked for.

    Text is the concatenation of its tokens' bytes, decoded as UTF-8: that makes incremental decoding exact and its
    cost independent of how much came before. A token has its bytes as they are in the middle of a text, so output
    that continues a prompt keeps its leading space.

    Args:
        backend: the tokenizer.
        serialized: its JSON (`Tokenizer.to_str()`).
    """

    def __init__(self, backend: Backend, serialized: str) -> None:
        document: dict[str, Any] = json.loads(serialized)
        kinds = _decoder_kinds(document.get("decoder"))
        self._backend = backend
        self._byte_level = _byte_level_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._added: dict[int, str] = {token["id"]: token["content"] for token in document["added_tokens"]}
        self._known: dict[int, bytes] = {}
        self.special_ids: frozenset[int] = frozenset(
            token["id"] for token in document["added_tokens"] if token["special"]
        )
        self.max_token_characters = max(map(len, backend.get_vocab()), default=1)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of a token; empty for an id that the tokenizer does not have (a padding row of the model)."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def token_text(self, token_id: int) -> str:
        """Text of a token alone, replacement characters where it is not whole UTF-8."""
        return self.token_bytes(token_id).decode(errors="replace")

    def _find(self, token_id: int) -> bytes:
        if (content := self._added.get(token_id)) is not None:
            return content.encode()
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level is not None:
            return _from_alphabet(token, self._byte_level)
        if self._byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        return self._in_running_text(token).encode()

    def _in_running_text(self, token: str) -> str:
        """What the token adds behind another one: decoders strip or add a space at a text's beginning."""
        if self._backend.decoder is None:
            return f" {token}"
        alone = str(self._backend.decoder.decode([token]))
        twice = str(self._backend.decoder.decode([token, token]))
        return twice[len(alone) :] if twice.startswith(alone) else alone


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    kinds = {str(decoder["type"])}
    for part in decoder.get("decoders", ()):
        kinds |= _decoder_kinds(part)
    return kinds


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in of every byte: itself where it is printable Latin-1, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + number): byte for number, byte in enumerate(others)})
    return alphabet


def _from_alphabet(token: str, alphabet: Mapping[str, int]) -> bytes:
    try:
        return bytes(alphabet[character] for character in token)
    except KeyError:  # a token that was added as text
        return token.encode()
