"""`python bound.py PARENT_PID COMMAND …`: become COMMAND, which is asked to end when its parent ends in any way.

The request outlives exec, so any program can be bound, without running Python between fork and exec in a process
that has threads. Linux only; elsewhere the command runs unbound.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable

_PR_SET_PDEATHSIG = 1


def bound_to_this_process(command: Iterable[str]) -> list[str]:
    """The words that start `command`, a program by its path, so that it is asked to end when this process ends.

    On Linux what counts is the thread that starts it, which must live as long as the process.
    """
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def main() -> None:
    """Bind this process to its parent, then become the command."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # The parent may have ended before the line above; then nobody would ever send the signal.
    if os.getppid() != parent_pid:
        sys.exit("the process that started this one has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
