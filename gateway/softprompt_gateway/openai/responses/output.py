"""The output of a response: messages and calls in the order in which they come, and their events."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, Literal

import orjson
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.logprobs import chat_logprobs
from softprompt_gateway.openai.responses.events import Events, opening
from softprompt_gateway.openai.tool_calls import CallPiece

Status = Literal["in_progress", "completed", "incomplete"]


class Output:
    """The items so far; at most the last of them is open. An output has at least one."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._items: list[_Item] = []

    @property
    def shapes(self) -> list[dict[str, Any]]:
        """The items as JSON."""
        return [item.shape for item in self._items]

    def say(self, text: str, logprobs: Iterable[pb.TokenLogprob] = ()) -> None:
        """Further text: of the message that is open, or of a new one."""
        message = self._items[-1] if self._items else None
        if not isinstance(message, _Message):
            message = _Message(self._events, len(self._items))
            self._open(message)
        message.add(text, logprobs)

    def call(self, piece: CallPiece) -> None:
        """A further piece of a call."""
        if piece.name:
            self._open(_Call(self._events, len(self._items), piece))
        call = self._items[-1]
        assert isinstance(call, _Call), "a call is told piece by piece"
        call.add(piece.arguments)
        if piece.is_last:
            call.close("completed")

    def end(self, status: Status) -> None:
        """Close what is open."""
        if not self._items:
            self.say("")
        self._items[-1].close(status)

    def abandon(self) -> None:
        """Leave what is open as it is, and tell nothing."""
        if self._items and self._items[-1].status == "in_progress":
            self._items[-1].status = "incomplete"

    def _open(self, item: "_Item") -> None:
        if self._items:
            self._items[-1].close("completed")
        self._items.append(item)
        item.open()


class _Item(ABC):
    """One item.

    Attributes:
        status: of the item; it is open while it is in progress.
    """

    def __init__(self, events: Events, index: int, prefix: str) -> None:
        self._events = events
        self._index = index
        self._id = f"{prefix}_{uuid.uuid4().hex}"
        self.status: Status = "in_progress"

    @property
    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """The item as JSON."""

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._id, "output_index": self._index}

    def open(self) -> None:
        """Tell that it comes."""
        self._events.tell("response.output_item.added", {"output_index": self._index, "item": self.shape})

    def close(self, status: Status) -> None:
        """Tell what it was, once."""
        if self.status != "in_progress":
            return
        self._tell_whole()
        self.status = status
        self._events.tell("response.output_item.done", {"output_index": self._index, "item": self.shape})

    @abstractmethod
    def _tell_whole(self) -> None:
        """Tell what came in pieces."""


class _Message(_Item):
    """A text. Its one part is there from the second event on."""

    def __init__(self, events: Events, index: int) -> None:
        super().__init__(events, index, "msg")
        self._texts: list[str] = []
        self._logprobs: list[dict[str, Any]] = []
        self._has_part = False

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "status": self.status,
            "role": "assistant",
            "content": [self._part] if self._has_part else [],
        }

    @property
    def _part(self) -> dict[str, Any]:
        text = "".join(self._texts)
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self._logprobs}

    @property
    def _place(self) -> dict[str, Any]:
        return {**super()._place, "content_index": 0}

    def open(self) -> None:
        super().open()
        self._events.tell("response.content_part.added", {**self._place, "part": self._part})
        self._has_part = True
        self._delta = opening("response.output_text.delta", self._place)

    def add(self, text: str, logprobs: Iterable[pb.TokenLogprob]) -> None:
        """Further text, and the log-probabilities of its tokens."""
        entries: list[dict[str, Any]] = chat_logprobs(logprobs)["content"]
        if not text and not entries:
            return
        self._texts.append(text)
        self._logprobs += entries
        told = b',"logprobs":' + (orjson.dumps(entries) if entries else b"[]")
        self._events.tell_opened(self._delta, told, b',"delta":', orjson.dumps(text))

    def _tell_whole(self) -> None:
        part = self._part
        whole = {**self._place, "text": part["text"], "logprobs": self._logprobs}
        self._events.tell("response.output_text.done", whole)
        self._events.tell("response.content_part.done", {**self._place, "part": part})


class _Call(_Item):
    """A call of a function."""

    def __init__(self, events: Events, index: int, piece: CallPiece) -> None:
        super().__init__(events, index, "fc")
        self._call_id = piece.id
        self._name = piece.name
        self._arguments: list[str] = []

    @property
    def shape(self) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "function_call",
            "status": self.status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
        }

    def add(self, arguments: str) -> None:
        """A further piece of the arguments."""
        if arguments:
            self._arguments.append(arguments)
            self._events.tell("response.function_call_arguments.delta", {**self._place, "delta": arguments})

    def _tell_whole(self) -> None:
        whole = {**self._place, "arguments": "".join(self._arguments)}
        self._events.tell("response.function_call_arguments.done", whole)
