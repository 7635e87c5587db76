"""The end of a process that has imported much."""

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn


def run_to_end(main: Callable[[], int | None]) -> NoReturn:
    """Call it and end the process with its status, or that of its `sys.exit`, at once.

    Python would take apart all that was imported first, which takes seconds where that is torch, and native
    modules would count as leaks what the collector was told to leave alone. So nothing may be left to do: no
    thread is waited for, and nothing that was registered with `atexit` is called. What else is raised is raised.
    """
    try:
        status: int | str | None = main()
    except SystemExit as ended:
        status = ended.code
    if isinstance(status, str):
        print(status, file=sys.stderr)
        status = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status or 0)
