"""The wish to stop: Ctrl-C, SIGTERM or a closed terminal."""

import signal
import threading
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Set by the first stop signal; a second one asks to hurry.

    A flag rather than an exception: a start is never left half way through starting a process.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._hurried = threading.Event()

    def listen(self) -> None:
        """Take over the signals of this process; only in its main thread. With nohup, it outlives its terminal."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._ask)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        (self._hurried if self._asked.is_set() else self._asked).set()

    def asked(self) -> bool:
        """Whether anybody has asked to stop."""
        return self._asked.is_set()

    def hurried(self) -> bool:
        """Whether somebody asked twice: end at once, politely or not."""
        return self._hurried.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait until asked, at most `timeout_s`; whether it was."""
        return self._asked.wait(timeout_s)
