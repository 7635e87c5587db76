"""A request's client, as those who answer it see it."""

import asyncio

from softprompt_gateway.connection import Connection


class Client:
    """A connection that notes what is written to it and what is told of it."""

    def __init__(self, write_timeout_s: float = 60.0) -> None:
        self.written: list[bytes] = []
        self.told: list[tuple[bool, bool]] = []
        self.changed = asyncio.Event()
        self.connection = Connection(self.written.append, write_timeout_s=write_timeout_s)
        self.connection.follow(self._note)

    def _note(self) -> None:
        self.told.append((self.connection.is_gone, self.connection.is_writable))
        self.changed.set()


async def test_what_is_written_is_written_at_once_and_nothing_is_not() -> None:
    client = Client()
    client.connection.write(b"one")
    client.connection.write(b"")
    assert client.written == [b"one"]


async def test_a_client_that_has_gone_is_told_of_once_and_not_written_to() -> None:
    client = Client()
    client.connection.lose()
    client.connection.write(b"one")
    assert (client.written, client.told) == ([], [(True, True)])


async def test_a_client_that_reads_again_is_told_of() -> None:
    client = Client()
    client.connection.pause()
    assert not client.connection.is_writable
    assert client.told == []
    client.connection.resume()
    assert client.told == [(False, True)]


async def test_a_client_that_reads_nothing_for_the_whole_timeout_counts_as_gone() -> None:
    client = Client(write_timeout_s=0.05)
    client.connection.pause()
    async with asyncio.timeout(5):
        await client.changed.wait()
    assert client.connection.is_gone


async def test_a_client_that_reads_in_time_does_not() -> None:
    client = Client(write_timeout_s=0.05)
    client.connection.pause()
    client.connection.resume()
    other = Client(write_timeout_s=0.05)
    other.connection.pause()
    async with asyncio.timeout(5):
        await other.changed.wait()  # its timer is the later one
    assert not client.connection.is_gone


async def test_a_connection_belongs_to_its_request() -> None:
    scope: dict[str, object] = {"type": "http"}
    client = Client()
    client.connection.attach(scope)
    assert Connection.of(scope) is client.connection


async def test_only_the_last_follower_is_told() -> None:
    client = Client()
    client.connection.follow(None)
    client.connection.lose()
    assert client.told == []
