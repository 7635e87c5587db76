"""The chunks of one stream as server-sent events, spelled as dicts once and as bytes from then on."""

from typing import Any

import orjson
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.style import Style
from softprompt_gateway.session import Delta

# No style writes it by itself, and JSON spells it as it is.
_MARK = "<the text>"
_MARK_JSON = orjson.dumps(_MARK)


class Chunks:
    """Gathers events of a stream's choices and writes them.

    Args:
        style: spells a choice.
        head: what stands before the choice in every event.
        joins_text: only text counts: deltas of a choice that follow each other become one chunk, and deltas
            without text none. Then a chunk is a template of bytes, and only its text is encoded.

    Attributes:
        tail: what stands behind the choice in every event.
    """

    def __init__(self, style: Style, *, head: bytes, tail: bytes, joins_text: bool) -> None:
        self._style = style
        self._head = head
        self.tail = tail
        self._joins_text = joins_text
        self._templates: dict[int, tuple[bytes, bytes]] = {}
        self._written: list[bytes] = []
        self._joined: list[str] = []
        self._joined_index = 0

    def add(self, index: int, event: Delta | pb.Finished | pb.PromptLogprobs) -> None:
        """The next event of a choice."""
        if isinstance(event, pb.Finished):
            self._write_joined()
            self._write(self._style.held(index))
            self._write(self._style.end(index, event))
        elif isinstance(event, pb.PromptLogprobs):
            self._write(self._style.prompt(index, event))
        elif not self._joins_text:
            self._write(self._style.delta(index, event))
        elif text := event.text:
            if self._joined and self._joined_index != index:
                self._write_joined()
            self._joined_index = index
            self._joined.append(text)

    def take(self) -> bytes:
        """What was added since the last look, as whole server-sent events."""
        self._write_joined()
        written = b"".join(self._written)
        self._written.clear()
        return written

    def _write_joined(self) -> None:
        if self._joined:
            before, behind = self._template(self._joined_index)
            self._written += (before, orjson.dumps("".join(self._joined)), behind, self.tail)
            self._joined.clear()

    def _write(self, choice: dict[str, Any] | None) -> None:
        if choice is not None:
            self._written += (self._head, orjson.dumps(choice), self.tail)

    def _template(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text of a choice's delta."""
        template = self._templates.get(index)
        if template is None:
            shape = orjson.dumps(self._style.delta(index, Delta(_MARK)))
            before, behind = shape.split(_MARK_JSON)
            template = self._templates[index] = (self._head + before, behind)
        return template
