"""Decode steps as CUDA graphs: one launch in place of hundreds.

A graph replays fixed kernels over fixed memory. So there is one for each of a few batch sizes (buckets), captured
over buffers that every step fills anew; a step takes the next larger bucket and pads it. A padding row computes
token 0 at position 0, writes its key and value to a scratch page that no sequence holds, and sees only that.

Steps with a LoRA have graphs of their own, in which every linear looks for it in the step's tiles.
"""

import warnings
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from softprompt_kernels.lora_tiles import LoraTiles
from torch import Tensor

from softprompt_inference.engine.plan import Chunk
from softprompt_inference.model.attention import StepBatch
from softprompt_inference.model.lora.context import TileBuffers

# Token ids [n] int64, the step's geometry and its LoRAs' tiles → logits [n, vocabulary].
Compute = Callable[[Tensor, StepBatch, LoraTiles | None], Tensor]
# Takes what a replay shall do, and may run it; returns the replay.
Capture = Callable[[Callable[[], None]], Callable[[], object]]

_BUCKET_STEP = 8


def decode_buckets(max_sequences: int) -> tuple[int, ...]:
    """Batch sizes to capture, in ascending order: 1, 2, 4, 8, 16, 24 … max_sequences."""
    sizes = [1, 2, 4, *range(_BUCKET_STEP, max_sequences, _BUCKET_STEP)]
    return (*(size for size in sizes if size < max_sequences), max_sequences)


class CudaCapture:
    """Captures CUDA graphs that share one memory pool; after the largest batch, the others fit into its memory."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], None]) -> Callable[[], object]:
        """The replay of `compute`.

        Raises:
            RuntimeError: it waits for the device, which a graph cannot.
        """
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            compute()  # compiles Triton's kernels and gives cuBLAS its workspace
            self._run_without_waiting(compute)
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            compute()
        return graph.replay

    def _run_without_waiting(self, compute: Callable[[], None]) -> None:
        """Raise where `compute` waits: noticed within a capture, it would leave the device's state unclear."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings():
            # That this mode is a prototype.
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode("error")
            try:
                compute()
            finally:
                torch.cuda.set_sync_debug_mode(mode)


class DecodeGraphs:
    """Decode steps of up to `max_sequences` sequences over static buffers.

    Args:
        compute: the model, over pages that stay where they are.
        max_sequences: the largest bucket.
        max_pages: most pages of one sequence.
        page_size: positions in one page.
        scratch_page: a page that no sequence holds.
        max_loras: most LoRAs of one step; 0: steps with LoRAs are not captured.
        device: where `compute` wants its inputs.
        capture: makes a replay; `CudaCapture` on a GPU.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        max_sequences: int,
        max_pages: int,
        page_size: int,
        scratch_page: int,
        max_loras: int = 0,
        device: torch.device,
        capture: Capture,
    ) -> None:
        self._model = compute
        self._page_size = page_size
        self._scratch_page = scratch_page
        self._device = device
        on_cuda = device.type == "cuda"
        self._inputs = torch.zeros(4, max_sequences, dtype=torch.int64, device=device)
        self._context_lens = torch.ones(max_sequences, dtype=torch.int32, device=device)
        self._query_start = torch.arange(max_sequences + 1, dtype=torch.int32, device=device)
        table_shape = (max_sequences, max_pages)
        self._page_table = torch.full(table_shape, scratch_page, dtype=torch.int32, device=device)
        # What the buffers get next. Pinned, or the host would wait for each copy.
        self._staged_inputs = torch.zeros(4, max_sequences, dtype=torch.int64, pin_memory=on_cuda)
        self._staged_table = torch.zeros(max_sequences * max_pages, dtype=torch.int32, pin_memory=on_cuda)
        self._copied = torch.cuda.Event() if on_cuda else None  # type: ignore[no-untyped-call]
        # What the page table holds: so many of the pages in each row's list, which grows but never changes.
        self._host_table = torch.full(table_shape, scratch_page, dtype=torch.int32).numpy()
        self._padding = (scratch_page,)
        self._page_lists: list[Sequence[int]] = [self._padding] * max_sequences
        self._num_pages = np.ones(max_sequences, dtype=np.int64)

        self._tiles = TileBuffers(max_sequences, max_loras, device) if max_loras else None

        self._buckets = decode_buckets(max_sequences)
        self._fill([], max_sequences)
        self._logits = torch.empty_like(self._compute_logits(max_sequences, with_lora=False))
        if on_cuda:
            torch.cuda.empty_cache()  # memory cannot be taken back from the cache while a graph is captured
        self._replays = {
            (size, with_lora): capture(partial(self._compute, size, with_lora=with_lora))
            for with_lora in ((True, False) if max_loras else (False,))  # the first takes the most memory
            for size in reversed(self._buckets)
        }

    @property
    def max_sequences(self) -> int:
        """The most sequences of one step."""
        return self._buckets[-1]

    @property
    def takes_loras(self) -> bool:
        """Whether steps with LoRAs were captured."""
        return self._tiles is not None

    def run(self, chunks: Sequence[Chunk], token_ids: Tensor | None = None) -> Tensor:
        """Compute one token of each of 1 … max_sequences sequences, none of them a virtual token.

        With a LoRA only where `takes_loras`.

        Args:
            token_ids: [n] int64, on the device: computed in place of those that the chunks hold.

        Returns the logits of all of them, [n, vocabulary], in memory that the next run writes again.
        """
        size = self._buckets[bisect_left(self._buckets, len(chunks))]
        with_lora = any(chunk.lora >= 0 for chunk in chunks)
        self._fill(chunks, size, with_lora=with_lora)
        if token_ids is not None:
            self._inputs[0, : len(chunks)].copy_(token_ids)
        self._replays[size, with_lora]()
        return self._logits[: len(chunks)]

    def _compute(self, size: int, *, with_lora: bool) -> None:
        """What is captured. The logits of all buckets share one buffer: memory of the pool is used again."""
        self._logits[:size].copy_(self._compute_logits(size, with_lora=with_lora))

    def _compute_logits(self, size: int, *, with_lora: bool) -> Tensor:
        token_ids, positions, slots, context_lens = self._inputs[:, :size]
        self._context_lens[:size].copy_(context_lens)
        batch = StepBatch(
            positions=positions,
            slots=slots,
            page_table=self._page_table[:size],
            query_start=self._query_start[: size + 1],
            context_lens=self._context_lens[:size],
            page_size=self._page_size,
        )
        tiles = self._tiles.view(size) if with_lora and self._tiles is not None else None
        return self._model(token_ids, batch, tiles)

    def _fill(self, chunks: Sequence[Chunk], size: int, *, with_lora: bool = False) -> None:
        """Bring the step and its padding into the static buffers."""
        if self._copied is not None:
            self._copied.synchronize()  # the last step's copies have left the staging memory
        count = len(chunks)
        token_ids, positions, slots, context_lens = self._staged_inputs.numpy()[:, :size]
        token_ids[:count] = [chunk.token_ids[0] for chunk in chunks]
        positions[:count] = [chunk.start for chunk in chunks]
        token_ids[count:] = positions[count:] = 0
        pages, offsets = np.divmod(positions, self._page_size)
        self._fill_page_table([chunk.page_ids for chunk in chunks] + [self._padding] * (size - count), pages + 1)
        slots[:] = self._host_table[np.arange(size), pages] * self._page_size + offsets
        context_lens[:] = positions + 1
        self._inputs.copy_(self._staged_inputs, non_blocking=True)
        if with_lora and self._tiles is not None:
            self._tiles.fill([chunk.lora for chunk in chunks])
        if self._copied is not None:
            self._copied.record()

    def _fill_page_table(self, page_lists: list[Sequence[int]], num_pages: np.ndarray) -> None:
        """Most rows need no other pages than in the step before; where none does, nothing is copied."""
        size = len(page_lists)
        for i, (page_ids, former) in enumerate(zip(page_lists, self._page_lists, strict=False)):
            if page_ids is not former:
                self._num_pages[i] = 0
                self._page_lists[i] = page_ids
        held = self._num_pages[:size]
        [changed] = np.nonzero(held < num_pages)
        if not len(changed):
            return
        for i, start, stop in np.stack([changed, held[changed], num_pages[changed]], axis=1).tolist():
            self._host_table[i, start:stop] = page_lists[i][start:stop]
        width = int(num_pages.max())
        staged = self._staged_table[: size * width].view(size, width)
        staged.numpy()[:] = self._host_table[:size, :width]
        self._page_table[:size, :width].copy_(staged.to(self._device, non_blocking=True))
        held[changed] = num_pages[changed]
