import math
from dataclasses import dataclass

import pytest
import torch
from softprompt_kernels.paged_attention import paged_attention, plan_paged_attention
from softprompt_kernels.testing import AWKWARD_SIZES, DTYPES, assert_close, poisoned
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Inputs whose pages lie scattered in memory, with NaN wherever no key has been written."""

    q: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    query_start: Tensor
    context_lens: Tensor


def make_case(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Sequences of (queries, context length)."""
    generator = torch.Generator().manual_seed(0)
    pages_each = [math.ceil(context / page_size) for _, context in lengths]
    scattered = torch.randperm(sum(pages_each) + 3, generator=generator).tolist()
    keys = poisoned(len(scattered), page_size, num_kv_heads, head_dim, dtype=dtype)
    values = keys.clone()
    page_table = torch.zeros(len(lengths), max(pages_each), dtype=torch.int32)
    for i, (_, context) in enumerate(lengths):
        pages = [scattered.pop() for _ in range(pages_each[i])]
        page_table[i, : len(pages)] = torch.tensor(pages)
        for position in range(context):
            page, offset = pages[position // page_size], position % page_size
            keys[page, offset] = torch.randn(num_kv_heads, head_dim, generator=generator)
            values[page, offset] = torch.randn(num_kv_heads, head_dim, generator=generator)
    num_queries = [queries for queries, _ in lengths]
    return Case(
        q=torch.randn(sum(num_queries), num_heads, head_dim, generator=generator).to(dtype),
        keys=keys,
        values=values,
        page_table=page_table,
        query_start=torch.tensor([0, *num_queries]).cumsum(0).int(),
        context_lens=torch.tensor([context for _, context in lengths], dtype=torch.int32),
    )


def plain_answer(
    case: Case,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The docstring's semantics, a query and a head at a time, in float64."""
    out = torch.zeros(case.q.shape, dtype=torch.float64)
    group = case.q.shape[1] // case.keys.shape[2]
    for i, context in enumerate(case.context_lens.tolist()):
        first, end = case.query_start[i : i + 2].tolist()
        k, v = (pages[case.page_table[i].long()].flatten(0, 1).double() for pages in (case.keys, case.values))
        for row in range(first, end):
            position = context - (end - row)
            begin = 0 if sliding_window is None else max(0, position - sliding_window + 1)
            for head in range(case.q.shape[1]):
                seen = slice(begin, position + 1)
                scores = scale * k[seen, head // group] @ case.q[row, head].double()
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                if sinks is not None:
                    scores = torch.cat([scores, sinks[head : head + 1].double()])
                weights = torch.softmax(scores, 0)[: position + 1 - begin]
                out[row, head] = weights @ v[seen, head // group]
    return out


def run_reference(case: Case, **options: object) -> Tensor:
    return paged_attention(
        case.q, case.keys, case.values, case.page_table, case.query_start, case.context_lens, **options
    )


def run_kernel(case: Case, device: str, **options: object) -> Tensor:
    from softprompt_kernels.paged_attention.kernel import paged_attention as kernel

    if isinstance(options.get("sinks"), Tensor):
        options["sinks"] = options["sinks"].to(device)
    tensors = (case.q, case.keys, case.values, case.page_table, case.query_start, case.context_lens)
    return kernel(*(tensor.to(device) for tensor in tensors), **options).cpu()


MIXED = [(1, 1), (1, 16), (1, 17), (5, 5), (3, 40), (1, 33), (16, 16), (2, 18)]
SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 7},
    "window_of_one": {"sliding_window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": SINKS},
    "all": {"sliding_window": 20, "softcap": 1.5, "sinks": SINKS},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_reference_answers_decodes_and_chunks_together(options: dict[str, object]) -> None:
    case = make_case(MIXED)
    assert_close(run_reference(case, scale=0.2, **options), plain_answer(case, scale=0.2, **options))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_kernel_answers_decodes_and_chunks_together(options: dict[str, object], device: str) -> None:
    case = make_case(MIXED)
    assert_close(run_kernel(case, device, scale=0.2, **options), plain_answer(case, scale=0.2, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_is_within_tolerance_in_every_dtype(dtype: torch.dtype) -> None:
    case = make_case(MIXED, dtype=dtype)
    assert_close(run_reference(case, scale=0.2), plain_answer(case, scale=0.2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_is_within_tolerance_in_every_dtype(dtype: torch.dtype, device: str) -> None:
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    case = make_case(MIXED, dtype=dtype)
    assert_close(run_kernel(case, device, scale=0.2), plain_answer(case, scale=0.2))


@pytest.mark.parametrize("context", AWKWARD_SIZES)
@pytest.mark.parametrize("queries", [1, 2, 63])
def test_reference_and_kernel_agree_around_pages_and_tiles(queries: int, context: int, device: str) -> None:
    case = make_case([(min(queries, context), context), (1, 2)], num_heads=2, num_kv_heads=1, head_dim=16)
    expected = plain_answer(case, scale=0.25)
    assert_close(run_reference(case, scale=0.25), expected)
    assert_close(run_kernel(case, device, scale=0.25), expected)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (9, 3), (6, 1), (20, 1)])
@pytest.mark.parametrize("head_dim", [8, 24, 80])
def test_heads_may_share_keys_in_groups_of_any_size(
    num_heads: int, num_kv_heads: int, head_dim: int, device: str
) -> None:
    case = make_case([(4, 21), (1, 7)], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    expected = plain_answer(case, scale=0.1)
    assert_close(run_reference(case, scale=0.1), expected)
    assert_close(run_kernel(case, device, scale=0.1), expected)


@pytest.mark.parametrize("page_size", [1, 4, 24])
def test_pages_may_have_any_size(page_size: int, device: str) -> None:
    case = make_case([(3, 25), (1, 50)], page_size=page_size)
    expected = plain_answer(case, scale=0.2, sliding_window=9)
    assert_close(run_reference(case, scale=0.2, sliding_window=9), expected)
    assert_close(run_kernel(case, device, scale=0.2, sliding_window=9), expected)


LONG = [(1, 1), (1, 64), (1, 65), (1, 200), (1, 300), (1, 17)]


# Each program looks at the same options, whatever number of others there are.
@pytest.mark.parametrize(
    ("options", "num_splits"),
    [*((name, 2) for name in OPTIONS), *((name, 4) for name in ("window", "sinks")), ("plain", 16), ("all", 16)],
)
def test_contexts_may_be_split_among_programs(options: str, num_splits: int, device: str) -> None:
    case = make_case(LONG)
    expected = plain_answer(case, scale=0.2, **OPTIONS[options])
    assert_close(run_kernel(case, device, scale=0.2, num_splits=num_splits, **OPTIONS[options]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_split_contexts_of_decodes_and_chunks_are_within_tolerance(dtype: torch.dtype, device: str) -> None:
    # More queries than one program takes, which has 64 rows for the three heads that share keys.
    case = make_case([(1, 130), (5, 150), (24, 140)], num_heads=6, num_kv_heads=2, head_dim=24, dtype=dtype)
    assert_close(run_kernel(case, device, scale=0.2, num_splits=4), plain_answer(case, scale=0.2))


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in Triton's interpreter
def test_what_is_not_a_number_in_one_split_reaches_the_answer_of_its_sequence_alone(device: str) -> None:
    case = make_case([(1, 200), (1, 200)])
    expected = plain_answer(case, scale=0.2)
    for pages in (case.keys, case.values):
        pages[case.page_table[0, 5].long()] = float("nan")
    answer = run_kernel(case, device, scale=0.2, num_splits=4)
    assert answer[0].isnan().all()
    assert_close(answer[1:], expected[1:])


@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize("num_processors", [1, 8, 100], ids="{} processors".format)
def test_decodes_are_right_whatever_tiles_are_chosen_for_them(
    num_processors: int, head_dim: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = pytest.importorskip("softprompt_kernels.paged_attention.kernel")
    monkeypatch.setattr(kernel, "num_processors", lambda _: num_processors)
    case = make_case(LONG, head_dim=head_dim, dtype=torch.float16)
    assert_close(run_kernel(case, device, scale=0.1), plain_answer(case, scale=0.1))


def test_strided_queries_are_read_and_written_rightly(device: str) -> None:
    case = make_case([(6, 20)])
    transposed = case.q.transpose(0, 1).contiguous().transpose(0, 1)
    strided = Case(
        q=transposed,
        keys=case.keys,
        values=case.values,
        page_table=case.page_table,
        query_start=case.query_start,
        context_lens=case.context_lens,
    )
    assert not transposed.is_contiguous()
    expected = plain_answer(case, scale=0.2)
    assert_close(run_reference(strided, scale=0.2), expected)
    assert_close(run_kernel(strided, device, scale=0.2), expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in Triton's interpreter
def test_a_sequence_that_is_not_a_number_leaves_the_others_alone(device: str) -> None:
    case = make_case([(1, 20), (1, 20), (4, 30)])
    expected = plain_answer(case, scale=0.2)
    for pages in (case.keys, case.values):
        pages[case.page_table[0].long()] = float("nan")
    for answer in (run_reference(case, scale=0.2), run_kernel(case, device, scale=0.2)):
        assert answer[0].isnan().all()
        assert_close(answer[1:], expected[1:])


def test_a_plan_serves_every_layer_of_its_step() -> None:
    first = make_case(MIXED)
    second = Case(
        q=first.q * 2,
        keys=first.keys.flip(2),
        values=first.values.flip(2),
        page_table=first.page_table,
        query_start=first.query_start,
        context_lens=first.context_lens,
    )
    plan = plan_paged_attention(
        first.page_table, first.query_start, first.context_lens, page_size=16, dtype=torch.float32
    )
    for case in (first, second):
        assert_close(run_reference(case, scale=0.2, plan=plan), plain_answer(case, scale=0.2))


def test_decodes_of_like_length_are_answered_together() -> None:
    case = make_case([(1, 100 + i) for i in range(8)] + [(1, 1)])
    plan = plan_paged_attention(
        case.page_table, case.query_start, case.context_lens, page_size=16, dtype=torch.float32
    )
    assert [group.mask.shape[0] for group in plan.groups] == [8, 1]


def test_a_window_gathers_only_the_pages_it_reaches() -> None:
    case = make_case([(1, 160)])
    plan = plan_paged_attention(
        case.page_table, case.query_start, case.context_lens, page_size=16, dtype=torch.float32, sliding_window=16
    )
    assert plan.groups[0].pages.tolist() == case.page_table[0, 9:].tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 32)}, "share"),
        ({"q": torch.zeros(2, 4, 16)}, "do not fit"),
        ({"q": torch.zeros(2, 4, 32, dtype=torch.bfloat16)}, "must be the same"),
        ({"q": torch.zeros(2, 32, 4).transpose(1, 2)}, "dense"),
        ({"page_table": torch.zeros(1, 2, dtype=torch.int64)}, "int32"),
        ({"context_lens": torch.zeros(2, dtype=torch.int32)}, "number of sequences"),
        ({"sinks": torch.zeros(3)}, "sinks"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Tensor] = {
        "q": torch.zeros(2, 4, 32),
        "keys": torch.zeros(3, 16, 2, 32),
        "values": torch.zeros(3, 16, 2, 32),
        "page_table": torch.zeros(1, 2, dtype=torch.int32),
        "query_start": torch.tensor([0, 2], dtype=torch.int32),
        "context_lens": torch.tensor([2], dtype=torch.int32),
    }
    with pytest.raises(ValueError, match=message):
        paged_attention(**{**arguments, **change}, scale=1.0)
