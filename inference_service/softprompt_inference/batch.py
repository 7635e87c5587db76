"""What generations have said since the last message: deltas by columns, and the rest as events behind them."""

from collections.abc import Callable
from typing import Generic, TypeVar

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_inference.choice import Delta

# A delta's numbers take so many bytes at most, and each of its tokens five.
_NUMBERS_BYTES = 32
_TOKEN_BYTES = 5

Event = TypeVar("Event")


class Batch(Generic[Event]):
    """The message to come.

    Args:
        write: writes one event into a response.

    Attributes:
        num_bytes: its size, or a little more; 0 when it is empty.
    """

    def __init__(self, write: Callable[[Event, pb.GenerateResponse], None]) -> None:
        self._write = write
        self._clear()

    def _clear(self) -> None:
        self.num_bytes = 0
        self._message = pb.GenerateManyResponse()
        self._calls_with_events: set[int] = set()
        self._calls: list[int] = []
        self._indexes: list[int] = []
        self._texts: list[str] = []
        self._num_tokens: list[int] = []
        self._token_ids: list[int] = []

    def add(self, call: int, event: Event) -> None:
        """A generation's next event."""
        # Columns are read before events: what follows an event of its call must be one.
        if isinstance(event, Delta) and not event.logprobs and call not in self._calls_with_events:
            self._calls.append(call)
            self._indexes.append(event.index)
            self._texts.append(event.text)
            self._num_tokens.append(len(event.token_ids))
            self._token_ids += event.token_ids
            self.num_bytes += 4 * len(event.text) + _TOKEN_BYTES * len(event.token_ids) + _NUMBERS_BYTES
            return
        self._calls_with_events.add(call)
        written = self._message.events.add(call=call)
        self._write(event, written.response)
        self.num_bytes += written.ByteSize()

    def end(self, call: int, end: pb.CallEnd) -> None:
        """A generation's end."""
        self.num_bytes += self._message.events.add(call=call, end=end).ByteSize()

    def take(self) -> pb.GenerateManyResponse:
        """The message; an empty one follows it."""
        message = self._message
        if self._calls:
            deltas = message.deltas
            deltas.calls.extend(self._calls)
            deltas.indexes.extend(self._indexes)
            deltas.texts.extend(self._texts)
            deltas.num_tokens.extend(self._num_tokens)
            deltas.token_ids.extend(self._token_ids)
        self._clear()
        return message
