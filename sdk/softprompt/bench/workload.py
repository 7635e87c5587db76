"""What is sent, and when: made whole, from a seed, before the first request."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

Prompt = str | list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request of a run. `send_at_s` counts from the run's beginning; `output_len` is in tokens."""

    model: str
    prompt: Prompt
    output_len: int
    send_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthRange:
    """Lengths in tokens, both ends included."""

    least: int
    most: int

    @classmethod
    def parse(cls, text: str) -> "LengthRange":
        """`128` or `32:256`; ValueError otherwise."""
        least, _, most = text.partition(":")
        lengths = cls(least=int(least), most=int(most or least))
        if not 1 <= lengths.least <= lengths.most:
            raise ValueError(f"{text} is no range")
        return lengths

    def draw(self, rng: random.Random) -> int:
        """A length; all are equally likely."""
        return rng.randint(self.least, self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomPrompts:
    """Prompts of random tokens, all different but for chance: a prefix cache finds nothing in them.

    Attributes:
        token_ids: what to draw from; without, prompts are texts of as many words.
        words: the words of such texts.
    """

    lengths: LengthRange
    token_ids: Sequence[int]
    words: Sequence[str]

    def draw(self, rng: random.Random) -> Prompt:
        """A prompt."""
        length = self.lengths.draw(rng)
        if self.token_ids:
            return rng.choices(self.token_ids, k=length)
        return " ".join(rng.choices(self.words, k=length))


def arrival_times(num: int, rate: float, rng: random.Random) -> list[float]:
    """When each of `num` requests is sent, in seconds: a Poisson process of `rate` per second; inf: all at 0."""
    if math.isinf(rate):
        return [0.0] * num
    times, now = [], 0.0
    for _ in range(num):
        now += rng.expovariate(rate)
        times.append(now)
    return times


def zipf_weights(num: int, alpha: float) -> list[float]:
    """The probability of each rank, proportional to rank^-alpha; alpha 0: all are equally likely."""
    weights = [rank**-alpha for rank in range(1, num + 1)]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def make_workload(
    *,
    num: int,
    models: Sequence[str],
    alpha: float,
    prompts: RandomPrompts | Sequence[str],
    output_lengths: LengthRange,
    rate: float,
    seed: int,
) -> list[Request]:
    """Requests in order of their sending.

    Args:
        models: the most popular first; each request draws one by Zipf's law with exponent `alpha`.
        prompts: made at random, or taken in turn, again from the first where they are too few.
    """
    # A stream for each question: another rate or other models leave the prompts as they were.
    arrivals, choosing, lengths, texts = (
        random.Random(f"{seed} {name}") for name in ("at", "model", "len", "text")
    )
    chosen = choosing.choices(models, zipf_weights(len(models), alpha), k=num)
    return [
        Request(
            model=model,
            prompt=prompts.draw(texts) if isinstance(prompts, RandomPrompts) else prompts[number % len(prompts)],
            output_len=output_lengths.draw(lengths),
            send_at_s=send_at_s,
        )
        for number, (model, send_at_s) in enumerate(zip(chosen, arrival_times(num, rate, arrivals), strict=True))
    ]
