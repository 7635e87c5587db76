"""How chat answers are spelled where functions may be called."""

from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.chat import ChatRequest, ChatStyle
from softprompt_gateway.openai.generation import Choice
from softprompt_gateway.openai.tool_calls import CallPiece, CallReader, Said
from softprompt_gateway.session import Delta


class ToolStyle(ChatStyle):
    """A chat answer whose text may hold calls, which are told apart from it."""

    def __init__(self, request: ChatRequest) -> None:
        super().__init__(request)
        self._names = frozenset(tool.function.name for tool in request.callable)
        self._readers: dict[int, CallReader] = {}

    def opening(self, index: int, accepted: pb.Accepted) -> dict[str, Any]:  # noqa: ARG002
        """The role; whether there will be content is not known yet."""
        return self._chunk(index, {"role": "assistant", "content": None})

    def delta(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """New content, and pieces of calls."""
        said = _spelled(self._reader(index).read(delta.text))
        shape = self._with_extras(self._chunk(index, said), delta)
        return shape if said or self._has_extras else None

    def held(self, index: int) -> dict[str, Any] | None:
        """Text that could have become a call."""
        said = _spelled(self._reader(index).finish())
        return self._chunk(index, said) if said else None

    def end(self, index: int, finished: pb.Finished) -> dict[str, Any]:
        """Why it ended."""
        return self._told(super().end(index, finished), self._reader(index))

    def choice(self, index: int, accepted: pb.Accepted, choice: Choice) -> dict[str, Any]:
        """The whole message."""
        reader = CallReader(self._names)
        said, rest = reader.read("".join(choice.text)), reader.finish()
        text = said.text + rest.text
        shape = super().choice(index, accepted, choice)
        message = {**shape["message"], "content": text or (None if said.calls else "")}
        if said.calls:
            message["tool_calls"] = [_call(piece) for piece in said.calls]
        return self._told({**shape, "message": message}, reader)

    def _reader(self, index: int) -> CallReader:
        return self._readers.setdefault(index, CallReader(self._names))

    @staticmethod
    def _told(shape: dict[str, Any], reader: CallReader) -> dict[str, Any]:
        # A stop string may have cut a call: whoever is told of calls parses them.
        calls = shape["finish_reason"] == "stop" and reader.num_calls > 0 and not reader.is_cut
        return {**shape, "finish_reason": "tool_calls"} if calls else shape


def _spelled(said: Said) -> dict[str, Any]:
    """The delta of a message."""
    delta: dict[str, Any] = {"content": said.text} if said.text else {}
    if said.calls:
        delta["tool_calls"] = [{"index": piece.index, **_call(piece)} for piece in said.calls]
    return delta


def _call(piece: CallPiece) -> dict[str, Any]:
    if not piece.name:
        return {"function": {"arguments": piece.arguments}}
    function = {"name": piece.name, "arguments": piece.arguments}
    return {"id": piece.id, "type": "function", "function": function}
