"""Computes the steps that the scheduler plans."""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from softprompt_api.errors import InvalidArgument
from softprompt_api.params import MAX_LOGPROBS, SamplingParams
from softprompt_api.structured import StructuredOutputsParams
from softprompt_kernels import native
from softprompt_kernels.embed_gather import embed_gather
from softprompt_kernels.lora_tiles import LoraTiles
from torch import Tensor

from softprompt_inference.engine.config import EngineConfig, Prepare
from softprompt_inference.engine.messages import LoadAdapter, LoadLora, ModelInfo
from softprompt_inference.engine.plan import (
    MAX_SCORES,
    Chunk,
    Matcher,
    PageWrite,
    Pending,
    Sample,
    Sampled,
    Scores,
    StepPlan,
)
from softprompt_inference.grammar import GrammarCompiler
from softprompt_inference.model import hardware, sampler
from softprompt_inference.model.attention import (
    StepBatch,
    StepContext,
    attach_pages,
    build_step_batch,
    page_bytes,
    page_slots,
)
from softprompt_inference.model.embeddings import NearestTokens, vocabulary_norms
from softprompt_inference.model.errors import one_line
from softprompt_inference.model.graphs import Capture, CudaCapture, DecodeGraphs
from softprompt_inference.model.kv_pages import KVPages
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.lora.loras import Loras, plan_fixed_bytes
from softprompt_inference.model.rows import KeyValueRows, VirtualRows
from softprompt_inference.model.scorer import ScoredChoices
from softprompt_inference.model.transfer import upload
from softprompt_inference.text.definition import read_definition

_log = logging.getLogger(__name__)
# Of a prompt and a decode.
_CPU_WARM_UP_TOKENS = 32


class ModelRunner:
    """A loaded model with its KV pages, and the rows and LoRAs of resident adapters; the engine's `Runner`.

    Args:
        grammars: compiles the grammars that outputs must follow.
        fixed_lora_rank: the highest rank of a LoRA, for which all slots get their memory at once; None: each takes
            what it needs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        page_size: int,
        max_loras: int,
        grammars: GrammarCompiler,
        fixed_lora_rank: int | None = None,
    ) -> None:
        self.loaded = loaded
        self.info: ModelInfo
        self._page_size = page_size
        self._grammars = grammars
        self._context = StepContext()
        self._pages: KVPages | None = None
        self._num_pages = 0
        self._decodes: DecodeGraphs | None = None
        self._last_tokens: Tensor | None = None  # chosen by the step launched last
        self._rows = VirtualRows(loaded.hidden_size, loaded.dtype, loaded.device)
        first = loaded.layers[0]
        self._key_values = KeyValueRows(
            (len(loaded.layers), first.num_kv_heads, first.head_dim),
            loaded.dtype,
            loaded.device,
        )
        self._max_loras = max_loras
        self._loras = Loras(
            loaded.model,
            loaded.linears,
            loaded.lora,
            max_loras=max_loras,
            device=loaded.device,
            fixed_rank=fixed_lora_rank,
        )

    @property
    def lora_bytes(self) -> int:
        """Memory of the LoRAs on the device, and of slots that have theirs already."""
        return self._loras.num_bytes

    def load_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        """Make ids first_id … first_id + num_virtual_tokens − 1 stand for embeddings."""
        self._rows.load(first_id, adapter)

    def load_key_values(self, first_id: int, adapter: LoadAdapter) -> Iterator[None]:
        """Make these ids stand for keys and values, piece by piece."""
        return self._key_values.load(first_id, adapter)

    def drop_rows(self, first_id: int) -> None:
        """Forget the rows that were loaded at first_id."""
        self._rows.drop(first_id)
        self._key_values.drop(first_id)

    def find_nearest(self, first_id: int, top_k: int) -> NearestTokens:
        """Begin to search for the tokens nearest to the embeddings that were loaded at first_id."""
        rows = self._rows.rows_at(first_id)
        return NearestTokens(self.loaded.embedding, self.loaded.vocab_size, rows, top_k)

    def load_lora(self, slot: int, lora: LoadLora) -> Iterator[None]:
        """Make an empty slot stand for a LoRA, piece by piece; they raise AdapterInvalid where it does not fit."""
        return self._loras.load(slot, lora)

    def drop_lora(self, slot: int) -> None:
        """Empty the slot."""
        self._loras.drop(slot)

    def compile(self, wanted: StructuredOutputsParams) -> Future[Matcher]:
        """Start to make a matcher at its beginning, in another thread."""
        return self._grammars.start(wanted)

    def allocate_pages(self, num_pages: int) -> None:
        """Give the model that many empty KV pages, in place of those it had and of what was captured over them."""
        self._decodes = None
        self._pages = None  # the former pages' memory may be needed for the new ones
        self._num_pages = num_pages
        self._pages = attach_pages(
            self.loaded.layers,
            self._context,
            num_pages=num_pages + 1,  # the last is the scratch page of captured decodes
            page_size=self._page_size,
            dtype=self.loaded.dtype,
            device=self.loaded.device,
        )

    @torch.inference_mode()
    def capture_decodes(self, *, max_sequences: int, max_model_len: int, capture: Capture) -> None:
        """Let steps that are one text token for each of up to `max_sequences` sequences be replayed from now on.

        Raises RuntimeError where the model cannot be captured; then all steps stay as they were.
        """
        self._decodes = DecodeGraphs(
            self._compute_decodes,
            max_sequences=max_sequences,
            max_pages=-(-max_model_len // self._page_size),
            page_size=self._page_size,
            scratch_page=self._num_pages,
            max_loras=self._max_loras,
            device=self.loaded.device,
            capture=capture,
        )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Copy and write, then compute; the device may go on after the return.

        Whatever it is told, here and elsewhere, goes through one stream, and is done in the order of the calls.
        """
        assert self._pages is not None, "no pages were allocated"
        token_ids = self._find_tokens(plan.follows) if plan.follows else None
        self._pages.copy(plan.copies)
        for write in plan.writes:
            self._write(self._pages, write)
        logits = self._forward(plan.chunks, token_ids)
        samples = [chunk.sample for chunk in plan.chunks if chunk.sample is not None]
        num_scores = len(logits) - len(samples)
        choices = sampler.launch(logits[: len(samples)] if num_scores else logits, samples)
        self._last_tokens = choices.tokens
        return ScoredChoices(plan.chunks, choices, logits[len(samples) :]) if num_scores else choices

    def _write(self, pages: KVPages, write: PageWrite) -> None:
        rows = self._key_values.find(write.first_id).to(self.loaded.device, non_blocking=True)
        slots = page_slots(write.page_ids, write.start, write.stop, page_size=self._page_size)
        pages.write(rows[:, :, write.start : write.stop], self._to_device(slots))

    def run(self, plan: StepPlan) -> Sequence[Sampled]:
        """Launch a step and wait for its tokens; nothing happens in one without chunks."""
        return self.launch(plan).result() if plan.chunks else []

    def _find_tokens(self, follows: Sequence[int]) -> Tensor:
        """[n] int64: tokens of the step launched last. One that must not be an index becomes one that can be."""
        assert self._last_tokens is not None, "there is no step to follow"
        tokens = self._last_tokens
        if list(follows) != list(range(len(tokens))):  # mostly, everybody goes on
            tokens = tokens[self._to_device(follows)]
        return tokens.clamp(0, self.loaded.vocab_size - 1)

    def _forward(self, chunks: Sequence[Chunk], token_ids: Tensor | None) -> Tensor:
        """Write the chunks' KV; logits of the last token of each chunk that has a sample, and then of the rows of
        those that have scores: [n, vocabulary].

        token_ids: [n] int64, in place of those of the chunks, which have one each
        """
        if self._decodes is not None and self._are_decodes(chunks, self._decodes):
            logits = self._decodes.run(chunks, token_ids)
            wanted = [i for i, chunk in enumerate(chunks) if chunk.sample is not None]
            return logits if len(wanted) == len(chunks) else logits[self._to_device(wanted)]
        spans = [(chunk.start, len(chunk.token_ids), chunk.page_ids) for chunk in chunks]
        sampled_rows: list[int] = []
        scored_rows: list[int] = []
        num_tokens = 0
        for chunk in chunks:
            if chunk.scores is not None:
                scored_rows += [num_tokens + row for row in chunk.scores.rows]
            num_tokens += len(chunk.token_ids)
            if chunk.sample is not None:
                sampled_rows.append(num_tokens - 1)
        self._context.batch = batch = build_step_batch(
            spans,
            page_size=self._page_size,
            device=self.loaded.device,
            prefix_lens=[chunk.prefix_len for chunk in chunks],
            in_prompt=[chunk.in_prompt for chunk in chunks],
        )
        if any(chunk.lora >= 0 for chunk in chunks):
            slots = [chunk.lora for chunk in chunks for _ in chunk.token_ids]
            self.loaded.lora.tiles = build_tiles(slots, self.loaded.device)
        try:
            return self.loaded.logits(
                self._embed(list(chain.from_iterable(chunk.token_ids for chunk in chunks)))
                if token_ids is None
                else self.loaded.embedding(token_ids),
                batch.positions,
                self._to_device(sampled_rows + scored_rows),
            )
        finally:
            self._context.batch = None
            self.loaded.lora.tiles = None

    def _are_decodes(self, chunks: Sequence[Chunk], decodes: DecodeGraphs) -> bool:
        vocab_size = self.loaded.vocab_size
        return len(chunks) <= decodes.max_sequences and all(
            len(chunk.token_ids) == 1
            and chunk.token_ids[0] < vocab_size
            and chunk.scores is None
            and (chunk.lora < 0 or decodes.takes_loras)
            for chunk in chunks
        )

    def _compute_decodes(self, token_ids: Tensor, batch: StepBatch, tiles: LoraTiles | None) -> Tensor:
        """One text token for each sequence; logits of all: [n, vocabulary]. Never waits for the device."""
        self._context.batch = batch
        self.loaded.lora.tiles = tiles
        try:
            rows = torch.arange(len(token_ids), device=token_ids.device)
            return self.loaded.logits(self.loaded.embedding(token_ids), batch.positions, rows)
        finally:
            self._context.batch = None
            self.loaded.lora.tiles = None

    def _embed(self, token_ids: list[int]) -> Tensor:
        """Text through the model's own embedding (some scale there), adapter rows as they are: [T, hidden]."""
        vocab_size = self.loaded.vocab_size
        if max(token_ids) < vocab_size:
            return self.loaded.embedding(self._to_device(token_ids))  # type: ignore[no-any-return]
        places = [i for i, token_id in enumerate(token_ids) if token_id >= vocab_size]
        sources = self._rows.find([token_ids[i] for i in places])
        text_ids = [token_id if token_id < vocab_size else 0 for token_id in token_ids]
        embeddings: Tensor = self.loaded.embedding(self._to_device(text_ids))
        embed_gather(embeddings, self._rows.rows, self._to_device(places), self._to_device(sources))
        return embeddings

    def _to_device(self, values: Sequence[int]) -> Tensor:
        return upload(values, torch.int64, self.loaded.device)


def prepare(wanted: Prepare, report: Callable[[str], None]) -> None:
    """Make the CPU's kernels, which any model needs. Raises InvalidArgument where there is no such device."""
    device = hardware.choose_device(wanted.device)
    if wanted.native_cache_dir is not None and device.type == "cpu" and not native.is_loaded():
        _use_native_kernels(Path(wanted.native_cache_dir), report)


def load_runner(config: EngineConfig, report: Callable[[str], None]) -> ModelRunner:
    """Load the model, plan its memory and warm it up.

    Args:
        report: told about each slow phase, in a few words.

    Raises:
        Unsupported: the architecture cannot be served.
        InvalidArgument: the folder, or a setting that does not fit it.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = hardware.choose_device(config.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the current device, and graphs are captured there
    budget = None
    if device.type == "cuda" and config.gpu_memory_utilization is not None:
        budget = hardware.read_gpu_budget(device, config.gpu_memory_utilization)
    prepare(config.preparation(), report)
    loaded = load_model(config, report)
    runner = ModelRunner(
        loaded,
        page_size=config.page_size,
        max_loras=config.max_loras,
        grammars=GrammarCompiler(partial(read_definition, Path(config.model_path)), vocab_size=loaded.vocab_size),
        fixed_lora_rank=_reserve_loras(config, loaded, budget, report),
    )
    report("warming up")
    step_bytes = _warm_up(runner, config)
    bytes_per_page = page_bytes(loaded.layers, page_size=config.page_size, dtype=loaded.dtype)
    kv_cache_bytes = config.kv_cache_bytes
    if kv_cache_bytes is None:
        kv_cache_bytes = hardware.plan_kv_cache_bytes(device, budget) - step_bytes
    num_pages = kv_cache_bytes // bytes_per_page
    if num_pages < 1:
        beside = f", beside {runner.lora_bytes} for LoRAs" if runner.lora_bytes else ""
        raise InvalidArgument(
            f"one KV page takes {bytes_per_page} bytes, but kv_cache_bytes is {kv_cache_bytes}{beside}",
            field="kv_cache_bytes",
        )
    max_model_len = _plan_max_model_len(config, loaded, num_pages)
    megabytes = num_pages * bytes_per_page / 2**20
    report(f"reserving {num_pages} KV pages of {config.page_size} tokens ({megabytes:.0f} MiB)")
    runner.allocate_pages(num_pages)
    if loaded.device.type == "cuda":
        _capture_decodes(runner, config, max_model_len, report)
    first = loaded.layers[0]
    runner.info = ModelInfo(
        architecture=loaded.architecture,
        hidden_size=loaded.hidden_size,
        num_layers=len(loaded.layers),
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        vocab_size=loaded.vocab_size,
        dtype=str(loaded.dtype).removeprefix("torch."),
        device=str(loaded.device),
        max_model_len=max_model_len,
        max_virtual_tokens=config.max_virtual_tokens,
        weights_bytes=loaded.weights_bytes,
        kv_cache_bytes=num_pages * bytes_per_page,
        num_pages=num_pages,
        page_size=config.page_size,
        no_key_values=loaded.no_key_values,
        vocabulary_norms=vocabulary_norms(loaded.embedding, loaded.vocab_size, loaded.device),
    )
    return runner


def _reserve_loras(
    config: EngineConfig, loaded: LoadedModel, budget: hardware.GpuBudget | None, report: Callable[[str], None]
) -> int | None:
    """The rank that all slots get memory for at once, on a GPU: what is left is planned for KV pages, and captured
    decodes find the weights where they were."""
    if loaded.device.type != "cuda" or not config.max_loras:
        return None
    num_bytes = plan_fixed_bytes(
        loaded.linears,
        max_loras=config.max_loras,
        max_rank=config.max_lora_rank,
        free_bytes=hardware.plan_kv_cache_bytes(loaded.device, budget),
    )
    report(f"reserving {num_bytes / 2**20:.0f} MiB for {config.max_loras} LoRAs of rank {config.max_lora_rank}")
    return config.max_lora_rank


def _use_native_kernels(cache_dir: Path, report: Callable[[str], None]) -> None:
    report("preparing CPU kernels")
    try:
        native.load(cache_dir)
    except native.CannotCompile as error:
        _log.warning("the model runs on torch's own operations, several times as slowly: %s", error)


def _capture_decodes(
    runner: ModelRunner, config: EngineConfig, max_model_len: int, report: Callable[[str], None]
) -> None:
    device = runner.loaded.device
    report("capturing CUDA graphs")
    try:
        runner.capture_decodes(
            max_sequences=min(config.max_num_sequences, config.step_tokens(device.type)),
            max_model_len=max_model_len,
            capture=CudaCapture(device),
        )
    except RuntimeError as error:
        report(f"decodes go without CUDA graphs: {one_line(error)}")


def _plan_max_model_len(config: EngineConfig, loaded: LoadedModel, num_pages: int) -> int:
    """The longest sequence: what was asked for, else what model and pages allow."""
    capacity, wanted = num_pages * config.page_size, config.max_model_len
    if wanted is None:
        return min(loaded.max_positions, capacity)
    if wanted > capacity:
        raise InvalidArgument(
            f"max_model_len is {wanted}, but the KV pages hold {capacity} positions; raise kv_cache_bytes",
            field="max_model_len",
        )
    return wanted


class _AnyToken:
    """A grammar without rules."""

    def __init__(self, vocab_size: int) -> None:
        self._mask = b"\xff" * (4 * -(-vocab_size // 32))
        self.error = ""

    def allowed(self, banned_ids: Sequence[int]) -> bytes:  # noqa: ARG002
        return self._mask

    def accept(self, token_id: int) -> None:
        pass


def _warm_up(runner: ModelRunner, config: EngineConfig) -> int:
    """Run the largest step, on a CPU a small one; returns the device memory it took beside weights and pages.

    That is 0 on a CPU, where nothing is compiled either.
    """
    device = runner.loaded.device
    on_cuda = device.type == "cuda"
    num_tokens = config.step_tokens(device.type) if on_cuda else _CPU_WARM_UP_TOKENS
    num_decodes = min(config.max_num_sequences, num_tokens if on_cuda else 2) - 1
    lengths = [1] * num_decodes + [min(num_tokens - num_decodes, runner.loaded.max_positions)]
    sample = Sample(params=SamplingParams(), seed=0, index=0)
    chunks, num_pages = [], 0
    for length in lengths:
        count = -(-length // config.page_size)
        chunks.append(
            Chunk(
                token_ids=[0] * length,
                start=0,
                page_ids=range(num_pages, num_pages + count),
                sample=sample,
            )
        )
        num_pages += count
    runner.allocate_pages(num_pages)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before_bytes = torch.cuda.memory_allocated(device)
    runner.run(StepPlan(chunks=chunks))
    if on_cuda:
        # Logits that someone edits are copied, and drawn from by another variant of the kernel; another are those
        # of which a grammar allows some.
        any_token = _AnyToken(runner.loaded.vocab_size)
        for edited in (
            replace(sample, banned_ids=(0,)),
            replace(sample, matcher=any_token),
            replace(sample, matcher=any_token, params=SamplingParams(logit_bias={0: 1.0})),
        ):
            chunks[0] = replace(chunks[0], sample=edited)
            runner.run(StepPlan(chunks=chunks))
        # Another are those that tell of prompts.
        rows = range(min(len(chunks[-1].token_ids), MAX_SCORES))
        scores = Scores(rows=rows, token_ids=[0] * len(rows), num_top=MAX_LOGPROBS)
        runner.run(StepPlan(chunks=[*chunks[:-1], replace(chunks[-1], scores=scores)]))
        if config.max_loras:
            runner.run(StepPlan(chunks=[replace(chunk, lora=0) for chunk in chunks]))
        # And the first soft prompt is not to wait for its kernel's compiler.
        row = torch.zeros(1, runner.loaded.hidden_size, dtype=runner.loaded.dtype, device=device)
        place = torch.zeros(1, dtype=torch.int64, device=device)
        embed_gather(row, row.clone(), place, place)
    return torch.cuda.max_memory_allocated(device) - before_bytes if on_cuda else 0
