"""What each step computes: continuous batching over pages, ids and ints only.

The rules, all of which `check` verifies:
* Sequences run in order of arrival: every running one is older than every waiting one.
* A sequence starts when there are pages for all the ids it has; then it grows by one page at a time.
* Out of pages, the youngest running sequence gives its pages back and waits at the front, keeping its output. Its
  full pages stay in the prefix cache as long as nobody needs the room, so that its return is cheap.
* The pool holds at least one sequence of full length, so the oldest always moves on and nothing is stuck for ever.
* A step serves the oldest first: decodes, then pieces of prompts. All but the youngest running sequence have
  finished their prompt, and no more run than a step has tokens, so every decode is in every step.
"""

from collections import deque
from collections.abc import Iterable
from itertools import pairwise

from softprompt_api.errors import InternalError, SoftpromptError

from softprompt_inference.engine.keys import PageKey
from softprompt_inference.engine.messages import Finish, Output, Stats
from softprompt_inference.engine.pages import PagePool
from softprompt_inference.engine.plan import Chunk, Sampled, StepPlan
from softprompt_inference.engine.sequence import Sequence, State


class Scheduler:
    """Owns all unfinished sequences and the pages.

    Args:
        num_pages, page_size: of the KV cache.
        vocab_size: sampled ids must lie below.
        max_model_len: no sequence is longer.
        max_num_sequences: most sequences running at once.
        max_step_tokens: most tokens in one plan.

    Raises ValueError when the pages cannot hold one sequence of max_model_len.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        vocab_size: int,
        max_model_len: int,
        max_num_sequences: int,
        max_step_tokens: int,
    ) -> None:
        if num_pages * page_size < max_model_len:
            raise ValueError(
                f"the KV cache has room for {num_pages * page_size} positions ({num_pages} pages of {page_size}), "
                f"less than one sequence of max_model_len, {max_model_len}; "
                "give it more memory (kv_cache_bytes) or lower max_model_len"
            )
        if max_num_sequences < 1 or max_step_tokens < 1:
            raise ValueError("max_num_sequences and max_step_tokens must be at least 1")
        self._pool = PagePool(num_pages=num_pages, page_size=page_size)
        self._vocab_size = vocab_size
        self._max_running = min(max_num_sequences, max_step_tokens)
        self._max_step_tokens = max_step_tokens
        self._sequences: dict[str, Sequence] = {}
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._planned: list[Sequence] = []  # one per chunk of the plan that is out
        self._coming: set[PageKey] = set()  # pages that the plan fills
        self._num_added = 0
        self._computed_prompt_tokens = 0
        self._cached_prompt_tokens = 0
        self._generated_tokens = 0
        self._preemptions = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sequences

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence that fits the context; its request id must be unused."""
        assert sequence.request.request_id not in self._sequences
        sequence.arrival = self._num_added
        self._num_added += 1
        self._sequences[sequence.request.request_id] = sequence
        self._waiting.append(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a sequence in any state and free its pages; unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    def uses(self, digest: str) -> bool:
        """Whether an unfinished sequence has this adapter's virtual tokens."""
        return any(digest in sequence.adapters for sequence in self._sequences.values())

    def plan(self) -> StepPlan:
        """The next step; to be committed or failed before the next plan."""
        self._planned = []
        self._coming.clear()
        chunks: list[Chunk] = []
        budget = self._max_step_tokens
        # Oldest first. Whoever gives way is the youngest, and so never one that is in the plan already.
        for sequence in list(self._running):
            if budget == 0 or sequence.state is not State.RUNNING or not self._grow(sequence):
                break
            budget -= self._take(sequence, budget, chunks)
        while budget > 0 and self._waiting and len(self._running) < self._max_running:
            if not self._start(self._waiting[0]):
                break
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            budget -= self._take(sequence, budget, chunks)
        return StepPlan(chunks=chunks)

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        num_tokens = min(len(sequence.token_ids) - sequence.num_computed, budget)
        chunks.append(sequence.chunk(num_tokens))
        self._planned.append(sequence)
        page_size = self._pool.page_size
        num_full = (sequence.num_computed + num_tokens) // page_size
        if num_full > sequence.num_registered:
            self._coming.update(sequence.page_keys(page_size, sequence.num_registered, num_full))
        return num_tokens

    def _grow(self, sequence: Sequence) -> bool:
        """Give a running sequence pages for all its ids; False when it had to give way itself."""
        missing = self._pool.pages_for(len(sequence.token_ids)) - len(sequence.page_ids)
        while missing > self._pool.num_available:
            youngest = self._running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
        if missing:
            sequence.page_ids += self._pool.allocate(missing)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert len(self._running) > 1, "the oldest sequence always fits"
        self._running.remove(sequence)
        self._pool.release(sequence.page_ids)
        sequence.reset(State.WAITING)
        self._waiting.appendleft(sequence)
        self._preemptions += 1

    def _start(self, sequence: Sequence) -> bool:
        """Give the oldest waiting sequence its pages, cached ones where possible; False when it must wait."""
        pool = self._pool
        length = len(sequence.token_ids)
        # The last position is computed in any case: its logits choose the next token.
        num_reusable = (length - 1) // pool.page_size
        hits = pool.lookup(sequence.page_keys(pool.page_size, 0, num_reusable))
        pool.share(hits)
        missing = pool.pages_for(length) - len(hits)
        # A page is left for each running sequence to grow, or the newcomer would soon be preempted.
        has_room = missing + len(self._running) <= pool.num_available
        if not has_room or self._is_worth_waiting(sequence, len(hits), num_reusable):
            pool.release(hits)
            return False
        sequence.page_ids = hits + pool.allocate(missing)
        sequence.num_registered = len(hits)
        sequence.num_computed = len(hits) * pool.page_size
        sequence.state = State.RUNNING
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_length)
            self._cached_prompt_tokens += sequence.num_cached
        return True

    def _is_worth_waiting(self, sequence: Sequence, num_hits: int, num_reusable: int) -> bool:
        """Whether this very step computes, for others, at least half of what the sequence lacks.

        So n choices of one prompt, or many questions about one document, that arrive together compute it once.
        """
        page_size = self._pool.page_size
        num_coming = 0
        for key in sequence.page_keys(page_size, num_hits, num_reusable):
            if key not in self._coming:
                break
            num_coming += 1
        return num_coming > 0 and num_coming * page_size * 2 >= len(sequence.token_ids) - num_hits * page_size

    def commit(self, plan: StepPlan, sampled: Iterable[Sampled]) -> list[Output]:
        """Take in a computed plan and its tokens; what was aborted meanwhile gives no output."""
        outputs: list[Output] = []
        tokens = iter(sampled)
        for sequence, chunk in zip(self._planned, plan.chunks, strict=True):
            token = next(tokens) if chunk.sample is not None else None
            if sequence.state is not State.RUNNING:
                continue
            if token is not None and (token.error or not 0 <= token.token_id < self._vocab_size):
                reason = token.error or f"the model chose id {token.token_id}, outside its vocabulary"
                outputs.append(self._fail(sequence, InternalError(reason)))
                continue
            self._advance(sequence, len(chunk.token_ids))
            if token is not None:
                output = sequence.accept(token)
                self._generated_tokens += 1
                outputs.append(output)
                if output.finish is not None:
                    self._finish(sequence)
        self._planned = []
        return outputs

    def fail_planned(self, error: SoftpromptError) -> list[Output]:
        """End every sequence of a plan that could not be computed."""
        planned, self._planned = self._planned, []
        return [self._fail(sequence, error) for sequence in planned if sequence.state is State.RUNNING]

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed
        sequence.num_computed = stop = start + num_tokens
        if start < sequence.prompt_length:
            self._computed_prompt_tokens += min(stop, sequence.prompt_length) - start
        page_size = self._pool.page_size
        num_full = stop // page_size
        if num_full == sequence.num_registered:
            return
        keys = sequence.page_keys(page_size, sequence.num_registered, num_full)
        for page, key in enumerate(keys, start=sequence.num_registered):
            self._pool.register(sequence.page_ids[page], key)
        sequence.num_registered = num_full

    def _fail(self, sequence: Sequence, error: SoftpromptError) -> Output:
        # What it computed may be as bad as its end: nobody else shall find it.
        self._finish(sequence, forget=True)
        return failure(sequence.request.request_id, error)

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._pool.release(sequence.page_ids, forget=forget)
        else:
            self._waiting.remove(sequence)
        sequence.reset(State.FINISHED)
        del self._sequences[sequence.request.request_id]

    def stats(self, *, resident_adapters: int) -> Stats:
        """Load and counters; the adapters are the caller's to count."""
        return Stats(
            running=len(self._running),
            waiting=len(self._waiting),
            used_pages=self._pool.num_held,
            num_pages=self._pool.num_pages,
            resident_adapters=resident_adapters,
            computed_prompt_tokens=self._computed_prompt_tokens,
            cached_prompt_tokens=self._cached_prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
        )

    def check(self) -> None:
        """Recompute every counter and verify the rules; AssertionError on any disagreement."""
        page_size = self._pool.page_size
        self._pool.check(sequence.page_ids for sequence in self._sequences.values())
        in_order = [*self._running, *self._waiting]
        assert all(older.arrival < younger.arrival for older, younger in pairwise(in_order))
        assert {id(sequence) for sequence in in_order} == {id(sequence) for sequence in self._sequences.values()}
        assert all(sequence.state is State.RUNNING for sequence in self._running)
        assert all(sequence.state is State.WAITING and not sequence.page_ids for sequence in self._waiting)
        assert len(self._running) <= self._max_running
        for sequence in self._running:
            assert sequence.num_computed < len(sequence.token_ids), "nothing is left to compute"
            assert len(sequence.page_ids) * page_size >= sequence.num_computed
            assert sequence.num_registered == sequence.num_computed // page_size
        if not self._planned:
            for sequence in self._running[:-1]:
                assert len(sequence.token_ids) - sequence.num_computed == 1, "a prompt was overtaken"


def failure(request_id: str, error: SoftpromptError) -> Output:
    """The last output of a request that could not be served."""
    return Output(
        request_id=request_id,
        finish=Finish.ERROR,
        error_reason=error.reason,
        error_message=error.message,
        error_field=error.field,
    )
