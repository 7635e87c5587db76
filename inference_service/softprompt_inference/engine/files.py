"""Large contents handed from one process to another: in a file without a name, of which both have the memory.

Through a socket, each byte would be copied several times on either side, by threads that have tokens to pass on.
"""

import mmap
import os
import socket
import struct
import tempfile
from collections.abc import Sequence
from typing import BinaryIO

from softprompt_api.errors import Unavailable

# With each file goes a byte: nothing could be sent without any.
_BYTE = b"\0"


def hand_over(connected: socket.socket, parts: Sequence[bytes | memoryview]) -> None:
    """Send all parts, one behind the other, as one file; they are at least one byte. It never waits.

    Raises ConnectionError where the other side has ended; Unavailable where there is no place for the file, or so
    many lie at the other side that the socket takes no more.
    """
    try:
        with _open_file() as file:
            file.writelines(parts)
            file.flush()
            rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("@i", file.fileno()))
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


def _open_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("softprompt"), "wb")
    return tempfile.TemporaryFile()
