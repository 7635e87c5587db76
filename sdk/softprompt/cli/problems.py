"""What ends a command early, in one plain line.

Problem          exit 1   it could not be done
└── WrongUsage   exit 2   the arguments or the config file are wrong
"""

from typing import ClassVar


class Problem(Exception):
    """The command failed; the text says what was wrong and what to do. `detail` follows it on lines of its own."""

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail


class WrongUsage(Problem):
    """The arguments, the environment or the config file are wrong; nothing was started."""

    exit_code = 2
