"""Calls of functions in an output, told from its text while it comes.

    any text <tool_call>{"name": "f", "arguments": {…}}</tool_call> any text

A call is told as soon as its name is known; its arguments follow as they come. What turns out to be no call of a
known function stays text. White space around calls is left out.
"""

import json
import re
import uuid
from collections.abc import Container
from dataclasses import dataclass, field

from softprompt_gateway.openai.tools import CALL_END, CALL_START

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([A-Za-z0-9_-]{1,64})"\s*,\s*"arguments"\s*:\s*(?=\{)')


@dataclass(slots=True, kw_only=True)
class CallPiece:
    """A further piece of a call; the first has the name, and the last says that it is."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str
    is_last: bool = False


@dataclass(slots=True)
class Said:
    """What has become certain: texts and pieces of calls, in order."""

    pieces: list[str | CallPiece] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The texts alone."""
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[CallPiece]:
        """The pieces of calls alone."""
        return [piece for piece in self.pieces if isinstance(piece, CallPiece)]

    def say(self, text: str) -> None:
        """Add a text, unless it is empty."""
        if text:
            self.pieces.append(text)


class CallReader:
    """Reads one output.

    Args:
        names: of the functions that may be called.

    Attributes:
        num_calls: calls told so far.
    """

    def __init__(self, names: Container[str]) -> None:
        self._names = names
        self._held = ""  # not yet understood
        self._gap = ""  # white space before the call that is read
        self._is_in_call = False
        self._object: _ObjectEnd | None = None  # of the call's arguments, while they come
        self._has_ended = False  # the arguments of the call that is read
        self.num_calls = 0

    def read(self, text: str) -> Said:
        """What is certain after this piece of the output."""
        self._held += text
        said = Said()
        while self._advance(said):
            pass
        return said

    def finish(self) -> Said:
        """What is left when nothing follows."""
        said = Said()
        if self._is_in_call and not self._has_told:
            said.say(f"{self._gap}{CALL_START}{self._held}")
        elif self._has_ended:
            said.say(_behind_call(self._held[: len(self._held) - _overlap(self._held, CALL_END)]))
        elif not self._is_in_call and (self._held.strip() or not self.num_calls):
            said.say(self._held)
        self._held = ""
        return said

    @property
    def is_cut(self) -> bool:
        """Whether the arguments of the call that is read have not come to their end."""
        return self._object is not None

    @property
    def _has_told(self) -> bool:
        """Whether the call that is read was told of."""
        return self._object is not None or self._has_ended

    def _advance(self, said: Said) -> bool:
        """Understand a part of what is held; False where more must come first."""
        if not self._is_in_call:
            return self._read_text(said)
        if self._object is not None:
            return self._read_arguments(said, self._object)
        return self._read_end(said) if self._has_ended else self._read_head(said)

    def _read_text(self, said: Said) -> bool:
        text, mark, rest = self._held.partition(CALL_START)
        if mark:
            certain = len(text.rstrip())
            said.say(text[:certain])
            self._gap = text[certain:]
            self._held, self._is_in_call = rest, True
            return True
        certain = len(self._held) - _overlap(self._held, CALL_START)
        certain = len(self._held[:certain].rstrip())
        said.say(self._held[:certain])
        self._held = self._held[certain:]
        return False

    def _read_head(self, said: Said) -> bool:
        head = _HEAD.match(self._held)
        if head is not None and head[1] in self._names:
            self._begin(said, head[1], arguments="")
            self._held = self._held[head.end() :]
            self._object = _ObjectEnd()
            return True
        inside, mark, rest = self._held.partition(CALL_END)
        if not mark:
            return False
        self._held, self._is_in_call = rest, False
        self._read_whole(said, inside)
        return True

    def _read_whole(self, said: Said, inside: str) -> None:
        """A call whose members come in another order, or what is none."""
        try:
            call = json.loads(inside)
            name, arguments = (call.get("name"), call.get("arguments")) if isinstance(call, dict) else (None, None)
            text = json.dumps(arguments, ensure_ascii=False)
        except (ValueError, RecursionError):
            name = arguments = None
        if isinstance(name, str) and name in self._names and isinstance(arguments, dict):
            self._begin(said, name, arguments=text).is_last = True
        else:
            said.say(f"{self._gap}{CALL_START}{inside}{CALL_END}")

    def _begin(self, said: Said, name: str, *, arguments: str) -> CallPiece:
        id_ = f"call_{uuid.uuid4().hex}"
        piece = CallPiece(index=self.num_calls, id=id_, name=name, arguments=arguments)
        said.pieces.append(piece)
        self.num_calls += 1
        return piece

    def _read_arguments(self, said: Said, arguments: "_ObjectEnd") -> bool:
        if not self._held:
            return False
        end = arguments.find(self._held)
        piece = said.pieces[-1] if said.pieces else None
        if not isinstance(piece, CallPiece):
            piece = CallPiece(index=self.num_calls - 1, arguments="")
            said.pieces.append(piece)
        piece.arguments += self._held[:end]
        piece.is_last = arguments.has_ended
        self._held = self._held[end:]
        if arguments.has_ended:
            self._object, self._has_ended = None, True
        return True

    def _read_end(self, said: Said) -> bool:
        before, mark, rest = self._held.partition(CALL_END)
        before, next_mark, _ = before.partition(CALL_START)
        if next_mark:  # the mark at the end was left out
            said.say(_behind_call(before))
            rest = self._held[len(before) :]
        elif not mark:
            return False
        self._held, self._is_in_call, self._has_ended = rest, False, False
        return True


def _behind_call(text: str) -> str:
    """What follows a call without a mark at its end, from the end of its arguments on."""
    return text.strip().removeprefix("}").strip()


class _ObjectEnd:
    """Finds the end of a JSON object that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._is_in_text = False
        self._is_escaped = False
        self.has_ended = False

    def find(self, piece: str) -> int:
        """How much of the piece belongs to the object."""
        for position, character in enumerate(piece, start=1):
            if self._is_escaped:
                self._is_escaped = False
            elif self._is_in_text:
                self._is_escaped = character == "\\"
                self._is_in_text = character != '"'
            elif character == '"':
                self._is_in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.has_ended = True
                    return position
        return len(piece)


def _overlap(text: str, mark: str) -> int:
    """Length of the text's end that may be the beginning of the mark."""
    return next((size for size in range(min(len(mark) - 1, len(text)), 0, -1) if mark.startswith(text[-size:])), 0)
