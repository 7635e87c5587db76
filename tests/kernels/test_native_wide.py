"""Products in float32 over weights that are kept in bfloat16: what plain products give, row by row."""

import pytest
import torch
import torch.nn.functional as F
from softprompt_kernels import native

ACTIVATIONS = {"identity": lambda x: x, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@pytest.fixture
def wide_kernels(native_kernels: None) -> None:
    if not native.supports_wide(torch.zeros(1, 1)):
        pytest.skip("this processor has no wide vectors")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def weights(*shape: int) -> torch.Tensor:
    """Float32 that bfloat16 holds."""
    return random(*shape).bfloat16().float()


def assert_product(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Sums of the same numbers in another order.
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5 * expected.abs().max().item())


# Around the rows that fit the registers, that read a panel as it lies, and that are a block.
@pytest.mark.parametrize("rows", [*range(1, 14), 24, 25, 37, 239, 240, 241, 500])
@pytest.mark.parametrize(("columns", "size"), [(16, 1), (40, 63), (15, 256), (17, 257), (100, 576)])
def test_products_of_any_size(wide_kernels: None, rows: int, columns: int, size: int) -> None:
    x, weight, bias = random(rows, size), weights(columns, size), random(columns)
    packed = native.pack_linear(weight)
    expected = x.double() @ weight.double().T
    assert_product(native.linear(x, packed, None, columns=columns), expected)
    assert_product(native.linear(x, packed, native.pack_bias(bias), columns=columns), expected + bias)


@pytest.mark.parametrize("rows", [1, 13, 24, 25])
def test_long_sums_are_not_made_in_one_go(wide_kernels: None, rows: int) -> None:
    x, weight = random(rows, 1536), weights(64, 1536)
    exact = x.double() @ weight.double().T
    product = native.linear(x, native.pack_linear(weight), None, columns=64)
    # One sum of all products is off by 7e-7, and one of six stretches by 3e-7.
    assert (product - exact).norm() < 4e-7 * exact.norm()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("columns", [16, 24, 100])
@pytest.mark.parametrize("rows", [5, 30])
def test_activations_and_gates_in_the_same_pass(
    wide_kernels: None, rows: int, columns: int, activation: str
) -> None:
    x, gate, up = random(rows, 64), weights(columns, 64), weights(columns + 1, 64)[1:]
    biases = random(2, columns)
    left, right = (x.double() @ weight.double().T + bias for weight, bias in zip((gate, up), biases, strict=True))
    activated = ACTIVATIONS[activation](left)
    out = native.linear(
        x, native.pack_linear(gate), native.pack_bias(biases[0]), columns=columns, activation=activation
    )
    assert_product(out, activated)
    packed = native.pack_gated(gate, up)
    for bias, expected in (
        (native.pack_gated_bias(*biases), activated * right),
        (None, ACTIVATIONS[activation](left - biases[0]) * (right - biases[1])),
    ):
        out = native.linear(x, packed, bias, columns=columns, activation=activation, gated=True)
        assert_product(out, expected)


def test_activations_far_from_zero(wide_kernels: None) -> None:
    x = torch.tensor([[-3e38], [-1e3], [-90], [90], [1e3], [float("nan")]])
    packed = native.pack_linear(torch.ones(16, 1))
    for activation in ("silu", "gelu_tanh"):
        out = native.linear(x, packed, None, columns=16, activation=activation)
        expected = ACTIVATIONS[activation](x).expand(-1, 16)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-30, equal_nan=True)


def test_a_row_has_the_same_product_in_any_batch(wide_kernels: None) -> None:
    x, packed = random(300, 576), native.pack_linear(weights(90, 576))
    together = native.linear(x, packed, None, columns=90)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(native.linear(x, packed, None, columns=90), together)
    finally:
        torch.set_num_threads(threads)
    for count in (1, 5, 12, 13, 25, 250):
        assert torch.equal(native.linear(x[7 : 7 + count], packed, None, columns=90), together[7 : 7 + count])


def test_products_of_rows_where_they_lie(wide_kernels: None) -> None:
    merged, weight = random(1, 9, 100), weights(48, 64)
    packed = native.pack_linear(weight)
    for x in (merged[..., 20:84], merged.transpose(1, 2)[:, :64, :].transpose(1, 2), merged[0, 3, 4:68]):
        assert_product(native.linear(x, packed, None, columns=48), F.linear(x, weight))


def test_only_weights_that_bfloat16_holds_are_taken(native_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not native.supports_wide(torch.full((2, 2), 1 + 2**-10))
    assert not native.supports_wide(torch.full((2, 2), float("nan")))
    assert not native.supports_wide(torch.zeros(2, 2, dtype=torch.bfloat16))
    assert not native.supports_wide(torch.zeros(2, 2, device="meta"))
    monkeypatch.setattr(native, "_library", None)
    assert not native.supports_wide(torch.zeros(2, 2))
