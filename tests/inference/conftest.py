"""A model at the edge of the engine whose every token depends on all it should see, and on nothing else."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import pytest
from softprompt_api.params import SamplingParams
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.messages import (
    AddRequest,
    LoadAdapter,
    LoadLora,
    Logprobs,
    LoraModule,
    ModelInfo,
    NearRow,
    Output,
    SoftPromptPart,
    TextPart,
)
from softprompt_inference.engine.plan import (
    Chunk,
    Matcher,
    PageWrite,
    Sample,
    Sampled,
    Scores,
    StepPlan,
    looks_back,
)
from softprompt_inference.engine.seen import Seen

VOCAB_SIZE = 50
HIDDEN_SIZE = 4


def _hash(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _link(chain: bytes, content: object, lora: str) -> bytes:
    return _hash(chain, content, lora)


def _choose(cells: Sequence[tuple[int, bytes]], sample: Sample) -> int:
    assert (sample.seen is not None) == looks_back(sample.params)
    counts = dict(zip(sample.seen.token_ids, sample.seen.counts, strict=True)) if sample.seen else None
    token_id = int.from_bytes(_hash(list(cells), sample.seed, sample.index, counts)[:4], "little") % VOCAB_SIZE
    if sample.matcher is not None:
        mask = sample.matcher.allowed(sample.banned_ids)
        allowed = [i for i in range(VOCAB_SIZE) if mask[i >> 3] >> (i & 7) & 1]
        return allowed[token_id % len(allowed)] if allowed else -1
    while token_id in sample.banned_ids:
        token_id = (token_id + 1) % VOCAB_SIZE
    return token_id


def _likelihood(cells: Sequence[tuple[int, bytes]], token_id: int, num_top: int) -> Logprobs:
    """How likely a token is behind cells, and of others: each from all that it should depend on."""
    seen = _hash(list(cells))
    every = [-seen[other % len(seen)] - other / VOCAB_SIZE for other in range(VOCAB_SIZE)]
    likeliest = sorted(range(VOCAB_SIZE), key=lambda other: -every[other])[:num_top]
    return Logprobs(chosen=every[token_id], top=[(other, every[other]) for other in likeliest])


@dataclass(frozen=True)
class FakePending:
    """A computed step that is told only now."""

    tell: Callable[[], Sequence[Sampled]]

    def result(self) -> Sequence[Sampled]:
        return self.tell()


@dataclass
class FakeSearch:
    """Answers with what it was asked for, at its third piece."""

    first_id: int
    top_k: int
    num_pieces: int = 0
    error: Exception | None = None

    def advance(self) -> list[NearRow] | None:
        if self.error:
            raise self.error
        self.num_pieces += 1
        return [NearRow(norm=1.0, tokens=[(self.first_id, 0.5)] * self.top_k)] if self.num_pieces == 3 else None


@dataclass
class FakeRunner:
    """Keeps pages as the real one does, and computes tokens from the pages alone.

    A cell holds its position and a hash over its content, its LoRA and the cell before it, as KV depends on all
    before it; what an adapter gives depends on nothing. A token is a hash over all cells of its sequence: a stale,
    foreign or misplaced page shows.

    It computes at launch, as a device whose work is done in order might, and tells what came of it when asked.
    """

    info: ModelInfo
    failures: int = 0  # how many of the next steps raise when they are launched
    late_failures: int = 0  # how many of the next steps raise when their result is asked for
    broken_seed: int | None = None  # a sample with this seed has logits that are not finite
    plans: list[StepPlan] = field(default_factory=list)
    rows: dict[int, bytes] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    loras: dict[int, str] = field(default_factory=dict)  # digests, by slot
    _begun: set[int] = field(default_factory=set)  # slots with a LoRA, or some of one
    matchers: list[Future[Matcher]] = field(default_factory=list)  # for the next requests with a grammar
    compiled: list[StructuredOutputsParams] = field(default_factory=list)
    load_error: BaseException | None = None
    searches: list[FakeSearch] = field(default_factory=list)
    copied_positions: int = 0
    written_positions: int = 0
    key_value_pieces: int = 1  # in which keys and values come in
    key_values: dict[int, str] = field(default_factory=dict)  # first id → digest, of those that have come in
    _given: set[int] = field(default_factory=set)  # ids that stand for keys and values
    events: list[str] = field(default_factory=list)  # launches, with what they are, and results
    _tokens: list[int] = field(default_factory=list)  # of the last step, as the device has them
    _cells: dict[tuple[int, int], tuple[int, bytes]] = field(default_factory=dict)
    _lengths: dict[int, int] = field(default_factory=dict)
    # What pages each list has held, by its id.
    _page_lists: dict[int, tuple[Sequence[int], list[int]]] = field(default_factory=dict)

    @property
    def computed_ids(self) -> list[int]:
        """Every id that was computed, in order."""
        return [token_id for plan in self.plans for chunk in plan.chunks for token_id in chunk.token_ids]

    @property
    def computed_positions(self) -> int:
        return len(self.computed_ids)

    def load_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        assert not adapter.are_key_values
        if self.load_error:
            raise self.load_error
        self._put_rows(first_id, adapter)

    def load_key_values(self, first_id: int, adapter: LoadAdapter) -> Iterator[None]:
        assert adapter.are_key_values
        for _ in range(self.key_value_pieces - 1):
            yield
        if self.load_error:
            raise self.load_error
        self._put_rows(first_id, adapter)
        self._given.update(range(first_id, first_id + adapter.num_virtual_tokens))
        self.key_values[first_id] = adapter.digest

    def _put_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        row_bytes = len(adapter.rows) // adapter.num_virtual_tokens
        self._lengths[first_id] = adapter.num_virtual_tokens
        for row in range(adapter.num_virtual_tokens):
            assert first_id + row not in self.rows
            self.rows[first_id + row] = adapter.rows[row * row_bytes : (row + 1) * row_bytes]

    def drop_rows(self, first_id: int) -> None:
        self.dropped.append(first_id)
        self.key_values.pop(first_id, None)
        for row in range(self._lengths.pop(first_id, 0)):
            del self.rows[first_id + row]
            self._given.discard(first_id + row)

    def load_lora(self, slot: int, lora: LoadLora) -> Iterator[None]:
        assert slot not in self._begun
        self._begun.add(slot)
        for _ in lora.modules[1:]:
            yield
        if self.load_error:
            raise self.load_error
        self.loras[slot] = lora.digest

    @property
    def arrived(self) -> list[str]:
        """Digests of LoRAs, and of keys and values, that have come in."""
        return [*self.loras.values(), *self.key_values.values()]

    def drop_lora(self, slot: int) -> None:
        self._begun.discard(slot)
        self.loras.pop(slot, None)

    def find_nearest(self, first_id: int, top_k: int) -> FakeSearch:
        if self.load_error:
            raise self.load_error
        self.searches.append(FakeSearch(first_id=first_id, top_k=top_k))
        return self.searches[-1]

    def compile(self, wanted: StructuredOutputsParams) -> Future[Matcher]:
        """The next of `matchers`."""
        self.compiled.append(wanted)
        return self.matchers.pop(0)

    def launch(self, plan: StepPlan) -> FakePending:
        plan = self._with_tokens(plan)
        self.plans.append(plan)
        self.events.append("follow" if plan.follows else "launch")
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device fell over")
        sampled = self._compute(plan)
        self._tokens = [each.token_id for each in sampled if each.token_id is not None]
        fails, self.late_failures = self.late_failures > 0, max(self.late_failures - 1, 0)

        def tell() -> Sequence[Sampled]:
            self.events.append("result")
            if fails:
                raise RuntimeError("the device fell over some time ago")
            return sampled

        return FakePending(tell)

    def _with_tokens(self, plan: StepPlan) -> StepPlan:
        """The plan with the tokens of the step that it follows in place of those that stand for nothing."""
        if not plan.follows:
            return plan
        assert len(plan.follows) == len(set(plan.follows)) == len(plan.chunks)
        assert not plan.copies
        assert not plan.writes
        assert not any(chunk.sample is None or looks_back(chunk.sample.params) for chunk in plan.chunks)
        chunks = [
            replace(chunk, token_ids=[self._tokens[row]])
            for row, chunk in zip(plan.follows, plan.chunks, strict=True)
        ]
        return replace(plan, chunks=chunks)

    def _check_page_lists(self, plan: StepPlan) -> None:
        """Nothing but growth: the real runner reads only what a list has more than in the step before."""
        for chunk in plan.chunks:
            page_ids, held = self._page_lists.setdefault(id(chunk.page_ids), (chunk.page_ids, []))
            assert list(page_ids[: len(held)]) == held, "a sequence has other pages in the list that it had"
            held[:] = page_ids

    def _compute(self, plan: StepPlan) -> list[Sampled]:
        self._check_page_lists(plan)
        written = [cell for chunk in plan.chunks for cell in self._slots(chunk, chunk.start)]
        written += [cell for write in plan.writes for _, cell in self._given_slots(write)]
        assert len(written) == len(set(written)), "two sequences write one cell"
        self._copy(plan, set(written))
        for write in plan.writes:
            self._write_given(write)
        for chunk in plan.chunks:
            self._write(chunk)
        return [
            self._answer(chunk) for chunk in plan.chunks if chunk.sample is not None or chunk.scores is not None
        ]

    def _copy(self, plan: StepPlan, written: set[tuple[int, int]]) -> None:
        pages = [copy.target for copy in plan.copies]
        assert len(pages) == len(set(pages)), "two copies go to one page"
        assert not set(pages) & {copy.source for copy in plan.copies}, "a page is copied from and to"
        for copy in plan.copies:
            assert 0 < copy.num_positions < self.info.page_size
            for row in range(copy.num_positions):
                assert not {(copy.source, row), (copy.target, row)} & written, "a copied cell is written"
                self._cells[copy.target, row] = self._cells[copy.source, row]
        self.copied_positions += sum(copy.num_positions for copy in plan.copies)

    def _slots(self, chunk: Chunk, start: int) -> list[tuple[int, int]]:
        size = self.info.page_size
        stop = chunk.start + len(chunk.token_ids)
        return [(chunk.page_ids[position // size], position % size) for position in range(start, stop)]

    def _given_slots(self, write: PageWrite) -> list[tuple[int, tuple[int, int]]]:
        size = self.info.page_size
        assert write.start < write.stop, "nothing is to be written"
        return [(p, (write.page_ids[p // size], p % size)) for p in range(write.start, write.stop)]

    def _write_given(self, write: PageWrite) -> None:
        for position, slot in self._given_slots(write):
            assert write.first_id + position in self._given, "an embedding is written as keys and values"
            self._cells[slot] = (position, _hash("given", self.rows[write.first_id + position]))
            self.written_positions += 1

    def _write(self, chunk: Chunk) -> None:
        slots = self._slots(chunk, 0)
        chain = self._cells[slots[chunk.start - 1]][1] if chunk.start else b""
        for position, token_id in enumerate(chunk.token_ids, start=chunk.start):
            assert token_id not in self._given, "keys and values are computed"
            content = self.rows[token_id] if token_id >= VOCAB_SIZE else token_id
            chain = _link(chain, content, self.loras[chunk.lora] if chunk.lora >= 0 else "")
            self._cells[slots[position]] = (position, chain)

    def _answer(self, chunk: Chunk) -> Sampled:
        answer = Sampled(token_id=None) if chunk.sample is None else self._sample(chunk, chunk.sample)
        return answer if chunk.scores is None else replace(answer, scores=self._score(chunk, chunk.scores))

    def _score(self, chunk: Chunk, scores: Scores) -> list[Logprobs]:
        assert len(scores.rows) == len(scores.token_ids) > 0
        cells = [self._cells[slot] for slot in self._slots(chunk, 0)]
        return [
            _likelihood(cells[: chunk.start + row + 1], token_id, scores.num_top)
            for row, token_id in zip(scores.rows, scores.token_ids, strict=True)
        ]

    def _sample(self, chunk: Chunk, sample: Sample) -> Sampled:
        if sample.seed == self.broken_seed:
            return Sampled(token_id=0, error="the logits are not finite")
        token_id = _choose([self._cells[slot] for slot in self._slots(chunk, 0)], sample)
        logprobs = Logprobs(chosen=-1.0, top=[(token_id, -1.0)]) if sample.params.logprobs is not None else None
        return Sampled(token_id=token_id, logprobs=logprobs)


@dataclass
class Fakes:
    """Makers of the fake model, engines over it, adapters and requests, and what each request must yield."""

    vocab_size: int = VOCAB_SIZE

    def runner(
        self, *, num_pages: int = 16, page_size: int = 4, max_model_len: int = 32, device: str = "cpu"
    ) -> FakeRunner:
        return FakeRunner(
            ModelInfo(
                architecture="FakeForCausalLM",
                hidden_size=HIDDEN_SIZE,
                num_layers=1,
                num_kv_heads=1,
                head_dim=4,
                vocab_size=VOCAB_SIZE,
                dtype="float32",
                device=device,
                max_model_len=max_model_len,
                max_virtual_tokens=12,
                weights_bytes=0,
                kv_cache_bytes=0,
                num_pages=num_pages,
                page_size=page_size,
            )
        )

    def engine(
        self,
        runner: FakeRunner,
        *,
        max_num_sequences: int = 8,
        max_step_tokens: int = 16,
        enable_prefix_caching: bool = True,
        share: bool = True,
        look_ahead: bool = False,
        max_loras: int = 4,
    ) -> Engine:
        config = EngineConfig(
            model_path="",
            max_num_sequences=max_num_sequences,
            max_step_tokens=max_step_tokens,
            enable_prefix_caching=enable_prefix_caching,
            share=share,
            look_ahead=look_ahead,
            max_loras=max_loras,
        )
        return Engine(runner, config)

    def adapter(self, name: str, num_virtual_tokens: int, *, are_key_values: bool = False) -> LoadAdapter:
        """An adapter whose rows depend on its name alone."""
        row_size = 2 * HIDDEN_SIZE if are_key_values else HIDDEN_SIZE
        row_bytes = row_size * 4
        rows = b"".join(_hash(name, row)[:row_bytes] for row in range(num_virtual_tokens))
        return LoadAdapter(
            digest=f"sha256:{name}",
            rows=rows,
            dtype="float32",
            num_virtual_tokens=num_virtual_tokens,
            row_size=row_size,
            are_key_values=are_key_values,
        )

    def lora(
        self, name: str, *, rank: int = 2, scale: float = 1.0, dtype: str = "float32", pieces: int = 1
    ) -> LoadLora:
        """A LoRA on so many linears, each a piece of its own."""
        modules = [
            LoraModule(name=f"layers.{layer}.proj", rank=rank, scale=scale, a=bytes(8), b=bytes(8))
            for layer in range(pieces)
        ]
        return LoadLora(digest=f"sha256:{name}", modules=modules, dtype=dtype)

    def request(
        self,
        request_id: str,
        *parts: str | Iterable[int],
        seed: int = 0,
        salt: str = "",
        eos: Iterable[int] = (),
        params: SamplingParams | None = None,
        max_tokens: int | None = 4,
        lora: str = "",
    ) -> AddRequest:
        """A request whose prompt is adapters (by name) and ids, in order; `lora` by name too."""
        return AddRequest(
            request_id=request_id,
            prompt=[
                SoftPromptPart(digest=f"sha256:{part}")
                if isinstance(part, str)
                else TextPart(token_ids=list(part))
                for part in parts
            ],
            params=params or SamplingParams(max_tokens=max_tokens),
            eos_token_ids=list(eos),
            seed=seed,
            salt=salt,
            lora=lora and f"sha256:{lora}",
        )

    def drain(self, engine: Engine, *, max_steps: int = 5000) -> dict[str, list[Output]]:
        """Step until nothing is left to do, checking after every step; outputs by request."""
        outputs: dict[str, list[Output]] = {}
        for _ in range(max_steps):
            if not engine.has_work:
                return outputs
            for output in engine.step().outputs:
                outputs.setdefault(output.request_id, []).append(output)
            engine.check()
        raise AssertionError("the engine does not come to an end")

    def solo(
        self, request: AddRequest, adapters: Iterable[LoadAdapter] = (), *, max_model_len: int = 32
    ) -> list[int]:
        """The ids this request must yield, computed without pages, batches or engine."""
        contents, cells = self._contents(request, adapters)
        prompt_ids = [content for content in contents if isinstance(content, int)]
        params = request.params
        eos = set() if params.ignore_eos else set(request.eos_token_ids)
        ends = eos | set(params.stop_token_ids)
        room = max_model_len - len(contents)
        outputs: list[int] = []
        while params.max_tokens != 0:
            self._compute(cells, contents, request.lora)
            sample = Sample(
                params=params,
                seed=request.seed,
                index=len(outputs),
                banned_ids=sorted(ends) if len(outputs) < params.min_tokens else (),
                seen=Seen(prompt_ids, outputs) if looks_back(params) else None,
            )
            token_id = _choose(cells, sample)
            outputs.append(token_id)
            contents.append(token_id)
            if token_id in ends or len(outputs) == (params.max_tokens or room):
                break
        return outputs

    def scores(self, request: AddRequest, adapters: Iterable[LoadAdapter] = ()) -> list[Logprobs | None]:
        """What this request must be told of its prompt; None for the first that is computed."""
        contents, given = self._contents(request, adapters)
        cells = list(given)
        self._compute(cells, contents, request.lora)
        num_top = request.params.prompt_logprobs or 0
        return [
            _likelihood(cells[:position], content, num_top) if position > len(given) else None
            for position, content in enumerate(contents)
            if isinstance(content, int)
        ]

    def _compute(self, cells: list[tuple[int, bytes]], contents: Sequence[object], lora: str) -> None:
        for content in contents[len(cells) :]:
            cells.append((len(cells), _link(cells[-1][1] if cells else b"", content, lora)))

    def _contents(
        self, request: AddRequest, adapters: Iterable[LoadAdapter]
    ) -> tuple[list[object], list[tuple[int, bytes]]]:
        """What stands at each position of the prompt, ids and rows, and the cells that an adapter gives."""
        by_digest = {adapter.digest: adapter for adapter in adapters}
        contents: list[object] = []
        cells: list[tuple[int, bytes]] = []
        for part in request.prompt:
            if isinstance(part, TextPart):
                contents += part.token_ids
            else:
                adapter = by_digest[part.digest]
                size = len(adapter.rows) // adapter.num_virtual_tokens
                contents += [adapter.rows[start : start + size] for start in range(0, len(adapter.rows), size)]
                if adapter.are_key_values:
                    assert len(contents) == adapter.num_virtual_tokens, "it does not stand at the front"
                    cells = [(position, _hash("given", row)) for position, row in enumerate(contents)]
        return contents, cells


@pytest.fixture(scope="session")
def fakes() -> Fakes:
    """The fake model and what goes with it."""
    return Fakes()


@pytest.fixture(scope="session")
def token_ids() -> Callable[[Iterable[Output]], list[int]]:
    """The ids in a request's outputs."""
    return lambda outputs: [output.token_id for output in outputs if output.token_id is not None]
