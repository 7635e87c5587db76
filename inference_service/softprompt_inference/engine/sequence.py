"""One sequence: its ids, its pages, how far it is computed, and when it ends."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import Enum

from softprompt_inference.engine.keys import PageKey, VirtualIds, page_key, partial_key, root_key, under_lora
from softprompt_inference.engine.messages import AddRequest, Finish, Logprobs, Output
from softprompt_inference.engine.plan import Chunk, Matcher, PageWrite, Sample, Sampled, Scores, looks_back
from softprompt_inference.engine.seen import Seen


class State(Enum):
    """Where a sequence is on its way."""

    WAITING = "waiting"  # holds no pages; new, or preempted with outputs
    RUNNING = "running"  # holds pages
    FINISHED = "finished"  # holds no pages, for good


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix:
    """The beginning of a sequence, as far as it is at hand.

    Attributes:
        num_pages: its leading full pages.
        copy_key: key of the page whose first rows hold the positions behind them; None when there are none.
        num_positions: of the full pages and those rows.
    """

    num_pages: int
    copy_key: PageKey | None
    num_positions: int


class Sequence:
    """Positions of one request, prompt and output, changed by the scheduler only.

    Attributes:
        request: as it was added.
        token_ids: prompt (virtual and text ids) and then output; grows by one per sampled token.
        prompt_length: positions of the prompt.
        turn: place in the order in which sequences start, given by the line that it waited in.
        adapters: digests whose virtual tokens are in the prompt, and that of its LoRA.
        lora_slot: of the LoRA that computes it, while it is unfinished; −1: none.
        soft_prompt_ends: positions behind the last virtual token of each soft prompt, in rising order.
        num_given: leading positions whose keys and values an adapter gives: written to pages, never computed.
        page_ids: pages in order, enough for all of token_ids in every step that computes it.
        source_page: a page it holds beside its own, while a step copies rows from it.
        num_registered: leading pages offered to the prefix cache, or taken from it.
        prefix_len: positions of the soft prompt it begins with.
        num_ends_registered: leading soft_prompt_ends offered to the prefix cache.
        num_computed: positions whose KV is in the pages; the newest token's never is.
        num_cached: prompt positions that came from the prefix cache when it first ran; None before that.
        looks_back: a token cannot be chosen before the host knows the one before it.
        matcher: knows what may come next, from the time when the sequence is queued; None: it has no grammar.
    """

    __slots__ = (
        "_banned_ids",
        "_eos_ids",
        "_ignored_ids",
        "_keys",
        "_max_outputs",
        "_num_scored",
        "_num_unpredicted",
        "_partial_keys",
        "_prompt_keys",
        "_score_rows",
        "_seen",
        "_stop_ids",
        "_virtual_ids",
        "adapters",
        "looks_back",
        "lora_slot",
        "matcher",
        "num_cached",
        "num_computed",
        "num_ends_registered",
        "num_given",
        "num_registered",
        "page_ids",
        "prefix_len",
        "prompt_length",
        "request",
        "soft_prompt_ends",
        "source_page",
        "state",
        "token_ids",
        "turn",
    )

    def __init__(
        self,
        request: AddRequest,
        *,
        prompt_ids: list[int],
        text_ids: list[int],
        adapters: frozenset[str],
        soft_prompt_ends: tuple[int, ...],
        prefix_len: int = 0,
        num_given: int = 0,
        max_outputs: int,
        virtual_ids: VirtualIds,
        lora_slot: int = -1,
    ) -> None:
        params = request.params
        self.request = request
        self.token_ids = prompt_ids
        self.prompt_length = len(prompt_ids)
        self.adapters = adapters
        self.lora_slot = lora_slot
        self.soft_prompt_ends = soft_prompt_ends
        self.prefix_len = prefix_len
        self.num_given = num_given
        self.turn = 0
        self.state = State.WAITING
        self.page_ids: list[int] = []
        self.source_page: int | None = None
        self.num_computed = 0
        self.num_registered = 0
        self.num_ends_registered = 0
        self.num_cached: int | None = None
        has_grammar = params.structured_outputs is not None
        self.looks_back = has_grammar or looks_back(params)
        self.matcher: Matcher | None = None
        self._seen = Seen(text_ids) if looks_back(params) else None
        self._virtual_ids = virtual_ids
        self._keys: list[PageKey] = [root_key(request.salt)]
        self._prompt_keys = [*self._keys]  # those of full pages of the prompt, as far as somebody has hashed them
        self._partial_keys: dict[int, PageKey] = {}
        # With a grammar, an end is chosen only where the grammar allows it, or nothing else.
        self._eos_ids = frozenset(() if params.ignore_eos and not has_grammar else request.eos_token_ids)
        self._ignored_ids = tuple(sorted(self._eos_ids)) if params.ignore_eos else ()
        self._stop_ids = frozenset(params.stop_token_ids)
        self._banned_ids = tuple(sorted(self._eos_ids | self._stop_ids))
        self._max_outputs = max_outputs
        # Positions whose logits tell how likely the text behind them is, as far as that is wanted.
        self._score_rows: list[int] = []
        self._num_scored = 0
        self._num_unpredicted = 0  # leading tokens of the text that nothing computed is before, not yet told
        if params.prompt_logprobs is not None:
            vocab_size = virtual_ids.vocab_size
            self._score_rows = [
                position - 1
                for position, token_id in enumerate(prompt_ids)
                if token_id < vocab_size and position > num_given
            ]
            self._num_unpredicted = len(text_ids) - len(self._score_rows)

    def share_keys(self, other: "Sequence") -> None:
        """Hash no page of the prompt that `other` hashes too, nor the other way round, if its prompt is the same.

        Keys depend on nothing but what is compared here: virtual ids are never given twice.
        """
        mine, its = self.request, other.request
        if (mine.salt, mine.lora, self.token_ids) == (its.salt, its.lora, other.token_ids[: other.prompt_length]):
            self._prompt_keys = other._prompt_keys

    def page_keys(self, page_size: int, start: int, stop: int) -> Iterator[PageKey]:
        """Keys of the pages start … stop − 1, which token_ids fills; hashed once, when first asked for."""
        keys = self._keys
        for page in range(start, stop):
            while len(keys) <= page + 1:
                if len(keys) < len(self._prompt_keys):
                    keys += self._prompt_keys[len(keys) :]
                    continue
                first = (len(keys) - 1) * page_size
                end = first + page_size
                parent = self._under_lora(keys[-1], first, end)
                keys.append(page_key(parent, self.token_ids[first:end], self._virtual_ids))
                if end <= self.prompt_length:
                    self._prompt_keys.append(keys[-1])
            yield keys[page + 1]

    def _under_lora(self, parent: PageKey, first: int, end: int) -> PageKey:
        """`parent` with the LoRA, where it computes the first position of all among first … end − 1."""
        if not self.request.lora or not first <= self.num_given < end:
            return parent  # what it does not compute, or what is chained to what it has computed
        return under_lora(parent, self.request.lora)

    def end_key(self, page_size: int, end: int) -> PageKey:
        """Key of the positions 0 … end − 1: that of the last page, or partial when they do not fill it."""
        num_pages, num_rows = divmod(end, page_size)
        if num_rows == 0:
            return next(self.page_keys(page_size, num_pages - 1, num_pages))
        if end not in self._partial_keys:
            parent = next(self.page_keys(page_size, num_pages - 1, num_pages)) if num_pages else self._keys[0]
            first = end - num_rows
            parent = self._under_lora(parent, first, end)
            self._partial_keys[end] = partial_key(parent, self.token_ids[first:end], self._virtual_ids)
        return self._partial_keys[end]

    def find_prefix(self, page_size: int, is_known: Callable[[PageKey], bool]) -> Prefix:
        """The longest beginning whose keys are known, before the first position whose logits are wanted.

        It ends with a full page, with a soft prompt, or just before that position.
        """
        limit = self._first_logits
        num_pages = 0
        for key in self.page_keys(page_size, 0, limit // page_size):
            if not is_known(key):
                break
            num_pages += 1
        start = num_pages * page_size
        # A page that this position fills can be copied but for it.
        ends = [*self.soft_prompt_ends, limit + 1] if (limit + 1) % page_size == 0 else self.soft_prompt_ends
        for end in reversed(ends):
            if start < min(end, limit) and end <= start + page_size and is_known(self.end_key(page_size, end)):
                return Prefix(
                    num_pages=num_pages, copy_key=self.end_key(page_size, end), num_positions=min(end, limit)
                )
        return Prefix(num_pages=num_pages, copy_key=None, num_positions=start)

    @property
    def _first_logits(self) -> int:
        """The first position whose logits are wanted: of the prompt what was not scored, else the last of all."""
        if self._num_scored < len(self._score_rows):
            return self._score_rows[self._num_scored]
        return len(self.token_ids) - 1

    def write(self) -> PageWrite:
        """The positions behind those computed whose keys and values an adapter gives."""
        start = self.num_computed
        return PageWrite(first_id=self.token_ids[0], start=start, stop=self.num_given, page_ids=self.page_ids)

    @property
    def has_scores(self) -> bool:
        """Whether it is still to be told how likely some of its prompt is."""
        return self._num_scored < len(self._score_rows)

    def next_tokens(self, budget: int, most_scores: int) -> int:
        """How many positions a step with that budget computes, with so many scores at most; at least one of each
        must be left."""
        num_tokens = min(len(self.token_ids) - self.num_computed, budget)
        if (beyond := self._num_scored + most_scores) < len(self._score_rows):
            return min(num_tokens, self._score_rows[beyond] - self.num_computed)
        return num_tokens

    def chunk(self, num_tokens: int) -> Chunk:
        """The next `num_tokens` positions to compute; the last of all asks for a token, where one is wanted."""
        start = self.num_computed
        stop = start + num_tokens
        token_ids = self.token_ids
        is_last = stop == len(token_ids) and self._max_outputs > 0
        return Chunk(
            token_ids[start:stop],
            start,
            self.page_ids,
            self._sample(self.num_outputs) if is_last else None,
            self.lora_slot,
            self.prefix_len,
            self._scores(start, stop) if self.has_scores else None,
            start < self.prompt_length,
        )

    def _scores(self, start: int, stop: int) -> Scores | None:
        """What is to be told of the prompt by the logits of the positions start … stop − 1."""
        first = self._num_scored
        rows = self._score_rows[first : bisect_left(self._score_rows, stop, first)]
        if not rows:
            return None
        num_top = self.request.params.prompt_logprobs
        assert num_top is not None, "nobody asked for scores"
        return Scores(
            rows=[row - start for row in rows],
            token_ids=[self.token_ids[row + 1] for row in rows],
            num_top=num_top,
        )

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.prompt_length

    @property
    def is_decoding(self) -> bool:
        """Whether only its newest token is left to compute."""
        return len(self.token_ids) - self.num_computed == 1

    @property
    def ends_with_next_token(self) -> bool:
        """Whether the next token is the last whichever it is."""
        return self.num_outputs + 1 >= self._max_outputs

    def following_chunk(self) -> Chunk:
        """The position behind token_ids, whose token is being chosen and stands here as 0."""
        sample = self._sample(self.num_outputs + 1)
        return Chunk((0,), len(self.token_ids), self.page_ids, sample, self.lora_slot, self.prefix_len)

    def _sample(self, num_outputs: int) -> Sample:
        request = self.request
        params = request.params
        banned_ids = self._banned_ids if num_outputs < params.min_tokens else self._ignored_ids
        return Sample(
            params,
            request.seed,
            num_outputs,
            banned_ids,
            request.all_logprobs,
            self.matcher,
            self._seen,
        )

    def reset(self, state: State) -> None:
        """Hold no pages and have nothing computed: WAITING again, or FINISHED. Ids and output stay."""
        self.state = state
        self.page_ids = []
        self.source_page = None
        self.num_computed = 0
        self.num_registered = 0
        self.num_ends_registered = 0

    @property
    def asks_of_prompt(self) -> bool:
        """Whether something is still to be told of its prompt."""
        return self.has_scores or self._num_unpredicted > 0

    def tell_prompt(self, scores: Items[Logprobs]) -> Output | None:
        """Take in what a step has told of the prompt; None where that is nothing."""
        told = [*[None] * self._num_unpredicted, *scores]
        self._num_unpredicted = 0
        self._num_scored += len(scores)
        return Output(request_id=self.request.request_id, prompt_logprobs=told) if told else None

    @property
    def has_ended(self) -> bool:
        """Whether its prompt is computed and no token is wanted."""
        return self._max_outputs == 0 and self.num_computed == len(self.token_ids)

    def end(self) -> Output:
        """The end without a token."""
        return Output(request_id=self.request.request_id, finish=Finish.LENGTH, cached_tokens=self.num_cached)

    def accept(self, sampled: Sampled) -> Output:
        """Append the token; the output says whether it was the last."""
        token_id = sampled.token_id
        assert token_id is not None, "no token was asked for"
        self.token_ids.append(token_id)
        if self.matcher is not None:
            self.matcher.accept(token_id)
        if self._seen is not None:
            self._seen.add(token_id)
        num_outputs = self.num_outputs
        finish: Finish | None = None
        stop_token_id: int | None = None
        if token_id in self._eos_ids:
            finish = Finish.STOP
        elif token_id in self._stop_ids:
            finish, stop_token_id = Finish.STOP, token_id
        elif num_outputs >= self._max_outputs:
            finish = Finish.LENGTH
        output = Output(self.request.request_id, token_id, sampled.logprobs, finish, stop_token_id)
        if num_outputs == 1:
            output.cached_tokens = self.num_cached
        return output
