import math

import pytest
import torch
from softprompt_kernels.act_mul import ACTIVATIONS, act_mul
from softprompt_kernels.testing import AWKWARD_SIZES, DTYPES, assert_close
from torch import Tensor


def gated(implementation: str, device: str, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    operation = act_mul
    if implementation == "kernel":
        from softprompt_kernels.act_mul.kernel import act_mul as operation
    return operation(gate.to(device), up.to(device), activation).cpu()


def plain_answer(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The docstring's semantics, in float64."""
    x = gate.double()
    if activation == "silu":
        activated = x / (1 + torch.exp(-x))
    else:
        activated = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return activated * up.double()


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", AWKWARD_SIZES)
def test_rows_of_any_length_are_gated(
    implementation: str, activation: str, dtype: torch.dtype, size: int, device: str
) -> None:
    gate, up = (torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)) * 2).to(dtype)
    out = gated(implementation, device, gate, up, activation)
    assert out.dtype == dtype
    assert_close(out, plain_answer(gate, up, activation))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_halves_of_a_merged_projection_are_read_and_not_changed(
    implementation: str, activation: str, device: str
) -> None:
    merged = torch.randn(1, 5, 2 * 1500)
    before = merged.clone()
    gate, up = merged.chunk(2, -1)
    out = gated(implementation, device, gate, up, activation)
    assert out.is_contiguous()
    assert torch.equal(merged, before)
    assert_close(out, plain_answer(gate, up, activation))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_values_saturate(implementation: str, activation: str, device: str) -> None:
    gate, up = torch.tensor([[-1000.0, -50.0, 50.0, 1000.0]]), torch.ones(1, 4)
    out = gated(implementation, device, gate, up, activation)
    assert_close(out, torch.tensor([[0.0, 0.0, 50.0, 1000.0]]))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_no_rows_are_no_work(implementation: str, device: str) -> None:
    empty = torch.zeros(1, 0, 8)
    assert gated(implementation, device, empty, empty, "silu").shape == (1, 0, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("num_tokens", [1, 256, 4096])
def test_real_sizes_on_a_gpu(num_tokens: int, activation: str) -> None:
    gate, up = torch.randn(num_tokens, 2 * 8192).bfloat16().chunk(2, -1)
    assert_close(gated("operation", "cuda", gate, up, activation), plain_answer(gate, up, activation))


@pytest.mark.parametrize(
    ("gate", "up", "activation", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(2, 7), "silu", "do not fit"),
        (torch.zeros(2, 8), torch.zeros(2, 8).half(), "silu", "must be the same"),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), "silu", "dense"),
        (torch.zeros(2, 8), torch.zeros(2, 8), "relu", "one of silu, gelu_tanh"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(gate: Tensor, up: Tensor, activation: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act_mul(gate, up, activation)
