"""How long a newcomer to a line would wait, from how many have left it of late (Little's law)."""

import math
import time
from collections.abc import Callable

from softprompt_api.errors import Overloaded

# What ended so long ago counts for a third of what ends now.
_MEMORY_S = 15.0
# Further ahead nothing can be foretold: where few have ended, the foretold wait grows without bound.
_MAX_RETRY_S = 60.0


class Pace:
    """The pace at which a line gets shorter.

    Args:
        max_wait_s: longest wait, as far as it can be foretold.
        refusal: of who would wait longer.
        now: seconds.
    """

    def __init__(
        self,
        *,
        max_wait_s: float,
        refusal: type[Overloaded] = Overloaded,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_wait_s = max_wait_s
        self._refusal = refusal
        self._now = now
        # Both fade, and grow only while somebody waits: otherwise few end because few have come.
        self._num_ended = 0.0
        self._seconds = 0.0
        self._since_s: float | None = None  # when somebody was last seen to wait; None: nobody did

    def measure(self, num_ended: int, *, is_awaited: bool) -> None:
        """Take in that some have ended now, and whether somebody waits from now on."""
        now_s, since_s = self._now(), self._since_s
        if since_s is not None:
            fading = math.exp((since_s - now_s) / _MEMORY_S)
            self._num_ended = self._num_ended * fading + num_ended
            self._seconds = self._seconds * fading + now_s - since_s
        self._since_s = now_s if is_awaited else None

    def check(self, num_before: int) -> None:
        """Raise the refusal where who has so many before it would wait too long; a wait that is unknown is not."""
        wait_s = num_before * self._seconds / self._num_ended if self._num_ended else 0.0
        most_s = self._max_wait_s + _MAX_RETRY_S
        if wait_s > self._max_wait_s:
            wait = f"about {wait_s:.0f} s" if wait_s <= most_s else f"more than {most_s:.0f} s"
            raise self._refusal(
                f"the wait would be {wait}, and at most {self._max_wait_s:g} s may be waited; try again later",
                details={"retry_after_ms": str(math.ceil((min(wait_s, most_s) - self._max_wait_s) * 1000))},
            )
