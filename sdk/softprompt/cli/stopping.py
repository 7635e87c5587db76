"""The wish to stop: Ctrl-C, SIGTERM or a closed terminal."""

import contextlib
import queue
import signal

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stop:
    """Set by the first stop signal; a second one asks to hurry.

    A flag rather than an exception: a start is never left half way through starting a process.
    """

    def __init__(self) -> None:
        self._num_asked = 0
        # A signal may come while `wait` holds a lock of what it waits on, and its handler would wait for that lock
        # for ever. This queue alone can be put into from within itself.
        self._wakes = queue.SimpleQueue[None]()

    def listen(self) -> None:
        """Take over the signals of this process; only in its main thread. With nohup, it outlives its terminal."""
        for number in _SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, lambda *_: self.ask())

    def ask(self) -> None:
        """Ask to stop, or, where somebody has asked, to hurry."""
        self._num_asked += 1
        self._wakes.put(None)

    def asked(self) -> bool:
        """Whether anybody has asked to stop."""
        return self._num_asked > 0

    def hurried(self) -> bool:
        """Whether somebody asked twice: end at once, politely or not."""
        return self._num_asked > 1

    def wait(self, timeout_s: float) -> bool:
        """Wait until asked, at most `timeout_s`; whether it was."""
        if not self.asked():
            with contextlib.suppress(queue.Empty):
                self._wakes.get(timeout=timeout_s)
        return self.asked()
