"""The line of sequences that wait to start: tenants take turns, and each tenant's start in order of arrival.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) with all sequences of one weight: a tenant's next sequence
has the turn behind its last one's, or behind the turn that starts now, whichever is later. So a tenant that has
sent a thousand holds up nobody who has sent one, and none saves up turns by not asking.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from itertools import pairwise

from softprompt_inference.engine.sequence import Sequence

_SPARE_TENANTS = 64


class WaitingLine:
    """Sequences by their turns; those of one turn in order of arrival."""

    def __init__(self) -> None:
        self._line: deque[Sequence] = deque()
        self._turn = 0  # the latest of those who have started
        self._last_turns: dict[str, int] = {}  # of tenants that have some waiting, and perhaps of others

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._line)

    @property
    def first(self) -> Sequence:
        """Whose turn it is."""
        return self._line[0]

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence where its turn is."""
        if not self._line:
            self._last_turns.clear()  # nobody waits, so nobody is ahead
        elif len(self._last_turns) > 2 * len(self._line) + _SPARE_TENANTS:
            ahead = {tenant: turn for tenant, turn in self._last_turns.items() if turn > self._turn}
            self._last_turns = ahead  # the turns of others are over
        tenant = sequence.request.tenant
        sequence.turn = max(self._turn, self._last_turns.get(tenant, 0)) + 1
        self._last_turns[tenant] = sequence.turn
        place = len(self._line)
        while place and self._line[place - 1].turn > sequence.turn:
            place -= 1
        self._line.insert(place, sequence)

    def put_back(self, sequence: Sequence) -> None:
        """Put one that had started at the front: it is older than all that have not."""
        self._line.appendleft(sequence)

    def start(self) -> Sequence:
        """Take the first out."""
        sequence = self._line.popleft()
        self._turn = max(self._turn, sequence.turn)  # it may have started before, and others since
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Take one out that will not start."""
        self._line.remove(sequence)

    def check(self, started: Iterable[Sequence] = ()) -> None:
        """Verify the order, also with those who have started before; AssertionError where it is wrong."""
        assert all(sequence.turn <= self._turn for sequence in started), "newcomers could overtake it"
        assert all(first.turn <= second.turn for first, second in pairwise(self._line))
