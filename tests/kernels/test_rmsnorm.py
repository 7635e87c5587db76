import pytest
import torch
from softprompt_kernels.rmsnorm import add_rms_norm, rms_norm
from softprompt_kernels.testing import DTYPES, assert_close
from torch import Tensor

EPS = 1e-5


def normed(
    implementation: str, device: str, x: Tensor, weight: Tensor, *, unit_offset: bool = False, eps: float = EPS
) -> Tensor:
    operation = rms_norm
    if implementation == "kernel":
        from softprompt_kernels.rmsnorm.kernel import rms_norm as operation
    return operation(x.to(device), weight.to(device), eps=eps, unit_offset=unit_offset).cpu()


def added(
    implementation: str, device: str, x: Tensor, residual: Tensor, weight: Tensor, *, unit_offset: bool = False
) -> tuple[Tensor, Tensor]:
    operation = add_rms_norm
    if implementation == "kernel":
        from softprompt_kernels.rmsnorm.kernel import add_rms_norm as operation
    tensors = (tensor.to(device) for tensor in (x, residual, weight))
    out, h = operation(*tensors, eps=EPS, unit_offset=unit_offset)
    return out.cpu(), h.cpu()


def plain_answer(x: Tensor, weight: Tensor, *, unit_offset: bool = False, eps: float = EPS) -> Tensor:
    """The docstring's semantics, in float64."""
    h, w = x.double(), weight.double()
    return h / (h.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + w if unit_offset else w)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 63, 64, 65, 576])
def test_rows_of_any_length_are_normed(
    implementation: str, unit_offset: bool, dtype: torch.dtype, size: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, size, generator=generator).to(dtype) for shape in ((7,), ()))
    out = normed(implementation, device, x, weight, unit_offset=unit_offset)
    assert out.dtype == dtype
    assert_close(out, plain_answer(x, weight, unit_offset=unit_offset))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_is_rounded_before_it_is_normed(
    implementation: str, unit_offset: bool, dtype: torch.dtype, device: str
) -> None:
    if (implementation, device, dtype) == ("kernel", "cpu", torch.bfloat16):
        pytest.skip("Triton's interpreter cuts values off where they are rounded to bfloat16")
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 1, 9, 40, generator=generator).to(dtype)
    weight = torch.randn(40, generator=generator).to(dtype)
    out, h = added(implementation, device, x, residual, weight, unit_offset=unit_offset)
    assert torch.equal(h, x + residual)
    assert_close(out, plain_answer(x + residual, weight, unit_offset=unit_offset))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_heads_of_a_merged_projection_are_normed_where_they_lie(implementation: str, device: str) -> None:
    merged = torch.randn(1, 5, 100)
    heads = merged[..., 10:58].view(1, 5, 3, 16)
    weight = torch.randn(16)
    out = normed(implementation, device, heads, weight)
    assert out.is_contiguous()
    assert_close(out, plain_answer(heads, weight))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_strided_rows_and_residuals_are_read_rightly(implementation: str, device: str) -> None:
    x, residual = torch.randn(4, 30)[:, :8], torch.randn(2, 4, 50)[1, :, 5:13]
    weight = torch.randn(8)
    out, h = added(implementation, device, x, residual, weight)
    assert torch.equal(h, x + residual)
    assert_close(out, plain_answer(x + residual, weight))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_no_rows_are_no_work_and_zero_rows_stay_zero(implementation: str, device: str) -> None:
    weight = torch.randn(8)
    assert normed(implementation, device, torch.zeros(1, 0, 8), weight).shape == (1, 0, 8)
    assert normed(implementation, device, torch.zeros(2, 8), weight).count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_epsilon_is_added_to_the_mean_square(implementation: str, device: str) -> None:
    x, weight = torch.randn(3, 8) * 1e-3, torch.randn(8)
    assert_close(normed(implementation, device, x, weight, eps=0.5), plain_answer(x, weight, eps=0.5))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "size"), [(1, 576), (256, 4096), (4096, 8192)])
def test_real_sizes_on_a_gpu(num_tokens: int, size: int) -> None:
    x, residual = torch.randn(2, 1, num_tokens, size).bfloat16()
    weight = torch.randn(size).bfloat16()
    out, h = added("operation", "cuda", x, residual, weight)
    assert torch.equal(h, x + residual)
    assert_close(out, plain_answer(x + residual, weight))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 8), torch.zeros(7), "do not fit"),
        (torch.zeros(8), torch.zeros(8), "do not fit"),
        (torch.zeros(2, 8), torch.zeros(8, dtype=torch.bfloat16), "must be the same"),
        (torch.zeros(8, 2).T, torch.zeros(8), "dense"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(x, weight, eps=EPS)


@pytest.mark.parametrize("residual", [torch.zeros(2, 7), torch.zeros(2, 8).half(), torch.zeros(8, 2).T])
def test_residuals_that_do_not_fit_are_refused(residual: Tensor) -> None:
    with pytest.raises(ValueError, match="residual"):
        add_rms_norm(torch.zeros(2, 8), residual, torch.zeros(8), eps=EPS)
