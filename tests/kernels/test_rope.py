import pytest
import torch
from softprompt_kernels.rope import rope
from softprompt_kernels.testing import AWKWARD_SIZES, DTYPES, assert_close
from torch import Tensor


def rotated(implementation: str, device: str, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    operation = rope
    if implementation == "kernel":
        from softprompt_kernels.rope.kernel import rope as operation
    q, k = operation(*(tensor.to(device) for tensor in tensors))
    return q.cpu(), k.cpu()


def plain_answer(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (d, d + D/2) as complex numbers would be turned, in float64."""
    half = x.shape[-1] // 2
    out = torch.zeros(x.shape, dtype=torch.float64)
    x, cos, sin = x.double(), cos.double()[:, None], sin.double()[:, None]
    for d in range(half):
        first, second = x[..., d], x[..., d + half]
        out[..., d] = first * cos[..., d] - second * sin[..., d]
        out[..., d + half] = second * cos[..., d + half] + first * sin[..., d + half]
    return out


def tables(positions: Tensor, head_dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """As transformers makes them."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.cat([positions[:, None] * frequencies] * 2, -1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("num_tokens", [0, *AWKWARD_SIZES])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_queries_and_keys_are_turned_by_their_positions(
    implementation: str, num_tokens: int, dtype: torch.dtype, device: str
) -> None:
    q, k = torch.randn(num_tokens, 4, 16).to(dtype), torch.randn(num_tokens, 2, 16).to(dtype)
    cos, sin = tables(torch.randint(5000, (num_tokens,)), 16, dtype)
    q_out, k_out = rotated(implementation, device, q, k, cos, sin)
    if dtype == torch.float32 or implementation == "kernel":
        assert_close(q_out, plain_answer(q, cos, sin))
        assert_close(k_out, plain_answer(k, cos, sin))
    # The reference rounds each product, as transformers does: a step of the largest, not of the answer.
    torch.testing.assert_close(q_out.double(), plain_answer(q, cos, sin), rtol=2e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_is_within_tolerance_in_every_dtype(dtype: torch.dtype, device: str) -> None:
    q, k = torch.randn(5, 9, 24).to(dtype), torch.randn(5, 3, 24).to(dtype)
    cos, sin = tables(torch.arange(7, 12), 24, dtype)
    q_out, k_out = rotated("kernel", device, q, k, cos, sin)
    assert_close(q_out, plain_answer(q, cos, sin))
    assert_close(k_out, plain_answer(k, cos, sin))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (32, 8), (71, 1)])
@pytest.mark.parametrize("head_dim", [2, 80, 128])
def test_heads_of_any_number_and_size(
    implementation: str, num_heads: int, num_kv_heads: int, head_dim: int, device: str
) -> None:
    q, k = torch.randn(3, num_heads, head_dim), torch.randn(3, num_kv_heads, head_dim)
    cos, sin = torch.randn(2, 3, head_dim)  # halves that differ: each is read where it belongs
    q_out, k_out = rotated(implementation, device, q, k, cos, sin)
    assert_close(q_out, plain_answer(q, cos, sin))
    assert_close(k_out, plain_answer(k, cos, sin))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_slices_of_a_merged_projection_are_read_and_not_changed(implementation: str, device: str) -> None:
    merged = torch.randn(5, 100)
    before = merged.clone()
    q, k = merged[:, :48].view(5, 3, 16), merged[:, 48:80].view(5, 2, 16)
    cos, sin = tables(torch.arange(5), 32)
    cos, sin = cos[:, :16], sin[:, 16:]
    q_out, k_out = rotated(implementation, device, q, k, cos, sin)
    assert q_out.is_contiguous()
    assert k_out.is_contiguous()
    assert torch.equal(merged, before)
    assert_close(q_out, plain_answer(q, cos, sin))
    assert_close(k_out, plain_answer(k, cos, sin))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 256, 4096])
def test_real_sizes_on_a_gpu(num_tokens: int) -> None:
    q, k = torch.randn(num_tokens, 32, 128).bfloat16(), torch.randn(num_tokens, 8, 128).bfloat16()
    cos, sin = tables(torch.arange(num_tokens), 128, torch.bfloat16)
    q_out, k_out = rotated("operation", "cuda", q, k, cos, sin)
    assert_close(q_out, plain_answer(q, cos, sin))
    assert_close(k_out, plain_answer(k, cos, sin))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 8)}, "do not fit"),
        ({"cos": torch.zeros(2, 4)}, "do not fit"),
        ({"q": torch.zeros(2, 4, 7), "k": torch.zeros(2, 2, 7)}, "do not fit"),
        ({"k": torch.zeros(2, 2, 8).half()}, "must be the same"),
        ({"q": torch.zeros(2, 8, 4).transpose(1, 2)}, "dense"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k": torch.zeros(2, 2, 8),
        "cos": torch.zeros(2, 8),
        "sin": torch.zeros(2, 8),
    }
    with pytest.raises(ValueError, match=message):
        rope(**{**arguments, **change})
