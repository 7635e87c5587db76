"""What is asked of every side: token ids in, a number of tokens out. Made from a seed, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

# The first ids of most vocabularies are control tokens.
_FIRST_TEXT_ID = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to be continued greedily by exactly `num_tokens` tokens.

    Attributes:
        prompt_ids: text ids, without virtual tokens.
        adapter: PEFT folder of the soft prompt before the text; None: the base model alone.
    """

    prompt_ids: list[int]
    num_tokens: int
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a side did with some requests, all given at once.

    Attributes:
        seconds: from the first request to the last token.
        token_ids: of each request, in order.
        token_times_s: when each token of each request came, from the start; empty where a side cannot tell.
    """

    seconds: float
    token_ids: list[list[int]]
    token_times_s: list[list[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths drawn evenly from a range, both ends included, in tokens."""

    shortest: int
    longest: int

    def draw(self, random: Random) -> int:
        """One length."""
        return random.randint(self.shortest, self.longest)


def make_requests(
    what: str,
    *,
    seed: int,
    repeat: int,
    count: int,
    prompts: Lengths,
    outputs: Lengths,
    vocab_size: int,
    adapters: Sequence[str | None] = (None,),
) -> list[Request]:
    """Requests whose lengths depend on the seed alone, and whose ids on all of the first three arguments.

    So repeats are equally heavy, and no side can answer one from what it cached in another. The adapters take
    turns, and the turns go on from repeat to repeat.

    Args:
        what: they are for; another one for each measurement of a run, for the same reason.
    """
    lengths = Random(f"lengths {seed}")
    ids = Random(f"ids {what} {seed} {repeat}")
    first_id = min(_FIRST_TEXT_ID, vocab_size // 2)
    requests = []
    for index in range(count):
        num_prompt, num_tokens = prompts.draw(lengths), outputs.draw(lengths)
        requests.append(
            Request(
                prompt_ids=[ids.randrange(first_id, vocab_size) for _ in range(num_prompt)],
                num_tokens=num_tokens,
                adapter=adapters[(max(repeat, 0) * count + index) % len(adapters)],
            )
        )
    return requests


def num_output_tokens(requests: Sequence[Request]) -> int:
    """How many tokens were asked for."""
    return sum(request.num_tokens for request in requests)


def without_adapters(requests: Sequence[Request]) -> list[Request]:
    """The same prompts for the base model."""
    return [Request(prompt_ids=request.prompt_ids, num_tokens=request.num_tokens) for request in requests]
