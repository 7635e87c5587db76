"""What each step computes: continuous batching over pages, ids and ints only.

The rules, all of which `check` verifies:
* Sequences start in the order of their turns (`waiting`), and every running one is older than every waiting one.
* A sequence starts when there are pages for all the ids it has; then it grows by one page at a time.
* Out of pages, the youngest running sequence gives its pages back and waits at the front, keeping its output. Its
  full pages stay in the prefix cache as long as nobody needs the room, so that its return is cheap.
* A sequence takes the full pages of its beginning that are cached. Where a soft prompt ends inside the page behind
  them, it copies that page's first rows into a page of its own; the source is held until the step is computed.
* Where an adapter gives keys and values, the step in which the sequence starts writes those that were not found.
* The pool holds at least one sequence of full length, so the oldest always moves on and nothing is stuck for ever.
* A step serves the oldest first: decodes, then pieces of prompts. All but the youngest running sequence have
  finished their prompt, and no more run than a step has tokens, so every decode is in every step.
* Tokens of prompts make a step longer for all who decode in it. So there are the more of them, the more sequences
  wait for their prompts beside those that decode: all that a step can take where nobody decodes, a few always.
* Logits of prompts are wanted where someone asks how likely these are. A step has few of them, which bounds its
  memory, and a prompt goes in as many steps as that takes. What was computed before such a prompt asked is not
  found, but for soft prompts in front of it: it has no logits.

A step may be planned while the one before it is still computed, and its tokens are not known (`follow`): the
same sequences decode the tokens to come. Whoever is found to have ended by such a token has left when the second
step is committed, and what that step computed for it is dropped. Its pages are free at once, though the device may
yet write to them: the runner's calls take effect in their order, so whoever gets such a page writes to it later,
and reads no row that it has not written. The rows that a cache key stands for are safe: only rows that are known
to be computed have keys, and the step writes behind them.
"""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise

from softprompt_api.errors import InternalError, InvalidArgument, SoftpromptError
from softprompt_api.structured import FIELD as STRUCTURED

from softprompt_inference.engine.keys import PageKey
from softprompt_inference.engine.messages import Finish, Output, Stats
from softprompt_inference.engine.pages import PagePool
from softprompt_inference.engine.plan import MAX_SCORES, Chunk, PageCopy, PageWrite, Sampled, StepPlan
from softprompt_inference.engine.sequence import Prefix, Sequence, State
from softprompt_inference.engine.waiting import WaitingLine


class Scheduler:
    """Owns all unfinished sequences and the pages.

    Args:
        num_pages, page_size: of the KV cache.
        vocab_size: sampled ids must lie below.
        max_model_len: no sequence is longer.
        max_num_sequences: most sequences running at once.
        max_step_tokens: most tokens in one plan.
        min_prompt_tokens: so many tokens of prompts go into a plan however many decode; None: all that fit.
        enable_prefix_caching: whether sequences find what others have computed.

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
        min_prompt_tokens: int | None = None,
        enable_prefix_caching: bool = True,
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
        self._min_prompt_tokens = max_step_tokens if min_prompt_tokens is None else min_prompt_tokens
        self._enable_prefix_caching = enable_prefix_caching
        self._sequences: dict[str, Sequence] = {}
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []
        # One per chunk of the plan that is out, and of the one that follows it.
        self._planned: list[Sequence] = []
        self._following: list[Sequence] = []
        self._copies: list[PageCopy] = []  # of the plan that is out
        self._writes: list[PageWrite] = []  # of the plan that is out
        self._scores_left = MAX_SCORES  # in the plan that is made
        self._coming: set[PageKey] = set()  # what the plan computes to its end: pages, and soft prompts
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
        self._sequences[sequence.request.request_id] = sequence
        self._waiting.add(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a sequence in any state and free its pages; unknown ids are ignored."""
        sequence = self._sequences.get(request_id)
        if sequence is not None:
            self._finish(sequence)

    def uses(self, digest: str) -> bool:
        """Whether an unfinished sequence has this adapter's virtual tokens, or is computed with this LoRA."""
        return any(digest in sequence.adapters for sequence in self._sequences.values())

    def plan(self) -> StepPlan:
        """The next step; to be committed or failed before the next plan, but that of `follow`."""
        assert not self._planned, "a plan is out"
        self._copies, self._writes = [], []
        self._coming.clear()
        self._scores_left = MAX_SCORES
        chunks: list[Chunk] = []
        budget = self._step_tokens()
        # Oldest first. Whoever gives way is the youngest, and so never one that is in the plan already.
        for sequence in list(self._running):
            if budget == 0 or sequence.state is not State.RUNNING or not self._grow(sequence):
                break
            budget = self._take(sequence, budget, chunks)
        while budget > 0 and self._waiting and len(self._running) < self._max_running:
            if self._waiting.first.has_scores and not self._scores_left:
                break
            if not self._start(self._waiting.first):
                break
            sequence = self._waiting.start()
            self._running.append(sequence)
            budget = self._take(sequence, budget, chunks)
        return StepPlan(chunks=chunks, copies=self._copies, writes=self._writes)

    def _step_tokens(self) -> int:
        """Most tokens of the next plan."""
        decoding, waiting = len(self._running), len(self._waiting)
        if self._running and not self._running[-1].is_decoding:
            decoding, waiting = decoding - 1, waiting + 1
        share = self._max_step_tokens * waiting // max(1, decoding + waiting)
        return min(self._max_step_tokens, decoding + max(self._min_prompt_tokens, share))

    def follow(self, plan: StepPlan) -> StepPlan | None:
        """The step behind `plan`, the only one that is out, without its tokens; None: they must be known first.

        It decodes for everybody in `plan` who is not known to end there. They must be known first where somebody
        could start, is in the midst of a prompt or `looks_back`, or pages are short.
        """
        assert not self._following
        rows: list[int] = []
        sequences: list[Sequence] = []
        num_running = 0
        for row, (sequence, chunk) in enumerate(zip(self._planned, plan.chunks, strict=True)):
            if chunk.sample is None:
                return None
            if sequence.state is not State.RUNNING:
                continue
            if sequence.looks_back:
                return None
            num_running += 1
            if not sequence.ends_with_next_token:
                rows.append(row)
                sequences.append(sequence)
        assert num_running == len(self._running), "somebody runs who is not in the plan"
        if not sequences:
            return None
        if self._waiting and (len(sequences) < num_running or self._could_start()):
            return None
        if not self._grow_by_one(sequences):
            return None
        self._following.extend(sequences)
        return StepPlan(chunks=[sequence.following_chunk() for sequence in sequences], follows=rows)

    def _could_start(self) -> bool:
        """Whether the waiting sequence whose turn it is has room now."""
        if len(self._running) >= self._max_running:
            return False
        pool, sequence = self._pool, self._waiting.first
        num_hits = self._find_prefix(sequence).num_pages
        hits = pool.lookup(sequence.page_keys(pool.page_size, 0, num_hits))
        return self._has_room(pool.pages_for(len(sequence.token_ids)) - len(hits) + pool.num_idle(hits))

    def _grow_by_one(self, sequences: list[Sequence]) -> bool:
        """Give sequences pages for the token that is being chosen; False, and nothing, where there are too few."""
        pool = self._pool
        growing = [each for each in sequences if len(each.token_ids) == len(each.page_ids) * pool.page_size]
        if len(growing) > pool.num_available:
            return False
        for sequence in growing:
            sequence.page_ids += pool.allocate(1)
        return True

    def _take(self, sequence: Sequence, budget: int, chunks: list[Chunk]) -> int:
        """Add what fits of a sequence; the budget that is left for those behind it, which never overtake it."""
        num_tokens = sequence.next_tokens(budget, self._scores_left)
        chunks.append(chunk := sequence.chunk(num_tokens))
        self._planned.append(sequence)
        if chunk.scores is not None:
            self._scores_left -= len(chunk.scores.rows)
        stop = sequence.num_computed + num_tokens
        if self._enable_prefix_caching and self._fills_more(sequence, stop):
            self._coming.update(key for _, key in self._full_pages(sequence, stop))
            self._coming.update(key for _, key in self._ends(sequence, stop))
        return budget - num_tokens if stop == len(sequence.token_ids) else 0

    def _fills_more(self, sequence: Sequence, num_positions: int) -> bool:
        """Whether that many positions may fill pages, or hold soft prompts, that are not yet registered; those of
        most decodes do not."""
        return (
            num_positions // self._pool.page_size > sequence.num_registered
            or len(sequence.soft_prompt_ends) > sequence.num_ends_registered
        )

    def _full_pages(self, sequence: Sequence, num_positions: int) -> Iterable[tuple[int, PageKey]]:
        """(page, key) of the full pages of that many positions which are not yet registered."""
        page_size, first = self._pool.page_size, sequence.num_registered
        num_full = num_positions // page_size
        if num_full <= first:
            return ()
        return zip(sequence.page_ids[first:num_full], sequence.page_keys(page_size, first, num_full), strict=True)

    def _ends(self, sequence: Sequence, num_positions: int) -> Iterable[tuple[int, PageKey]]:
        """(page, partial key) of the soft prompts that end inside a page, which are not yet registered."""
        page_size = self._pool.page_size
        for end in sequence.soft_prompt_ends[sequence.num_ends_registered :]:
            if end > num_positions:
                break
            if end % page_size:
                yield sequence.page_ids[end // page_size], sequence.end_key(page_size, end)

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
        assert sequence.source_page is None, "only what has just started copies"
        self._running.remove(sequence)
        self._pool.release(sequence.page_ids)
        sequence.reset(State.WAITING)
        self._waiting.put_back(sequence)
        self._preemptions += 1

    def _start(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence its pages, cached ones where possible; False when it must wait."""
        pool = self._pool
        prefix = self._find_prefix(sequence)
        if self._is_worth_waiting(sequence, prefix):
            return False
        hits = pool.lookup(sequence.page_keys(pool.page_size, 0, prefix.num_pages))
        sources = [] if prefix.copy_key is None else pool.lookup([prefix.copy_key])
        pool.share(hits)
        pool.share(sources)
        missing = pool.pages_for(len(sequence.token_ids)) - len(hits)
        if sources and not self._has_room(missing):
            # Holding the source may take the very page that is missing, and nobody might ever give one back.
            pool.release(sources)
            sources = []
        if not self._has_room(missing):
            pool.release(hits)
            return False
        sequence.page_ids = hits + pool.allocate(missing)
        sequence.num_registered = len(hits)
        sequence.num_computed = len(hits) * pool.page_size
        if sources:
            self._copy(sequence, sources[0], prefix.num_positions)
        sequence.state = State.RUNNING
        if sequence.num_cached is None:
            sequence.num_cached = min(sequence.num_computed, sequence.prompt_length)
            self._cached_prompt_tokens += sequence.num_cached
        if sequence.num_computed < sequence.num_given:
            self._writes.append(sequence.write())
            sequence.num_computed = sequence.num_given
        return True

    def _find_prefix(self, sequence: Sequence) -> Prefix:
        if not self._enable_prefix_caching:
            return Prefix(num_pages=0, copy_key=None, num_positions=0)
        return sequence.find_prefix(self._pool.page_size, self._pool.__contains__)

    def _has_room(self, missing: int) -> bool:
        # A page is left for each running sequence to grow, or the newcomer would soon be preempted.
        return missing + len(self._running) <= self._pool.num_available

    def _copy(self, sequence: Sequence, source_page: int, num_positions: int) -> None:
        """Let the step copy, from a page that the sequence holds now, its rows up to that position."""
        page, num_rows = divmod(num_positions, self._pool.page_size)
        copy = PageCopy(source=source_page, target=sequence.page_ids[page], num_positions=num_rows)
        self._copies.append(copy)
        sequence.source_page = source_page
        sequence.num_computed = num_positions

    def _is_worth_waiting(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether this very step computes, for others, at least half of what the sequence lacks.

        So n choices of one prompt, or many questions about one document, that arrive together compute it once.
        """
        if not self._coming:
            return False
        with_coming = sequence.find_prefix(
            self._pool.page_size, lambda key: key in self._coming or key in self._pool
        )
        num_coming = with_coming.num_positions - prefix.num_positions
        return num_coming > 0 and num_coming * 2 >= len(sequence.token_ids) - prefix.num_positions

    def commit(self, plan: StepPlan, sampled: Iterable[Sampled]) -> list[Output]:
        """Take in the older plan that is out, and its tokens; what was aborted meanwhile gives no output."""
        outputs: list[Output] = []
        tokens = iter(sampled)
        planned, self._planned, self._following = self._planned, self._following, []
        for sequence, chunk in zip(planned, plan.chunks, strict=True):
            token = next(tokens) if chunk.sample is not None or chunk.scores is not None else None
            if sequence.state is not State.RUNNING:
                continue
            if token is not None and (error := self._error_of(sequence, token)):
                outputs.append(self._fail(sequence, error))
                continue
            self._advance(sequence, len(chunk.token_ids))
            if sequence.asks_of_prompt and (told := sequence.tell_prompt(token.scores if token else ())):
                outputs.append(told)
            if chunk.sample is not None and token is not None:
                output = sequence.accept(token)
                self._generated_tokens += 1
            elif sequence.has_ended:
                output = sequence.end()
            else:
                continue
            outputs.append(output)
            if output.finish is not None:
                self._finish(sequence)
        return outputs

    def _error_of(self, sequence: Sequence, token: Sampled) -> SoftpromptError | None:
        if sequence.matcher is not None and sequence.matcher.error:
            return InvalidArgument(sequence.matcher.error, field=STRUCTURED)
        if token.error:
            return InternalError(token.error)
        if token.token_id is not None and not 0 <= token.token_id < self._vocab_size:
            return InternalError(f"the model chose id {token.token_id}, outside its vocabulary")
        return None

    def fail_planned(self, error: SoftpromptError) -> list[Output]:
        """End every sequence of the plans that are out, one of which could not be computed."""
        planned, self._planned, self._following = self._planned, [], []  # whoever follows is in the older plan
        return [self._fail(sequence, error) for sequence in planned if sequence.state is State.RUNNING]

    def _advance(self, sequence: Sequence, num_tokens: int) -> None:
        start = sequence.num_computed
        sequence.num_computed = stop = start + num_tokens
        if start < sequence.prompt_length:
            self._computed_prompt_tokens += min(stop, sequence.prompt_length) - start
        if self._fills_more(sequence, stop):
            if self._enable_prefix_caching:
                self._register(sequence, stop)
            sequence.num_registered = stop // self._pool.page_size
            sequence.num_ends_registered = bisect_right(sequence.soft_prompt_ends, stop)
        self._release_source(sequence)

    def _register(self, sequence: Sequence, num_positions: int) -> None:
        for page_id, key in self._full_pages(sequence, num_positions):
            self._pool.register(page_id, key)
        for page_id, key in self._ends(sequence, num_positions):
            self._pool.register_partial(page_id, key)

    def _release_source(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.source_page is not None:
            self._pool.release([sequence.source_page], forget=forget)
            sequence.source_page = None

    def _fail(self, sequence: Sequence, error: SoftpromptError) -> Output:
        # What it computed may be as bad as its end: nobody else shall find it. Not where the request is at fault.
        self._finish(sequence, forget=not isinstance(error, InvalidArgument))
        return failure(sequence.request.request_id, error)

    def _finish(self, sequence: Sequence, *, forget: bool = False) -> None:
        if sequence.state is State.RUNNING:
            self._running.remove(sequence)
            self._release_source(sequence, forget=forget)
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
        sources = [sequence.source_page for sequence in self._running if sequence.source_page is not None]
        self._pool.check([*(sequence.page_ids for sequence in self._sequences.values()), sources])
        assert self._planned or not sources, "a source is held longer than a step"
        in_order = [*self._running, *self._waiting]
        assert all(older.turn <= younger.turn for older, younger in pairwise(in_order))
        self._waiting.check(each for each in in_order if each.num_cached is not None)
        assert {id(sequence) for sequence in in_order} == {id(sequence) for sequence in self._sequences.values()}
        assert all(sequence.state is State.RUNNING for sequence in self._running)
        assert all(sequence.state is State.WAITING and not sequence.page_ids for sequence in self._waiting)
        assert len(self._running) <= self._max_running
        for sequence in self._running:
            assert sequence.num_computed < len(sequence.token_ids), "nothing is left to compute"
            assert len(sequence.page_ids) * page_size >= sequence.num_computed
            assert sequence.num_computed >= sequence.num_given
        assert self._planned or not self._following
        for follower in self._following:
            assert follower in self._planned
            if follower.state is State.RUNNING:
                assert len(follower.page_ids) * page_size > len(follower.token_ids), "no page for what follows"
        if not self._planned:
            for sequence in self._running:
                assert sequence.num_registered == sequence.num_computed // page_size
                num_ends = bisect_right(sequence.soft_prompt_ends, sequence.num_computed)
                assert sequence.num_ends_registered == num_ends, "a soft prompt was not offered"
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
