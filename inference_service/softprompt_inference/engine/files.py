"""Large contents handed from one process to another: in a file without a name, of which both have the memory.

Through a socket, each byte would be copied several times on either side, by threads that have tokens to pass on.
"""

import fcntl
import mmap
import os
import socket
import struct
import tempfile
import weakref
from collections.abc import Iterable, Sequence

from softprompt_api.errors import Unavailable

# With each file goes a byte: nothing could be sent without any.
_BYTE = b"\0"


class MemoryFile:
    """A file without a name: written to its end, then read, here and by whoever it is handed to.

    It is there until nobody has it, or a part of what was read, any more. Raises OSError where there is no place.
    """

    def __init__(self, parts: Iterable[bytes | memoryview] = ()) -> None:
        self.descriptor = _open_file()
        self._contents: memoryview | None = None
        weakref.finalize(self, os.close, self.descriptor)
        for part in parts:
            self.write(part)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Put bytes behind all others."""
        left = memoryview(data).cast("B")
        while left:
            left = left[os.write(self.descriptor, left) :]

    def read(self) -> memoryview:
        """All of it, at least one byte; from now on nobody can write to it, where the system has such files."""
        if self._contents is None:
            if hasattr(os, "memfd_create"):
                seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK
                fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, seals)
            self._contents = memoryview(mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ))
        return self._contents


def hand_over(connected: socket.socket, contents: MemoryFile | Sequence[bytes | memoryview]) -> None:
    """Send a file, or parts as one, one behind the other; they are at least one byte. It never waits.

    Raises ConnectionError where the other side has ended; Unavailable where there is no place for the file, or so
    many lie at the other side that the socket takes no more.
    """
    try:
        file = contents if isinstance(contents, MemoryFile) else MemoryFile(contents)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", file.descriptor))
        # Not socket.send_fds, which takes no notice of flags.
        connected.sendmsg([_BYTE], [rights], socket.MSG_DONTWAIT)
    except ConnectionError:
        raise
    except OSError as error:
        raise Unavailable(f"the engine cannot be handed the adapter now ({error.strerror}); try again") from error


def take(connected: socket.socket) -> memoryview:
    """The contents of the next file, which changes in them do not reach. It waits for it. EOFError: the end."""
    _, [*descriptors], _, _ = socket.recv_fds(connected, len(_BYTE), 1)
    if not descriptors:
        raise EOFError
    with open(descriptors[0], "rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))


def _open_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("softprompt", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
