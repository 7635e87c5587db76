"""Files handed from socket to socket: whole, in order, and each the taker's own."""

import os
import socket
import tempfile
from collections.abc import Iterator

import pytest
from softprompt_api.errors import Unavailable
from softprompt_inference.engine import files
from softprompt_inference.engine.files import MemoryFile


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


@pytest.fixture(params=["in memory", "on disk"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Systems that cannot have files in memory alone have them in their folder for temporary ones."""
    kind: str = request.param
    if kind == "on disk":
        monkeypatch.delattr(os, "memfd_create")
    return kind


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def hand_over_until_full(ours: socket.socket) -> int:
    """How many files were taken before one was not."""
    for num_sent in range(100_000):
        try:
            files.hand_over(ours, [b"x"])
        except Unavailable:
            return num_sent
    raise AssertionError("every file was taken")


def test_parts_arrive_as_one_file_each_time(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    before = open_descriptors()
    sent = [[b"a", memoryview(b"bc"), b""], [b"x" * 3_000_000, b"y" * 5], [b"z"]]
    for parts in sent:
        files.hand_over(ours, parts)
    taken = [files.take(theirs) for _ in sent]
    assert [bytes(contents) for contents in taken] == [b"".join(parts) for parts in sent]
    del taken
    assert open_descriptors() == before


def test_what_was_taken_can_be_written_to_and_nobody_else_sees_it(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    part = bytearray(b"abc")
    files.hand_over(ours, [part])
    contents = files.take(theirs)
    contents[0:1] = b"x"
    assert bytes(contents) == b"xbc"
    assert part == b"abc"


def test_a_file_is_handed_over_as_it_is_and_its_memory_is_there_as_long_as_a_part_is(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    before = open_descriptors()
    file = MemoryFile()
    for part in (b"head", bytearray(b"abc"), memoryview(b"def")):
        file.write(part)
    part = file.read()[4:7]
    assert file.read() is file.read()
    files.hand_over(ours, file)
    contents = files.take(theirs)
    assert bytes(contents) == b"headabcdef"
    del file
    assert (bytes(part), part.readonly) == (b"abc", True)
    del part, contents
    assert open_descriptors() == before


def test_nobody_writes_to_a_file_in_memory_that_was_read(kind: str) -> None:
    file = MemoryFile([b"abc"])
    contents = file.read()
    if kind == "in memory":
        for change in (lambda: file.write(b"d"), lambda: os.ftruncate(file.descriptor, 1)):
            with pytest.raises(PermissionError):
                change()
    assert bytes(contents) == b"abc"


def test_a_socket_that_has_ended_has_no_more(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    files.hand_over(ours, [b"last"])
    ours.close()
    assert bytes(files.take(theirs)) == b"last"
    with pytest.raises(EOFError):
        files.take(theirs)


def test_whoever_does_not_take_is_not_waited_for(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    before = open_descriptors()
    num_sent = hand_over_until_full(ours)
    assert open_descriptors() == before
    assert num_sent >= 64
    for _ in range(num_sent):
        files.take(theirs)
    files.hand_over(ours, [b"y"])
    assert bytes(files.take(theirs)) == b"y"


def test_where_there_is_no_room_for_a_file_none_is_sent(
    ends: tuple[socket.socket, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    ours, theirs = ends
    for owner, name in ((os, "memfd_create"), (tempfile, "TemporaryFile")):
        monkeypatch.setattr(owner, name, lambda *_: full(), raising=False)
    with pytest.raises(Unavailable, match=r"cannot be handed the adapter now \(No space left on device\)"):
        files.hand_over(ours, [b"x"])
    theirs.setblocking(False)
    with pytest.raises(BlockingIOError):
        files.take(theirs)


def test_whoever_has_ended_is_told_apart(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.close()
    with pytest.raises(ConnectionError):
        files.hand_over(ours, [b"x"])
