import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from softprompt_kernels import native
from softprompt_kernels.kv_write import kv_write
from softprompt_kernels.lora_expand import lora_expand
from softprompt_kernels.lora_shrink import lora_shrink
from softprompt_kernels.lora_tiles import LoraTiles
from softprompt_kernels.native import library
from softprompt_kernels.paged_attention import Plan, plan_paged_attention, reference
from softprompt_kernels.rmsnorm import add_rms_norm, rms_norm
from softprompt_kernels.rope import rope
from softprompt_kernels.sample import sample
from softprompt_kernels.testing import AWKWARD_SIZES, assert_close, poisoned

from tests.kernels import test_lora_expand, test_lora_shrink, test_rmsnorm, test_rope
from tests.kernels.test_paged_attention import MIXED, OPTIONS, Case, make_case, plain_answer, run_reference

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_decodes_and_chunks_together(native_kernels: None, options: dict[str, object], dtype: torch.dtype) -> None:
    case = make_case(MIXED, dtype=dtype)
    assert_close(run_reference(case, scale=0.2, **options), plain_answer(case, scale=0.2, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("most", [0, 64, 2**20])
def test_chunks_by_torch_or_query_by_query(
    native_kernels: None,
    options: dict[str, object],
    dtype: torch.dtype,
    most: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "supports_chunks", lambda _: False)
    monkeypatch.setattr(reference, "_MAX_ONE_BY_ONE", most)
    case = make_case([(9, 30), (1, 33), (5, 12), (2, 2)], dtype=dtype)
    assert_close(run_reference(case, scale=0.2, **options), plain_answer(case, scale=0.2, **options))


def test_queries_that_are_answered_one_by_one_see_what_was_before_them() -> None:
    plan = plan_paged_attention(
        torch.zeros(3, 300, dtype=torch.int32),
        torch.tensor([0, 3, 4, 84], dtype=torch.int32),
        torch.tensor([10, 7, 103], dtype=torch.int32),
        page_size=1,
        dtype=torch.float32,
        has_native=True,
    )
    assert plan.decodes is not None
    assert plan.decodes.rows.tolist() == [0, 1, 2, 3]
    assert plan.decodes.sequences.tolist() == [0, 0, 0, 1]
    assert plan.decodes.ends.tolist() == [8, 9, 10, 7]
    [group] = plan.groups  # 80 queries of 103 positions are too many
    assert group.rows.tolist() == list(range(4, 84))


@pytest.mark.parametrize("context", [*AWKWARD_SIZES, 1000])
@pytest.mark.parametrize("page_size", [1, 5, 16])
def test_contexts_around_pages_and_tiles(native_kernels: None, context: int, page_size: int) -> None:
    case = make_case([(1, context), (1, 2)], page_size=page_size)
    assert_close(run_reference(case, scale=0.25), plain_answer(case, scale=0.25))


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (9, 3), (6, 1), (20, 1)])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 96, 128, 256])
def test_heads_of_any_size_in_groups_of_any_size(
    native_kernels: None, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    case = make_case([(1, 40), (1, 3)], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert_close(run_reference(case, scale=0.1), plain_answer(case, scale=0.1))


def _needs_chunks(dtype: torch.dtype) -> None:
    if not native.supports_chunks(torch.zeros(1, 16, 1, 32, dtype=dtype)):
        pytest.skip(f"this processor has no attention of several queries in {dtype}")


CHUNKS = [(1, 5), (5, 5), (3, 40), (64, 64), (33, 200), (70, 131), (2, 18), (16, 90)]


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 2), (9, 3), (6, 1), (15, 1)])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 256])
@pytest.mark.parametrize("sliding_window", [None, 1, 7, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_of_any_size(
    native_kernels: None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    sliding_window: int | None,
    dtype: torch.dtype,
) -> None:
    case = make_case(
        CHUNKS,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        page_size=5,
    )
    _needs_chunks(dtype)
    options = {"scale": head_dim**-0.5, "sliding_window": sliding_window}
    assert_close(run_reference(case, **options), plain_answer(case, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_on_several_threads_answer_as_on_one(native_kernels: None, dtype: torch.dtype) -> None:
    case = make_case([(100, 300)], num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype)
    _needs_chunks(dtype)
    answers = []
    threads = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        try:
            answers.append(run_reference(case, scale=0.125))
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(*answers)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_any_size_and_nan_in_chunks(native_kernels: None, dtype: torch.dtype) -> None:
    case = make_case([(4, 30)], dtype=dtype)
    _needs_chunks(dtype)
    case.q[0] *= 1e4
    case.q[1] *= -1e4
    case.q[2] = float("nan")
    out = run_reference(case, scale=1.0)
    kept = [0, 1, 3]
    assert_close(out[kept], plain_answer(case, scale=1.0)[kept])
    assert out[2].isnan().all()


def test_what_chunks_of_our_own_cannot_do_is_left_to_torch(native_kernels: None) -> None:
    for head_dim, dtype in ((24, torch.bfloat16), (24, torch.float32)):
        case = make_case([(5, 40)], head_dim=head_dim, dtype=dtype)
        assert not native.supports_chunks(case.keys)
        assert_close(run_reference(case, scale=0.2), plain_answer(case, scale=0.2))


def test_queries_may_lie_heads_first(native_kernels: None) -> None:
    case = make_case([(1, 20), (1, 7), (1, 33)])
    strided = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    expected = run_reference(case, scale=0.2)
    case = make_case([(1, 20), (1, 7), (1, 33)])
    object.__setattr__(case, "q", strided)
    assert not strided.is_contiguous()
    torch.testing.assert_close(run_reference(case, scale=0.2), expected, rtol=0, atol=0)


def test_many_sequences_on_several_threads_answer_as_alone(native_kernels: None) -> None:
    lengths = [(1, 30 + 7 * i) for i in range(64)]
    case = make_case(lengths, head_dim=64)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = run_reference(case, scale=0.125)
    finally:
        torch.set_num_threads(threads)
    for i in (0, 31, 63):
        alone = make_case(lengths, head_dim=64)
        object.__setattr__(alone, "q", case.q[i : i + 1])
        object.__setattr__(alone, "page_table", case.page_table[i : i + 1])
        object.__setattr__(alone, "context_lens", case.context_lens[i : i + 1])
        object.__setattr__(alone, "query_start", torch.tensor([0, 1], dtype=torch.int32))
        torch.testing.assert_close(run_reference(alone, scale=0.125)[0], together[i], rtol=0, atol=0)


def test_scores_of_any_size_and_nan(native_kernels: None) -> None:
    case = make_case([(1, 30), (1, 30), (1, 30)])
    case.q[0] *= 1e4
    case.q[1] *= -1e4
    case.q[2] = float("nan")
    out = run_reference(case, scale=1.0)
    assert_close(out[:2], plain_answer(case, scale=1.0)[:2])
    assert out[2].isnan().all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
def test_keys_and_values_go_to_their_slots(native_kernels: None, dtype: torch.dtype) -> None:
    keys, values = (poisoned(4, 4, 2, 8, dtype=dtype) for _ in range(2))
    merged = torch.randn(3, 48).to(dtype)
    k, v = merged[:, 8:24].view(3, 2, 8), merged[:, 32:].view(3, 2, 8)
    kv_write(keys, values, k, v, torch.tensor([13, 2, 7]))
    for pages, new in ((keys, k), (values, v)):
        flat = pages.flatten(0, 1)
        assert torch.equal(flat[[13, 2, 7]], new)
        assert int(flat.isnan().all(-1).all(-1).sum()) == 13


def test_half_precision_and_huge_heads_are_left_to_torch(native_kernels: None) -> None:
    case = make_case(MIXED, dtype=torch.float16)
    assert not native.supports(case.keys)
    assert_close(run_reference(case, scale=0.2), plain_answer(case, scale=0.2))
    assert not native.supports(torch.zeros(1, 16, 1, native.MAX_HEAD_DIM + 8))
    x, weight = torch.randn(3, 8).half(), torch.randn(8).half()
    assert_close(rms_norm(x, weight, eps=1e-5), test_rmsnorm.plain_answer(x, weight))
    q, cos = torch.randn(2, 1, native.MAX_HEAD_DIM + 8), torch.randn(2, native.MAX_HEAD_DIM + 8)
    assert_close(rope(q, q, cos, cos)[0], test_rope.plain_answer(q, cos, cos))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 576])
def test_rows_are_normed(native_kernels: None, size: int, unit_offset: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 7, size, generator=generator).to(dtype)
    weight = torch.randn(size, generator=generator).to(dtype)
    out = rms_norm(x, weight, eps=1e-5, unit_offset=unit_offset)
    assert_close(out, test_rmsnorm.plain_answer(x, weight, unit_offset=unit_offset))
    out, h = add_rms_norm(x, residual, weight, eps=1e-5, unit_offset=unit_offset)
    assert torch.equal(h, x + residual)
    assert_close(out, test_rmsnorm.plain_answer(x + residual, weight, unit_offset=unit_offset))


def test_rows_are_normed_where_they_lie(native_kernels: None) -> None:
    merged, weight = torch.randn(1, 5, 100), torch.randn(16)
    heads = merged[..., 10:58].view(1, 5, 3, 16)
    out = rms_norm(heads, weight, eps=1e-5)
    assert out.is_contiguous()
    assert_close(out, test_rmsnorm.plain_answer(heads, weight))
    strided, residual = torch.randn(4, 30)[:, :16], torch.randn(2, 4, 50)[1, :, 5:21]
    out, h = add_rms_norm(strided, residual, weight, eps=1e-5)
    assert torch.equal(h, strided + residual)
    assert_close(out, test_rmsnorm.plain_answer(h, weight))
    assert rms_norm(torch.zeros(1, 0, 16), weight, eps=1e-5).shape == (1, 0, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (9, 3), (71, 1)])
@pytest.mark.parametrize("head_dim", [2, 64, 80, 256])
@pytest.mark.parametrize("num_tokens", [0, 1, 17])
def test_queries_and_keys_are_turned(
    native_kernels: None, num_tokens: int, head_dim: int, num_heads: int, num_kv_heads: int, dtype: torch.dtype
) -> None:
    merged = torch.randn(num_tokens, (num_heads + num_kv_heads) * head_dim).to(dtype)
    before = merged.clone()
    q, k = (
        part.unflatten(1, (-1, head_dim))
        for part in merged.split([num_heads * head_dim, num_kv_heads * head_dim], 1)
    )
    cos, sin = torch.randn(2, num_tokens, head_dim)  # float32 tables, halves that differ
    for actual, x in zip(rope(q, k, cos, sin), (q, k), strict=True):
        assert actual.is_contiguous()
        assert_close(actual, test_rope.plain_answer(x, cos, sin))
    assert torch.equal(merged, before)


def test_norms_and_rotation_on_several_threads_answer_as_on_one(native_kernels: None) -> None:
    x, weight = torch.randn(600, 576), torch.randn(576)
    q, k, (cos, sin) = torch.randn(600, 9, 64), torch.randn(600, 3, 64), torch.randn(2, 600, 64)
    threads = torch.get_num_threads()
    answers = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            answers.append((rms_norm(x, weight, eps=1e-5), *rope(q, k, cos, sin)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*answers, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", test_lora_shrink.POPULARITIES)
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 3), (17, 48), (65, 100)])
def test_tokens_meet_the_first_matrix_of_their_lora(
    native_kernels: None,
    num_tokens: int,
    size: int,
    popularity: str,
    dtype: torch.dtype,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = popular_slots(popularity, num_tokens)
    merged = torch.randn(num_tokens, size + 9, generator=generator).to(dtype)
    x, tiles = merged[:, 5 : 5 + size], make_tiles(slots, 16, "cpu")
    a, scales, ranks = test_lora_shrink.weights(size, torch.float32, generator)
    assert native.supports_lora(x, a)
    h = lora_shrink(x, a, scales, ranks, tiles)
    test_lora_shrink.check(h, x, a, scales, slots, tiles.order.tolist())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("popularity", test_lora_shrink.POPULARITIES)
@pytest.mark.parametrize("starts", [(0, 1), (0, 48, 64, 73), (0, 100, 130, 131)])
def test_tokens_get_what_the_second_matrix_of_their_lora_adds(
    native_kernels: None,
    starts: tuple[int, ...],
    popularity: str,
    dtype: torch.dtype,
    popular_slots: Callable[[str, int], list[int]],
    make_tiles: Callable[..., LoraTiles],
) -> None:
    slots = popular_slots(popularity, 33)
    tiles = make_tiles(slots, 16, "cpu")
    out, h, b = test_lora_expand.inputs(starts, slots, tiles.order.tolist(), torch.float32)
    merged = torch.randn(33, starts[-1] + 7).to(dtype)
    written = merged[:, 3 : 3 + starts[-1]]
    written.copy_(out)
    around, before = merged[:, :3].clone(), written.clone()
    ranks = torch.tensor(test_lora_expand.RANKS, dtype=torch.int32)[:, : len(starts) - 1].contiguous()
    lora_expand(written, h, b, ranks, torch.tensor(starts, dtype=torch.int32), tiles)
    assert_close(written, test_lora_expand.plain_answer(before, h, b, starts, slots, tiles.order.tolist()))
    assert torch.equal(merged[:, :3], around)
    others = [token for token, slot in enumerate(slots) if slot < 0]
    assert torch.equal(written[others], before[others])


@pytest.mark.parametrize("max_rank", [5, 24])
def test_loras_whose_rows_do_not_fill_registers(
    native_kernels: None, max_rank: int, make_tiles: Callable[..., LoraTiles]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, a = torch.randn(3, 20, generator=generator), torch.randn(1, 1, max_rank, 20, generator=generator)
    b, tiles = torch.randn(1, 37, max_rank, generator=generator), make_tiles([0, -1, 0], 16, "cpu")
    scales, ranks = torch.full((1, 1), 0.5), torch.full((1, 1), max_rank, dtype=torch.int32)
    out = torch.zeros(3, 37)
    h = lora_shrink(x, a, scales, ranks, tiles)
    lora_expand(out, h, b, ranks, torch.tensor([0, 37], dtype=torch.int32), tiles)
    expected = (x.double() @ a[0, 0].double().T * 0.5) @ b[0].double().T
    expected[1] = 0
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


def test_a_token_gets_the_same_of_its_lora_in_any_batch_and_on_any_threads(
    native_kernels: None, make_tiles: Callable[..., LoraTiles]
) -> None:
    generator = torch.Generator().manual_seed(0)
    slots = [(token % 6) - 1 for token in range(64)]
    x = torch.randn(64, 300, generator=generator)
    a, scales, ranks = test_lora_shrink.weights(300, torch.float32, generator)
    b = torch.randn(6, 90, 64, generator=generator)
    starts = torch.tensor([0, 70, 90], dtype=torch.int32)

    def compute(first: int, last: int) -> torch.Tensor:
        out, tiles = torch.zeros(last - first, 90), make_tiles(slots[first:last], 64, "cpu")
        lora_expand(out, lora_shrink(x[first:last], a, scales, ranks, tiles), b, ranks, starts, tiles)
        return out

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = compute(0, 64)
        torch.set_num_threads(2)
        assert torch.equal(compute(0, 64), together)
    finally:
        torch.set_num_threads(threads)
    for first, last in ((0, 1), (5, 30), (63, 64)):
        assert torch.equal(compute(first, last), together[first:last])


@pytest.fixture
def cache(tmp_path: Path, compiled_kernels: object, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for libraries of one small source: what is kept where does not depend on how much is compiled."""
    source = tmp_path / "ops.c"
    source.write_text("int one(void) { return 1; }")
    monkeypatch.setattr(library, "_SOURCES", [source])
    return tmp_path / "cache"


def test_a_library_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load(cache)
    [made] = cache.iterdir()
    monkeypatch.setattr(library, "_compile", None)
    assert library.load(cache).one() == 1
    assert [*cache.iterdir()] == [made]


def test_a_damaged_library_is_made_anew(cache: Path) -> None:
    library.load(cache)
    [made] = cache.iterdir()
    made.unlink()  # not written over: it is in use
    made.write_bytes(b"")
    assert library.load(cache).one() == 1


def test_a_compiler_may_have_arguments_and_say_anything(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\nprintf '\\351' >&2\nexec {shutil.which('cc')} \"$@\"\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -O1")
    assert library.load(cache).one() == 1


def test_another_processor_gets_a_library_of_its_own(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library.load(cache)
    monkeypatch.setattr(library, "_processor", lambda: b"flags: another")
    library.load(cache)
    assert len([*cache.iterdir()]) == 2


@pytest.mark.parametrize("exists", [False, True])
def test_without_a_working_compiler_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        monkeypatch.setenv("CC", "false")
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.CannotCompile, match="false failed" if exists else "no C compiler"):
        native.load(tmp_path / "cache")
    assert not native.is_loaded()


def test_a_compiler_that_fails_on_the_source_leaves_nothing_behind(cache: Path) -> None:
    [source] = library._SOURCES
    source.write_text("int nothing(void) { return }")
    with pytest.raises(native.CannotCompile, match="error"):
        native.load(cache)
    assert [*cache.iterdir()] == []


def _needs_linear() -> None:
    if not native.supports_linear(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this processor does not multiply pairs of bfloat16")


ACTIVATIONS = {"identity": lambda x: x, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.mark.parametrize("rows", [*range(1, 14), 16, 17, 24, 25, 32, 33, 130])
@pytest.mark.parametrize(("columns", "size"), [(16, 2), (40, 62), (32, 64), (100, 576)])
def test_products_of_any_size(native_kernels: None, rows: int, columns: int, size: int) -> None:
    _needs_linear()
    x, weight, bias = _bfloat16(rows, size), _bfloat16(columns, size), _bfloat16(columns)
    packed = native.pack_linear(weight)
    expected = x.float() @ weight.float().T
    assert_close(native.linear(x, packed, None, columns=columns), expected.bfloat16())
    out = native.linear(x, packed, native.pack_bias(bias), columns=columns)
    assert_close(out, (expected + bias.float()).bfloat16())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [16, 24, 100])
def test_activations_and_gates_in_the_same_pass(native_kernels: None, columns: int, activation: str) -> None:
    _needs_linear()
    x, gate, up = _bfloat16(5, 64), _bfloat16(columns, 64), _bfloat16(columns, 64)
    biases = _bfloat16(2, columns)
    function = ACTIVATIONS[activation]
    left, right = (x.float() @ weight.float().T + bias for weight, bias in zip((gate, up), biases, strict=True))
    out = native.linear(
        x, native.pack_linear(gate), native.pack_bias(biases[0]), columns=columns, activation=activation
    )
    assert_close(out, function(left).bfloat16())
    out = native.linear(
        x,
        native.pack_gated(gate, up),
        native.pack_gated_bias(*biases),
        columns=columns,
        activation=activation,
        gated=True,
    )
    assert_close(out, (function(left) * right).bfloat16())


def test_activations_far_from_zero(native_kernels: None) -> None:
    _needs_linear()
    x = torch.tensor([[-3e38, 0], [-1e3, 0], [-90, 0], [90, 0], [1e3, 0], [float("nan"), 0]]).bfloat16()
    packed = native.pack_linear(torch.ones(16, 2).bfloat16())
    for activation in ("silu", "gelu_tanh"):
        out = native.linear(x, packed, None, columns=16, activation=activation)
        expected = ACTIVATIONS[activation](x[:, :1].float()).bfloat16().expand(-1, 16)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-36, equal_nan=True)


def test_a_row_has_the_same_product_in_any_batch(native_kernels: None) -> None:
    _needs_linear()
    x, packed = _bfloat16(40, 576), native.pack_linear(_bfloat16(96, 576))
    together = native.linear(x, packed, None, columns=96)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(native.linear(x, packed, None, columns=96), together)
    finally:
        torch.set_num_threads(threads)
    for count in (1, 5, 17):
        assert torch.equal(native.linear(x[7 : 7 + count], packed, None, columns=96), together[7 : 7 + count])


def test_products_of_rows_where_they_lie(native_kernels: None) -> None:
    _needs_linear()
    merged, weight = _bfloat16(1, 9, 100), _bfloat16(48, 64)
    packed = native.pack_linear(weight)
    for x in (merged[..., 20:84], merged.transpose(1, 2)[:, :64, :].transpose(1, 2), merged[0, 3, 4:68]):
        assert_close(native.linear(x, packed, None, columns=48), F.linear(x.float(), weight.float()).bfloat16())


def test_weights_that_cannot_be_packed_are_known(native_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not native.supports_linear(torch.zeros(4, 4))
    assert not native.supports_linear(torch.zeros(4, 3, dtype=torch.bfloat16))
    monkeypatch.setattr(native, "_library", None)
    assert not native.supports_linear(torch.zeros(4, 4, dtype=torch.bfloat16))


def _bfloat16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, 511, 512, 513, 5000])
def test_the_first_of_the_largest_of_each_row(native_kernels: None, size: int, dtype: torch.dtype) -> None:
    wide = poisoned(40, size + 6, dtype=dtype)
    x = wide[:, 3 : 3 + size].copy_(torch.randn(40, size, generator=torch.Generator().manual_seed(size)).to(dtype))
    assert torch.equal(native.argmax(x), x.float().argmax(-1))
    x[:, size // 2] = x[:, -1] = 9.0
    assert native.argmax(x).tolist() == [min(size // 2, size - 1)] * 40
    x[0], x[1, 0], x[2, -1], x[3, size // 2] = -torch.inf, torch.inf, torch.nan, -torch.inf
    expected = [-1, -1, -1, size - 1 if size > 1 else -1]
    assert native.argmax(x[:4]).tolist() == expected
    assert native.argmax(x[:0]).tolist() == []


def test_greedy_tokens_are_those_of_torch(native_kernels: None) -> None:
    logits = torch.randn(7, 3000, generator=torch.Generator().manual_seed(0)).bfloat16()
    logits[3, 5] = torch.nan
    numbers = torch.zeros(7, dtype=torch.float64)
    ranks = torch.zeros(7, dtype=torch.int64)
    columns = {"top_k": ranks, "top_p": numbers + 1, "min_p": numbers, "points": numbers}
    tokens = sample(logits, temperature=numbers, **columns)
    native.unload()
    assert torch.equal(tokens, sample(logits, temperature=numbers, **columns))


@pytest.fixture(params=DTYPES, ids=str)
def dtype_of_chunks(
    native_kernels: None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> torch.dtype:
    """Native kernels in it compute several queries together, and beginnings from 64 positions on."""
    monkeypatch.setattr(reference, "_MIN_PREFIX", 64)
    dtype: torch.dtype = request.param
    _needs_chunks(dtype)
    return dtype


def shared_case(lengths: list[int], prefix_len: int, **options: Any) -> Case:
    """Decodes of which all begin in the pages of the first."""
    case = make_case([(1, length) for length in lengths], **options)
    num_pages = prefix_len // case.keys.shape[1]
    case.page_table[:, :num_pages] = case.page_table[0, :num_pages].clone()
    return case


def native_plan(case: Case, **known: Any) -> Plan:
    return plan_paged_attention(
        case.page_table,
        case.query_start,
        case.context_lens,
        page_size=case.keys.shape[1],
        dtype=case.q.dtype,
        has_native=native.supports(case.keys),
        has_native_chunks=native.supports_chunks(case.keys),
        **known,
    )


def run_with_prefixes(case: Case, prefix_lens: list[int]) -> torch.Tensor:
    plan = native_plan(case, prefix_lens=prefix_lens)
    assert bool(plan.prefixes) == any(length >= 64 for length in prefix_lens)
    return run_reference(case, scale=0.2, plan=plan)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 32), (2, 2, 128), (5, 1, 96)]
)
@pytest.mark.parametrize("prefix_len", [64, 80, 512])
def test_beginnings_in_common_are_answered_for_once(
    dtype_of_chunks: torch.dtype, prefix_len: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    lengths = [prefix_len + more for more in (1, 2, 15, 16, 17, 40)] * 3
    shape = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    case = shared_case(lengths, prefix_len, dtype=dtype_of_chunks, **shape)
    answer = run_with_prefixes(case, [prefix_len] * len(lengths))
    assert_close(answer, plain_answer(case, scale=0.2))


def test_an_answer_does_not_depend_on_who_has_the_same_beginning(dtype_of_chunks: torch.dtype) -> None:
    case = shared_case(
        [100, 90, 130, 97, 300, 81], 80, num_heads=9, num_kv_heads=3, head_dim=64, dtype=dtype_of_chunks
    )
    together = run_with_prefixes(case, [80, 80, 80, 80, 0, 80])
    for row in range(6):
        alone = replace(
            case,
            q=case.q[row : row + 1],
            page_table=case.page_table[row : row + 1],
            query_start=torch.tensor([0, 1], dtype=torch.int32),
            context_lens=case.context_lens[row : row + 1],
        )
        assert torch.equal(run_with_prefixes(alone, [0 if row == 4 else 80]), together[row : row + 1])


def test_beginnings_of_several_sorts_stand_in_one_step(dtype_of_chunks: torch.dtype) -> None:
    case = make_case([(1, 200), (3, 90), (1, 200), (1, 30), (1, 65), (1, 64)], dtype=dtype_of_chunks)
    case.page_table[2, :8] = case.page_table[0, :8].clone()
    assert_close(run_with_prefixes(case, [130, 70, 130, 0, 64, 64]), plain_answer(case, scale=0.2))


def test_a_prompts_last_piece_of_one_query_is_answered_as_within_a_longer_one(
    dtype_of_chunks: torch.dtype,
) -> None:
    whole = make_case([(20, 65), (30, 300)], dtype=dtype_of_chunks, num_heads=9, num_kv_heads=3, head_dim=64)
    last = replace(whole, q=whole.q[[19, 49]], query_start=torch.tensor([0, 1, 2], dtype=torch.int32))

    def answer(case: Case) -> torch.Tensor:
        return run_reference(case, scale=0.2, plan=native_plan(case, in_prompt=[True, True]))

    assert torch.equal(answer(last), answer(whole)[[19, 49]])
