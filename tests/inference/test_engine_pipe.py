"""Messages from the engine, however the socket cuts them."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest
from softprompt_api.errors import Unavailable
from softprompt_inference.engine import files
from softprompt_inference.engine.codec import HEADER, Message, Progress, decode, encode
from softprompt_inference.engine.messages import Abort, LoadLora, LoraModule
from softprompt_inference.engine.pipe import Pipe


class End:
    """The engine's end of a pipe, and what came out of the other."""

    def __init__(self) -> None:
        self.stream, self.ours = socket.socketpair()
        self.files, self.to_files = socket.socketpair()
        self.stream.setblocking(False)
        self.heard: list[str] = []
        self.changed = asyncio.Event()
        self.error: Exception | None = None

    def hear(self, message: Message) -> None:
        if self.error is not None:
            raise self.error
        assert isinstance(message, Progress)
        self.heard.append(message.text)
        self.changed.set()

    async def say(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.stream, data)

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(5):
            while len(self.heard) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.heard


@pytest.fixture
async def end() -> AsyncIterator[End]:
    end = End()
    yield end
    end.stream.close()
    end.files.close()


async def test_messages_may_come_in_any_pieces(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    texts = ["", "a", "b" * 300, "c"]
    data = b"".join(encode(Progress(text=text)) for text in texts)
    for cut in (1, 3, 7, len(data)):
        end.heard.clear()
        for start in range(0, len(data), cut):
            pipe.get_buffer(-1)[: len(piece)] = (piece := data[start : start + cut])
            pipe.buffer_updated(len(piece))
        assert end.heard == texts
    pipe.close()
    await pipe.ended


async def test_a_message_larger_than_the_buffer_makes_it_grow(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    texts = ["x" * 100, "y" * 500_000, "z", "w" * 200_000]
    await end.say(b"".join(encode(Progress(text=text)) for text in texts))
    assert await end.until(4) == texts
    pipe.close()
    assert await pipe.ended is None


async def test_what_is_sent_arrives_as_frames_and_what_was_sent_before_a_close_too(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    messages = [Abort(request_id="1"), Abort(request_id="2" * 300_000)]
    for message in messages:
        pipe.send(message)
    pipe.close()
    received = b""
    async with asyncio.timeout(5):
        while piece := await asyncio.get_running_loop().sock_recv(end.stream, 2**16):
            received += piece
    assert received == b"".join(encode(message) for message in messages)
    assert await pipe.ended is None


def lora(name: str) -> LoadLora:
    module = LoraModule(name="layers.0.q", rank=2, scale=0.5, a=name.encode() * 300_000, b=b"b" * 4)
    return LoadLora(digest=name, modules=[module, module], dtype="float32")


async def test_matrices_of_loras_go_beside_their_messages_in_order(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    messages = [lora("x"), Abort(request_id="1"), lora("y")]
    for message in messages:
        pipe.send(message)
    pipe.close()
    assert await pipe.ended is None
    for message in messages:
        body = end.stream.recv(HEADER.unpack(end.stream.recv(HEADER.size))[0])
        assert len(body) < 300
        assert decode(body, lambda: files.take(end.files)) == message
    with pytest.raises(EOFError):
        files.take(end.files)


async def test_a_lora_for_which_there_is_no_place_is_not_sent(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    with contextlib.suppress(BlockingIOError):
        while end.to_files.send(b"\0", socket.MSG_DONTWAIT):
            pass
    with pytest.raises(Unavailable, match="cannot be handed"):
        pipe.send(lora("x"))
    pipe.close()
    assert await pipe.ended is None
    assert end.stream.recv(HEADER.size) == b""


async def test_a_lora_is_lost_where_the_other_side_has_ended(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    end.stream.close()
    end.files.close()
    pipe.send(lora("x"))
    assert await pipe.ended is None


async def test_the_other_sides_end_is_the_pipes(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    await end.say(encode(Progress(text="last"))[:-1])
    end.stream.close()
    async with asyncio.timeout(5):
        assert await pipe.ended is None
    assert end.heard == []
    pipe.send(Abort(request_id="lost"))


async def test_a_message_that_is_none_ends_the_pipe(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    await end.say(encode(Progress(text="good")) + HEADER.pack(3) + b"bad" + encode(Progress(text="unheard")))
    async with asyncio.timeout(5):
        assert isinstance(await pipe.ended, msgspec.DecodeError)
    assert end.heard == ["good"]


async def test_what_a_listener_fails_with_ends_the_pipe(end: End) -> None:
    pipe = await Pipe.connect(end.ours, end.to_files, end.hear)
    end.error = RuntimeError("no")
    await end.say(encode(Progress(text="good")))
    async with asyncio.timeout(5):
        assert await pipe.ended is end.error
