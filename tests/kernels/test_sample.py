import math

import pytest
import torch
from softprompt_kernels.sample import NO_TOKEN, reference, sample
from softprompt_kernels.testing import DTYPES, poisoned
from torch import Tensor


def chosen(
    implementation: str,
    device: str,
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    points: float | Tensor = 0.5,
    allowed: Tensor | None = None,
) -> list[int]:
    columns = {
        name: torch.as_tensor(values, dtype=dtype).expand(len(logits)).contiguous().to(device)
        for name, values, dtype in (
            ("temperature", temperature, torch.float64),
            ("top_k", top_k, torch.int64),
            ("top_p", top_p, torch.float64),
            ("min_p", min_p, torch.float64),
            ("points", points, torch.float64),
        )
    }
    operation = sample
    if implementation == "kernel":
        from softprompt_kernels.sample.kernel import sample as operation
    tokens = operation(logits.to(device), **columns, allowed=None if allowed is None else allowed.to(device))
    assert tokens.dtype == torch.int64
    return tokens.tolist()


def plain_answer(row: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, point: float) -> int:
    """The docstring's semantics for one row, a token at a time, in float64."""
    logits = row.tolist()
    order = sorted(range(len(logits)), key=lambda token: -logits[token])
    if temperature == 0:
        return order[0]
    top = logits[order[0]]
    weights = [math.exp((x - top) / temperature) for x in logits]
    weights = [weight if weight >= min_p else 0.0 for weight in weights]
    best = order[: top_k or len(order)]
    total = sum(weights[token] for token in best)
    before, least = 0.0, top
    for token in best:
        if top_p < 1 and before >= top_p * total:
            break
        before, least = before + weights[token], logits[token]
    weights = [weight if x >= least else 0.0 for x, weight in zip(logits, weights, strict=True)]
    wanted, before = point * sum(weights), 0.0
    for token, weight in enumerate(weights):
        before += weight
        if before > wanted:
            return token
    raise AssertionError("a point is below 1")


def pack(*rows: list[int], vocab_size: int) -> Tensor:
    """`allowed` of the tokens that each row names."""
    words = [[0] * -(-vocab_size // 32) for _ in rows]
    for row, tokens in zip(words, rows, strict=True):
        for token in tokens:
            row[token // 32] |= 1 << token % 32
    return torch.tensor(words).to(torch.int32)


IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "kernel"])
# One tile and several, full or not.
SIZES = [1, 63, 64, 65, 1000, 2049, 5000]
# Values of 16 bits differ in how they are told apart, not in how they are read.
SIZES_AND_DTYPES = [
    (size, dtype) for dtype in DTYPES for size in (SIZES if dtype == torch.float32 else (65, 2049, 5000))
]


@IMPLEMENTATIONS
@pytest.mark.parametrize(("vocab_size", "dtype"), SIZES_AND_DTYPES, ids=str)
def test_every_way_to_choose_gives_the_token_of_the_plain_answer(
    implementation: str, vocab_size: int, dtype: torch.dtype, device: str
) -> None:
    ways = [
        {"temperature": 0.0},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 10**9},
        {"top_p": 0.9},
        {"top_p": 1e-300},
        {"min_p": 0.02, "temperature": 1.7},
        {"min_p": 1.0},
        {"top_k": 50, "top_p": 0.7, "min_p": 0.01, "temperature": 1.3},
    ]
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    rows = [{**plain, **way} for way in ways for _ in range(2)]
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 3).to(dtype)
    points = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    columns = {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64)
        for name in ("temperature", "top_p", "min_p")
    }
    top_k = torch.tensor([row["top_k"] for row in rows])
    expected = [
        plain_answer(each, point=point, **row)
        for each, point, row in zip(logits.float(), points.tolist(), rows, strict=True)
    ]
    assert chosen(implementation, device, logits, points=points, top_k=top_k, **columns) == expected


@IMPLEMENTATIONS
def test_a_large_vocabulary_is_read_to_its_end(implementation: str, device: str) -> None:
    vocab_size = 49_152
    logits = torch.full((4, vocab_size), -20.0, dtype=torch.bfloat16)
    logits[:, -1], logits[:, 2047], logits[:, 2048] = 1.0, 2.0, 1.5
    points = torch.tensor([0.0, 0.4, 0.7, 1 - 2**-48], dtype=torch.float64)
    top_p = torch.tensor([1.0, 0.5, 0.9, 0.9], dtype=torch.float64)
    assert chosen(implementation, device, logits, points=points) == [0, 2047, 2048, vocab_size - 1]
    assert chosen(implementation, device, logits, points=points, top_p=top_p) == [0, 2047, 2048, vocab_size - 1]
    assert chosen(implementation, device, logits[:1], points=points[-1:], top_k=1) == [2047]


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_of_the_likeliest_is_taken_without_temperature(
    implementation: str, dtype: torch.dtype, device: str
) -> None:
    logits = torch.zeros(3, 3000, dtype=dtype)
    logits[0, [2500, 17, 2065]] = 4.0
    logits[1] = -math.inf
    logits[1, 2999] = -9.0
    assert chosen(implementation, device, logits, temperature=0.0) == [17, 2999, 0]


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_of_the_last_token_that_is_kept_stay(implementation: str, dtype: torch.dtype, device: str) -> None:
    logits = torch.tensor([[1.0, 0.0, 1.0, -1.0, 0.0, -0.0]], dtype=dtype).expand(5, -1)
    points = torch.tensor([0.1, 0.35, 0.6, 0.8, 0.95], dtype=torch.float64)
    tokens = [set(chosen(implementation, device, logits, points=points, top_k=k)) for k in (1, 2, 3, 4)]
    assert tokens == [{0, 2}, {0, 2}, {0, 1, 2, 4, 5}, {0, 1, 2, 4, 5}]
    assert set(chosen(implementation, device, logits, points=points, top_p=0.1)) == {0, 2}
    # Of e + e + 1, the two likeliest have 0.845: ties that top_k would have left out do not count.
    above = chosen(implementation, device, logits, points=points, top_k=3, top_p=0.8)
    assert set(above) == {0, 2}
    assert set(chosen(implementation, device, logits, points=points, top_k=3, top_p=0.85)) == {0, 1, 2, 4, 5}


@IMPLEMENTATIONS
def test_min_p_of_one_keeps_the_likeliest_alone(implementation: str, device: str) -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-20, 0.5]]).expand(4, -1)
    points = torch.arange(4, dtype=torch.float64) / 4
    assert set(chosen(implementation, device, logits, points=points, min_p=1.0)) == {1}
    assert set(chosen(implementation, device, logits, points=points, min_p=0.9)) == {0, 1}


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [{}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}])
def test_a_token_with_all_the_mass_is_always_taken(
    implementation: str, options: dict[str, float], device: str
) -> None:
    logits = torch.full((3, 200), -1000.0)
    logits[:, 111] = 1000.0
    points = torch.tensor([0.0, 0.5, 1 - 2**-48], dtype=torch.float64)
    assert chosen(implementation, device, logits, points=points, **options) == [111] * 3


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 10}, {"min_p": 0.5}])
def test_only_allowed_tokens_are_chosen(implementation: str, options: dict[str, float], device: str) -> None:
    vocab_size = 3001
    rows = [[0], [31], [32], [3000], [5, 63, 2047, 2048], list(range(vocab_size))]
    logits = torch.randn(len(rows), vocab_size, generator=torch.Generator().manual_seed(0))
    logits[:-1, 7] = 50.0
    logits[0, 8] = math.nan  # where nothing may be chosen, nothing matters
    allowed = pack(*rows, vocab_size=vocab_size)
    tokens = chosen(implementation, device, logits, allowed=allowed, points=0.9, **options)
    assert tokens[:4] == [0, 31, 32, 3000]
    assert tokens[4] in rows[4]
    assert tokens[5:] == chosen(implementation, device, logits[5:], points=0.9, **options)


@IMPLEMENTATIONS
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9}])
def test_a_row_that_is_not_finite_has_no_token_and_leaves_the_others_alone(
    implementation: str, options: dict[str, float], device: str
) -> None:
    logits = torch.zeros(5, 70)
    logits[:, 3] = 20.0
    logits[0, 69] = math.nan
    logits[1, 0] = math.inf
    logits[2] = -math.inf
    allowed = pack(*[list(range(70))] * 3, [], [3, 4], vocab_size=70)
    tokens = chosen(implementation, device, logits, allowed=allowed, **options)
    assert tokens == [NO_TOKEN, NO_TOKEN, NO_TOKEN, NO_TOKEN, 3]


@IMPLEMENTATIONS
def test_strided_rows_are_read_and_nothing_beside_them(implementation: str, device: str) -> None:
    wide = poisoned(4, 150, dtype=torch.float32)
    logits = wide[::2, 10:110]
    logits.copy_(torch.randn(2, 100, generator=torch.Generator().manual_seed(0)))
    allowed = torch.full((4, 9), -1, dtype=torch.int32)[::2, 2:6]
    for options in ({}, {"temperature": 0.0}, {"top_k": 7, "top_p": 0.8}):
        expected = chosen("reference", device, logits.contiguous(), **options)
        assert chosen(implementation, device, logits, **options) == expected
        assert chosen(implementation, device, logits, allowed=allowed, **options) == expected


@IMPLEMENTATIONS
def test_no_rows_are_no_work(implementation: str, device: str) -> None:
    assert chosen(implementation, device, torch.zeros(0, 8)) == []


@IMPLEMENTATIONS
def test_draws_follow_the_probabilities(implementation: str, device: str) -> None:
    shares = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05])
    points = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    tokens = chosen(implementation, device, shares.log().expand(20, -1), points=points)
    assert torch.bincount(torch.tensor(tokens)).tolist() == [10, 0, 6, 3, 1]
    assert tokens == sorted(tokens)


def test_the_reference_looks_further_where_its_candidates_do_not_reach_top_p(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scaled = (-torch.arange(20) * 1e-3).expand(2, -1)
    top_k, top_p = torch.zeros(2, dtype=torch.int64), torch.tensor([0.74, 0.1], dtype=torch.float64)
    all_at_once = reference._keep_top(scaled, top_k, top_p)
    assert torch.isfinite(all_at_once).sum(-1).tolist() == [15, 2]
    monkeypatch.setattr(reference, "_CANDIDATES", 4)
    assert torch.equal(reference._keep_top(scaled, top_k, top_p), all_at_once)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 49_152), (256, 128_256), (3, 262_144)])
def test_real_sizes_on_a_gpu(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(num_rows, vocab_size, generator=generator) * 4).to(dtype)
    points = torch.rand(num_rows, generator=generator, dtype=torch.float64)
    for options in ({"temperature": 0.0}, {"top_k": 50}, {"top_p": 0.8}, {"top_k": 40, "min_p": 0.05}):
        expected = chosen("reference", "cpu", logits, points=points, **options)
        assert chosen("operation", "cuda", logits, points=points, **options) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(8)}, "logits"),
        ({"logits": torch.zeros(2, 0)}, "logits"),
        ({"logits": torch.zeros(8, 2).T}, "logits"),
        ({"logits": torch.zeros(2, 8, dtype=torch.float64)}, "16 or 32 bits"),
        ({"temperature": torch.zeros(3, dtype=torch.float64)}, "temperature"),
        ({"points": torch.zeros(2)}, "points"),
        ({"top_k": torch.zeros(2, dtype=torch.int32)}, "top_k"),
        ({"min_p": torch.zeros(4, dtype=torch.float64)[::2]}, "min_p"),
        ({"allowed": torch.zeros(2, 2, dtype=torch.int32)}, "allowed"),
        ({"allowed": torch.zeros(2, 1, dtype=torch.int64)}, "allowed"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    columns = {name: torch.ones(2, dtype=torch.float64) for name in ("temperature", "top_p", "min_p", "points")}
    arguments = {"logits": torch.zeros(2, 8), "top_k": torch.zeros(2, dtype=torch.int64), **columns}
    with pytest.raises(ValueError, match=message):
        sample(**{**arguments, **change})
