"""One sequence: its ids, its pages, how far it is computed, and when it ends."""

from collections.abc import Iterator
from enum import Enum

from softprompt_inference.engine.keys import PageKey, VirtualIds, page_key, root_key
from softprompt_inference.engine.messages import AddRequest, Finish, Output
from softprompt_inference.engine.plan import Chunk, Sample, Sampled


class State(Enum):
    """Where a sequence is on its way."""

    WAITING = "waiting"  # holds no pages; new, or preempted with outputs
    RUNNING = "running"  # holds pages
    FINISHED = "finished"  # holds no pages, for good


class Sequence:
    """Positions of one request, prompt and output, changed by the scheduler only.

    Attributes:
        request: as it was added.
        token_ids: prompt (virtual and text ids) and then output; grows by one per sampled token.
        prompt_length: positions of the prompt.
        text_ids: the prompt's ids without the virtual ones.
        output_ids: the ids generated so far.
        arrival: place in the order of arrival, given by the scheduler.
        adapters: digests whose virtual tokens are in the prompt.
        page_ids: pages in order, enough for all of token_ids in every step that computes it.
        num_registered: leading pages offered to the prefix cache, or taken from it.
        num_computed: positions whose KV is in the pages; the newest token's never is.
        num_cached: prompt positions that came from the prefix cache when it first ran; None before that.
    """

    __slots__ = (
        "_banned_ids",
        "_eos_ids",
        "_keys",
        "_max_outputs",
        "_stop_ids",
        "_virtual_ids",
        "adapters",
        "arrival",
        "num_cached",
        "num_computed",
        "num_registered",
        "output_ids",
        "page_ids",
        "prompt_length",
        "request",
        "state",
        "text_ids",
        "token_ids",
    )

    def __init__(
        self,
        request: AddRequest,
        *,
        prompt_ids: list[int],
        text_ids: list[int],
        adapters: frozenset[str],
        max_outputs: int,
        virtual_ids: VirtualIds,
    ) -> None:
        params = request.params
        self.request = request
        self.token_ids = prompt_ids
        self.prompt_length = len(prompt_ids)
        self.text_ids = text_ids
        self.output_ids: list[int] = []
        self.adapters = adapters
        self.arrival = -1
        self.state = State.WAITING
        self.page_ids: list[int] = []
        self.num_computed = 0
        self.num_registered = 0
        self.num_cached: int | None = None
        self._virtual_ids = virtual_ids
        self._keys: list[PageKey] = [root_key(request.salt)]
        self._eos_ids = frozenset(() if params.ignore_eos else request.eos_token_ids)
        self._stop_ids = frozenset(params.stop_token_ids)
        self._banned_ids = tuple(sorted(self._eos_ids | self._stop_ids))
        self._max_outputs = max_outputs

    def page_keys(self, page_size: int, start: int, stop: int) -> Iterator[PageKey]:
        """Keys of the pages start … stop − 1, which token_ids fills; hashed once, when first asked for."""
        keys = self._keys
        for page in range(start, stop):
            while len(keys) <= page + 1:
                first = (len(keys) - 1) * page_size
                keys.append(page_key(keys[-1], self.token_ids[first : first + page_size], self._virtual_ids))
            yield keys[page + 1]

    def chunk(self, num_tokens: int) -> Chunk:
        """The next `num_tokens` positions to compute; the last of all asks for a token."""
        start = self.num_computed
        stop = start + num_tokens
        token_ids = self.token_ids
        return Chunk(
            token_ids=token_ids[start:stop],
            start=start,
            page_ids=self.page_ids,
            sample=self._sample() if stop == len(token_ids) else None,
        )

    def _sample(self) -> Sample:
        num_outputs = len(self.output_ids)
        params = self.request.params
        return Sample(
            params=params,
            seed=self.request.seed,
            index=num_outputs,
            prompt_ids=self.text_ids,
            output_ids=self.output_ids,
            banned_ids=self._banned_ids if num_outputs < params.min_tokens else (),
        )

    def reset(self, state: State) -> None:
        """Hold no pages and have nothing computed: WAITING again, or FINISHED. Ids and output stay."""
        self.state = state
        self.page_ids = []
        self.num_computed = 0
        self.num_registered = 0

    def accept(self, sampled: Sampled) -> Output:
        """Append the token; the output says whether it was the last."""
        token_id = sampled.token_id
        self.token_ids.append(token_id)
        self.output_ids.append(token_id)
        num_outputs = len(self.output_ids)
        finish: Finish | None = None
        stop_token_id: int | None = None
        if token_id in self._eos_ids:
            finish = Finish.STOP
        elif token_id in self._stop_ids:
            finish, stop_token_id = Finish.STOP, token_id
        elif num_outputs >= self._max_outputs:
            finish = Finish.LENGTH
        return Output(
            request_id=self.request.request_id,
            token_id=token_id,
            logprobs=sampled.logprobs,
            finish=finish,
            stop_token_id=stop_token_id,
            cached_tokens=self.num_cached if num_outputs == 1 else None,
        )
