"""Control tokens in a conversation: the template may write them, what people say may not.

A chat template turns a conversation into one string in which "<|im_start|>" means the control token, whoever wrote
it. To keep the template's apart from the users':

1. `shield` replaces each spelling of a special token inside a message by a mark that nobody can guess, and sets
   a mark where a message begins or ends with a piece of one, so that its neighbours cannot complete it;
2. the template is rendered, and every spelling found in its result is the template's own;
3. `encode` renames those to secret names, puts the users' spellings back, and encodes with a copy of the tokenizer
   whose special tokens have the secret names. The plain spelling is ordinary text to that copy.

Ids are the same as those of the original tokenizer wherever no message spells a special token.
"""

import json
import re
import secrets
from collections.abc import Mapping
from typing import Any

from softprompt_api.errors import Unsupported
from tokenizers import Tokenizer as Backend


class ControlTokens:
    """The special tokens of one tokenizer, and the copy of it in which they have secret names.

    Args:
        serialized: the tokenizer as JSON (`Tokenizer.to_str()`).
    """

    def __init__(self, serialized: str) -> None:
        document: dict[str, Any] = json.loads(serialized)
        special = {token["content"]: token["id"] for token in document["added_tokens"] if token["special"]}
        # Private-use characters survive every normaliser and template filter; the nonce cannot be guessed.
        nonce = secrets.token_hex(8)
        names = {content: f"\ue000{nonce}c{number}\ue001" for number, content in enumerate(special)}
        self._secret_names: Mapping[str, str] = names
        self._marks: Mapping[str, str] = {
            content: f"\ue000{nonce}p{number}\ue001" for number, content in enumerate(special)
        }
        self._border = f"\ue000{nonce}b\ue001"
        self._spelled = {self._border: "", **{mark: content for content, mark in self._marks.items()}}
        self._special = _any_of(special)
        self._heads = {content[:length] for content in special for length in range(1, len(content))}
        self._tails = {content[start:] for content in special for start in range(1, len(content))}
        self._max_length = max(map(len, special), default=0)
        self._mark = _any_of(self._spelled)
        self._copy = Backend.from_str(json.dumps(_renamed(document, names)))
        for content, token_id in special.items():
            if self._copy.token_to_id(names[content]) != token_id:
                raise Unsupported(f"the tokenizer's special token {content!r} cannot be told from text")

    def shield(self, text: str) -> str:
        """`text` of a message with marks that keep every spelling of a special token in it apart."""
        core = text.strip()  # as templates do
        if not core:
            return text
        is_within = len(core) < self._max_length and any(core in content for content in self._marks)
        begins = is_within or any(core[:length] in self._tails for length in range(1, self._max_length))
        ends = is_within or any(core[-length:] in self._heads for length in range(1, self._max_length))
        start = text.index(core[0])
        before, after = text[:start], text[start + len(core) :]
        marked = self._special.sub(lambda match: self._marks[match[0]], core)
        return f"{before}{self._border if begins else ''}{marked}{self._border if ends else ''}{after}"

    def encode(self, rendered: str) -> list[int]:
        """Ids of a rendered conversation whose messages were shielded; no BOS is added to the template's."""
        named = self._special.sub(lambda match: self._secret_names[match[0]], rendered)
        text = self._mark.sub(lambda match: self._spelled[match[0]], named)
        # Only the batch call releases the interpreter lock.
        ids: list[int] = self._copy.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids


def _any_of(words: Mapping[str, object]) -> re.Pattern[str]:
    """Matches the longest of the words; nothing where there are none."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _renamed(document: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The tokenizer's JSON with other names for its special tokens, ids unchanged."""
    added = [
        {**token, "content": names[token["content"]]} if token["special"] else token
        for token in document["added_tokens"]
    ]
    model = dict(document["model"])
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(piece, piece): token_id for piece, token_id in vocab.items()}
    else:  # Unigram: [piece, score] in order of ids
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocab]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    # Template processors look special tokens up by name; nothing is added to a rendered conversation.
    return {**document, "added_tokens": added, "model": model, "post_processor": None}
