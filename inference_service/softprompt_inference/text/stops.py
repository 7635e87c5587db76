"""Stop strings found in text that arrives in pieces."""

from collections.abc import Sequence


class StopScanner:
    """Finds the stop string that is complete first; of several that end at one character, the longest.

    Reads each character once (Knuth, Morris and Pratt 1977), so the answer does not depend on how the text is cut
    into pieces, and long stop strings cost no more than short ones.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        # The longest first, so that it wins where several end together.
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)

    @property
    def num_held(self) -> int:
        """Length of the text's end that may be the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, piece: str, *, counts: bool = True) -> tuple[str, int] | None:
        """The stop string that was completed and the number of characters of `piece` read up to its end, or None.

        After a stop string was found nothing more may be fed.

        Args:
            counts: whether a stop string may end here; what begins here may end later in any case.
        """
        for position, character in enumerate(piece):
            for number, stop in enumerate(self._stops):
                matched = self._matched[number]
                while matched and stop[matched] != character:
                    matched = self._fallbacks[number][matched - 1]
                self._matched[number] = matched = matched + (stop[matched] == character)
                if matched == len(stop):
                    if counts:
                        return stop, position + 1
                    self._matched[number] = self._fallbacks[number][-1]
        return None


def _fallbacks(word: str) -> list[int]:
    """For each prefix of the word, the length of its longest proper prefix that is also its suffix."""
    lengths = [0] * len(word)
    matched = 0
    for position in range(1, len(word)):
        while matched and word[position] != word[matched]:
            matched = lengths[matched - 1]
        matched += word[position] == word[matched]
        lengths[position] = matched
    return lengths
