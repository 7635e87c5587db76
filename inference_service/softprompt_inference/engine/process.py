"""The engine's side of its process: `serve` reads commands from a socket and answers every step.

The conversation: Prepare may come in, then EngineConfig; Progress goes out while it prepares and loads the model,
then ModelInfo or StartupFailed; from then on commands come in and one StepResult per step goes out. The end of the
socket is the end of the engine.
"""

import argparse
import logging
import os
import socket
from collections.abc import Callable
from functools import partial

from softprompt_api.errors import SoftpromptError
from softprompt_api.garbage import start_collecting

from softprompt_inference.engine import files
from softprompt_inference.engine.codec import (
    HEADER,
    Message,
    Progress,
    StartupFailed,
    decode,
    encode,
)
from softprompt_inference.engine.config import EngineConfig, Prepare
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import (
    Command,
)
from softprompt_inference.engine.plan import Runner
from softprompt_inference.parent import end_with_parent

_log = logging.getLogger(__name__)

Report = Callable[[str], None]
Load = Callable[[EngineConfig, Report], Runner]
PrepareToLoad = Callable[[Prepare, Report], None]

_RECEIVE_BYTES = 2**18


def _prepare_nothing(_wanted: Prepare, _report: Report) -> None:
    """For engines whose start is quick."""


class Connection:
    """Whole messages over a stream socket, blocking or not.

    Args:
        from_files: another, over which contents come that go beside messages; what is sent has none.
    """

    def __init__(self, stream: socket.socket, from_files: socket.socket) -> None:
        self._stream = stream
        self._take_contents = partial(files.take, from_files)
        self._buffer = bytearray()

    def send(self, message: Message) -> None:
        """Send one message; raises OSError when the other side is gone."""
        self._stream.sendall(encode(message))

    def receive(self, *, wait: bool) -> list[Message]:
        """The messages that have arrived, at least one when told to wait; raises EOFError at the end."""
        self._fill(wait=False)
        messages = self._take()
        while wait and not messages:
            self._fill(wait=True)
            messages = self._take()
        return messages

    def _fill(self, *, wait: bool) -> None:
        """Read what is there; with `wait`, at least one byte."""
        flags = 0 if wait else socket.MSG_DONTWAIT
        while True:
            try:
                data = self._stream.recv(_RECEIVE_BYTES, flags)
            except BlockingIOError:
                return
            if not data:
                raise EOFError
            self._buffer += data
            flags = socket.MSG_DONTWAIT

    def _take(self) -> list[Message]:
        """Cut the whole messages off the buffer."""
        messages: list[Message] = []
        start = 0
        with memoryview(self._buffer) as view:
            while len(view) - start >= HEADER.size:
                stop = start + HEADER.size + HEADER.unpack_from(view, start)[0]
                if stop > len(view):
                    break
                messages.append(decode(view[start + HEADER.size : stop], self._take_contents))
                start = stop
        del self._buffer[:start]
        return messages


def serve(
    stream: socket.socket, from_files: socket.socket, load: Load, prepare: PrepareToLoad = _prepare_nothing
) -> None:
    """Load a model and run its engine until the socket ends.

    Args:
        stream, from_files: connected to the front.
        load: makes the runner from the config, and reports slow phases.
        prepare: does, and reports, what can be done before the config is known.
    """
    connection = Connection(stream, from_files)
    try:
        engine = _start(connection, load, prepare)
        if engine is not None:
            _run(connection, engine)
    except (EOFError, ConnectionError):
        _log.debug("the front is gone")


def _start(connection: Connection, load: Load, prepare: PrepareToLoad) -> Engine | None:
    def report(text: str) -> None:
        connection.send(Progress(text=text))

    first, *others = connection.receive(wait=True)
    try:
        if isinstance(first, Prepare):
            prepare(first, report)
            [first] = others or connection.receive(wait=True)
        assert isinstance(first, EngineConfig)
        config = first
        runner = load(config, report)
        engine = Engine(runner, config)
    except (EOFError, ConnectionError):
        raise
    except (SoftpromptError, ValueError, OSError) as error:
        # What loaders raise on purpose says what is wrong in plain words.
        connection.send(StartupFailed(message=str(error)))
        return None
    except Exception as error:
        _log.exception("the engine could not start")
        connection.send(StartupFailed(message=f"{type(error).__name__}: {error}"))
        return None
    start_collecting()
    connection.send(engine.info)
    return engine


def _run(connection: Connection, engine: Engine) -> None:
    while True:
        for command in connection.receive(wait=not engine.has_work):
            assert isinstance(command, Command)
            engine.handle(command)
        connection.send(engine.step())


def serve_parent(load: Load, prepare: PrepareToLoad = _prepare_nothing) -> None:
    """Serve on the sockets that this process has inherited, as its arguments say; the rest as in `serve`."""
    parser = argparse.ArgumentParser(description="An engine on sockets that it inherits.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of a connected stream socket")
    parser.add_argument("--files-fd", type=int, required=True, help="descriptor of another, over which files come")
    arguments = parser.parse_args()
    end_with_parent()
    for descriptor in (arguments.fd, arguments.files_fd):
        os.set_inheritable(descriptor, False)
    with socket.socket(fileno=arguments.fd) as stream, socket.socket(fileno=arguments.files_fd) as from_files:
        serve(stream, from_files, load, prepare)
