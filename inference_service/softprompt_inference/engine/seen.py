"""The tokens that a sequence has had, for penalties."""

from array import array
from collections.abc import Iterable


class Seen:
    """Each text token of a prompt and its output once, and how often it is in the output; grows with the output.

    Attributes:
        token_ids: in the order in which they first came.
        counts: in the output; 0: it was in the prompt alone.
    """

    __slots__ = ("_places", "counts", "token_ids")

    def __init__(self, prompt_ids: Iterable[int], output_ids: Iterable[int] = ()) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self.token_ids = array("q", self._places)
        self.counts = array("q", [0]) * len(self._places)
        for token_id in output_ids:
            self.add(token_id)

    def add(self, token_id: int) -> None:
        """Take in a token of the output."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self.counts):
            self.token_ids.append(token_id)
            self.counts.append(0)
        self.counts[place] += 1
