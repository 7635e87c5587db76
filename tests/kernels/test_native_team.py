"""Threads that compute together: one that is put aside holds nobody up, and changes nothing when it comes back."""

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

import pytest
import torch
from softprompt_kernels import native
from softprompt_kernels.native.layer import DecoderLayer, DecoderLayers, LinearWeights, NormWeights
from softprompt_kernels.native.lora import LoraStep, PackedLoras
from softprompt_kernels.native.memory import PooledPages, RegionPool
from softprompt_kernels.paged_attention import plan_paged_attention, reference
from torch import Tensor

_HIDDEN, _HEADS, _KV_HEADS, _DIM, _INTERMEDIATE = 64, 4, 2, 32, 128
_NUM_LAYERS, _PAGE_SIZE, _RANK = 4, 16, 5
# Far longer than any of this takes.
_TIMEOUT_S = 60.0
_BeforePart = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


@dataclass
class Stall:
    """Puts aside whoever first takes a part of a loop, until another is in loop `until`, or takes the part again.

    Attributes:
        timeout_s: for which it waits for that.
        was_over: whether that came to be.
    """

    loop: int
    until: int
    timeout_s: float = _TIMEOUT_S
    was_over: bool = False
    _taken: tuple[int, int] | None = None
    _thread: int | None = None
    _over: threading.Event = field(default_factory=threading.Event)

    def __call__(self, thread: int, loop: int, part: int) -> None:
        if self._taken is None and loop == self.loop:
            self._thread, self._taken = thread, (loop, part)
            self.was_over = self._over.wait(self.timeout_s)
        elif thread != self._thread and loop == self.until and (loop > self.loop or self._taken == (loop, part)):
            self._over.set()


@contextmanager
def before_parts(call: Callable[[int, int, int], None]) -> Iterator[None]:
    """Call with a thread, a loop and a part of it whenever the thread begins the part."""
    hook = ctypes.c_void_p.in_dll(native.loaded(), "softprompt_before_part")
    kept = _BeforePart(call)
    hook.value = ctypes.cast(kept, ctypes.c_void_p).value
    try:
        yield
    finally:
        hook.value = None


def count_loops(compute: Callable[[], object]) -> int:
    seen: list[int] = []
    with before_parts(lambda _thread, loop, _part: seen.append(loop)):
        compute()
    assert set(seen) == set(range(max(seen) + 1))
    return max(seen) + 1


@pytest.fixture(params=[2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def random(*shape: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> Tensor:
    # Weights of products are kept in bfloat16.
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size).bfloat16().to(dtype)


class Stack:
    """Layers of random weights, all of whose products have LoRAs, and a step of all that there may be in one: a
    prompt, decodes of sequences that begin alike, and one that begins otherwise."""

    def __init__(self, dtype: torch.dtype, prompt_tokens: int, make_tiles: Callable[..., object]) -> None:
        self.dtype, self._seed = dtype, 0
        self._memory = PooledPages(RegionPool(2**16))
        self.layers = DecoderLayers([self._layer() for _ in range(_NUM_LAYERS)])
        lengths = [prompt_tokens, 20, 18, 5]
        counts = [prompt_tokens, 1, 1, 1]
        pages = -(-prompt_tokens // _PAGE_SIZE)
        self.page_table = torch.zeros(4, max(pages, 2), dtype=torch.int32)
        self.page_table[0, :pages] = torch.arange(pages)
        # The first pages of the second and the third sequence are one.
        for sequence, own in enumerate(([0, 1], [0, 2], [3]), start=1):
            self.page_table[sequence, : len(own)] = torch.tensor(own) + pages
        self.num_pages = pages + 4
        rows = sum(counts)
        starts = [length - count for length, count in zip(lengths, counts, strict=True)]
        positions = [
            (sequence, position)
            for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True))
            for position in range(start, length)
        ]
        self.slots = torch.tensor(
            [
                int(self.page_table[sequence, position // _PAGE_SIZE]) * _PAGE_SIZE + position % _PAGE_SIZE
                for sequence, position in positions
            ]
        )
        self.plan = plan_paged_attention(
            self.page_table,
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
            torch.tensor(lengths, dtype=torch.int32),
            page_size=_PAGE_SIZE,
            dtype=dtype,
            has_native=True,
            has_native_chunks=True,
            prefix_lens=(0, 16, 16, 0),
        )
        self.hidden = random(rows, _HIDDEN, dtype=dtype, seed=1)
        self.cos, self.sin = random(2, rows, _DIM, dtype=dtype, seed=2)
        self.loras = LoraStep(make_tiles([(0, -1, 0)[row % 3] for row in range(rows)], rows, "cpu"))
        self.pages: list[tuple[Tensor, Tensor]] = []

    def _layer(self) -> DecoderLayer:
        norm = NormWeights(weight=self._random(_HIDDEN), eps=1e-5, unit_offset=False)
        heads, kv_heads = _HEADS * _DIM, _KV_HEADS * _DIM
        return DecoderLayer(
            norms=(norm, norm),
            qkv=self._linear((heads, kv_heads, kv_heads), _HIDDEN),
            out=self._linear((_HIDDEN,), heads),
            gated=self._linear((_INTERMEDIATE, _INTERMEDIATE), _HIDDEN, gated=True),
            down=self._linear((_HIDDEN,), _INTERMEDIATE),
            activation="silu",
            dtype=self.dtype,
            num_heads=_HEADS,
            num_kv_heads=_KV_HEADS,
            head_dim=_DIM,
            scale=_DIM**-0.5,
            sliding_window=None,
        )

    def _random(self, *shape: int) -> Tensor:
        self._seed += 1
        return random(*shape, dtype=self.dtype, seed=10 + self._seed, size=shape[-1] ** -0.5)

    def _linear(self, widths: tuple[int, ...], size: int, *, gated: bool = False) -> LinearWeights:
        weights = [self._random(width, size) for width in widths]
        loras = PackedLoras(self.dtype)
        loras.prepare(widths, gated=gated, num_slots=1, memory=[self._memory])
        for index, width in enumerate(widths):
            loras.put(0, index, self._random(_RANK, size), self._random(width, _RANK), 0.5)
        packed = native.pack_gated(*weights) if gated else native.pack_linear(torch.cat(weights))
        return LinearWeights(packed=packed, bias=None, columns=widths[0] if gated else sum(widths), loras=loras)

    def compute(self) -> list[Tensor]:
        """The answer, and what the pages hold then."""
        shape = (2 * _NUM_LAYERS, self.num_pages, _PAGE_SIZE, _KV_HEADS, _DIM)
        pages = random(*shape, dtype=self.dtype, seed=3)
        with torch.inference_mode():
            answer = self.layers(
                self.hidden,
                self.cos,
                self.sin,
                list(zip(pages[::2], pages[1::2], strict=True)),
                slots=self.slots,
                page_table=self.page_table,
                plan=self.plan,
                loras=self.loras,
            )
        return [answer, pages]


@pytest.fixture
def stack(
    dtype: torch.dtype, make_tiles: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> Callable[[int], Stack]:
    monkeypatch.setattr(reference, "_MIN_PREFIX", 16)
    return lambda prompt_tokens: Stack(dtype, prompt_tokens, make_tiles)


def assert_same(answer: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(answer, expected, strict=True):
        assert torch.equal(one, other)


def assert_stalls_nobody(compute: Callable[[], list[Tensor]], stall: Stall, expected: list[Tensor]) -> None:
    with before_parts(stall):
        answer = compute()
    assert stall.was_over, f"others waited in loop {stall.loop}"
    assert_same(answer, expected)


def test_a_step_has_loops_of_all_sorts(stack: Callable[[int], Stack]) -> None:
    plan = stack(40).plan
    assert len(plan.prefixes) == 1
    assert len(plan.chunks) == 1
    assert plan.decodes is not None
    assert len(plan.decodes.rows) == 3


def test_a_thread_put_aside_in_any_loop_holds_nobody_up_and_harms_nothing(
    stack: Callable[[int], Stack], threads: int
) -> None:
    step = stack(40)
    torch.set_num_threads(1)
    expected = step.compute()
    torch.set_num_threads(threads)
    num_loops = count_loops(step.compute)
    for loop in range(num_loops):
        assert_stalls_nobody(step.compute, Stall(loop, until=num_loops - 1), expected)


def test_memory_of_a_step_with_many_tokens_is_not_used_anew_while_a_thread_may_write_it(
    stack: Callable[[int], Stack], threads: int
) -> None:
    """So many that there is room for one layer only."""
    step = stack(600)
    expected = step.compute()
    loops_of_a_layer = count_loops(step.compute) // _NUM_LAYERS
    for loop in range(loops_of_a_layer):
        assert_stalls_nobody(step.compute, Stall(loop, until=loops_of_a_layer - 1), expected)
    stall = Stall(0, until=loops_of_a_layer, timeout_s=0.2)
    with before_parts(stall):
        answer = step.compute()
    assert not stall.was_over, "others went on to the next layer"
    assert_same(answer, expected)


@pytest.mark.parametrize("loop", [0, 1])
def test_a_product_alone_waits_for_nobody_either(
    dtype: torch.dtype, make_tiles: Callable[..., object], threads: int, loop: int
) -> None:
    weights, x = random(160, 64, dtype=dtype, seed=1), random(40, 64, dtype=dtype, seed=2)
    loras = PackedLoras(dtype)
    memory = PooledPages(RegionPool(2**16))
    loras.prepare((160,), gated=False, num_slots=1, memory=[memory])
    loras.put(0, 0, random(_RANK, 64, dtype=dtype, seed=3), random(160, _RANK, dtype=dtype, seed=4), 1.0)
    step, packed = LoraStep(make_tiles([0] * 40, 40, "cpu")), native.pack_linear(weights)

    def compute() -> list[Tensor]:
        return [native.linear(x, packed, None, columns=160, loras=loras, step=step)]

    assert_stalls_nobody(compute, Stall(loop, until=1), expected=compute())
