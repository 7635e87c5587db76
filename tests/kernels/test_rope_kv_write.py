import pytest
import torch
from softprompt_kernels.kv_write import kv_write
from softprompt_kernels.rope import rope
from softprompt_kernels.rope_kv_write import rope_kv_write
from softprompt_kernels.testing import DTYPES, assert_close, poisoned
from torch import Tensor

PAGE_SIZE, NUM_PAGES = 16, 8


def computed(implementation: str, device: str, *tensors: Tensor, slots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries, and fresh pages after the write."""
    operation = rope_kv_write
    if implementation == "kernel":
        from softprompt_kernels.rope_kv_write.kernel import rope_kv_write as operation
    q, k, v, cos, sin = (tensor.to(device) for tensor in tensors)
    keys = poisoned(NUM_PAGES, PAGE_SIZE, *k.shape[1:], dtype=k.dtype, device=device)
    values = keys.clone()
    out = operation(q, k, v, cos, sin, keys, values, slots.to(device))
    return out.cpu(), keys.cpu(), values.cpu()


def inputs(num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = ((num_heads, head_dim), (num_kv_heads, head_dim), (num_kv_heads, head_dim), (head_dim,), (head_dim,))
    return [torch.randn(num_tokens, *shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("num_tokens", [0, 1, 17, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_rope_and_kv_write_together(
    implementation: str, num_tokens: int, dtype: torch.dtype, device: str
) -> None:
    q, k, v, cos, sin = inputs(num_tokens, 9, 3, 24, dtype)
    slots = torch.randperm(NUM_PAGES * PAGE_SIZE)[:num_tokens]
    out, keys, values = computed(implementation, device, q, k, v, cos, sin, slots=slots)
    expected, turned = rope(q.double(), k.double(), cos.double(), sin.double())
    assert out.is_contiguous()
    if dtype == torch.float32 or implementation == "kernel":
        assert_close(out, expected)
        assert_close(keys.flatten(0, 1)[slots], turned)
    assert torch.equal(values.flatten(0, 1)[slots], v)
    for pages in (keys, values):
        assert pages.flatten(0, 1).isnan().all(-1).all(-1).sum() == NUM_PAGES * PAGE_SIZE - num_tokens


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(1, 1), (3, 3), (32, 8), (71, 1)])
@pytest.mark.parametrize("head_dim", [2, 80, 128])
def test_heads_of_any_number_and_size(num_heads: int, num_kv_heads: int, head_dim: int, device: str) -> None:
    q, k, v, cos, sin = inputs(3, num_heads, num_kv_heads, head_dim, torch.float32)
    slots = torch.tensor([100, 0, 16])
    out, keys, values = computed("kernel", device, q, k, v, cos, sin, slots=slots)
    expected, turned = rope(q, k, cos, sin)
    assert_close(out, expected)
    assert_close(keys.flatten(0, 1)[slots], turned)
    assert torch.equal(values.flatten(0, 1)[slots], v)


def test_slices_of_a_merged_projection_are_read_and_not_changed(device: str) -> None:
    merged = torch.randn(5, 112)
    before = merged.clone()
    q, k, v = (part.view(5, -1, 16) for part in merged.split([48, 32, 32], 1))
    _, _, _, cos, sin = inputs(5, 1, 1, 16, torch.float32)
    slots = torch.tensor([3, 100, 17, 16, 0])
    out, keys, values = computed("kernel", device, q, k, v, cos, sin, slots=slots)
    assert torch.equal(merged, before)
    expected_keys = poisoned(NUM_PAGES, PAGE_SIZE, 2, 16, dtype=torch.float32)
    expected_values = expected_keys.clone()
    expected, turned = rope(q, k, cos, sin)
    kv_write(expected_keys, expected_values, turned, v, slots)
    assert_close(out, expected)
    assert_close(keys.nan_to_num(), expected_keys.nan_to_num())
    assert torch.equal(values.nan_to_num(), expected_values.nan_to_num())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 8)}, "do not fit"),
        ({"v": torch.zeros(2, 2, 6)}, "do not fit"),
        ({"sin": torch.zeros(2, 4)}, "do not fit"),
        ({"q": torch.zeros(2, 4, 8).half()}, "must be the same"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, "int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 4, 8),
        "k": torch.zeros(2, 2, 8),
        "v": torch.zeros(2, 2, 8),
        "cos": torch.zeros(2, 8),
        "sin": torch.zeros(2, 8),
        "keys": torch.zeros(3, PAGE_SIZE, 2, 8),
        "values": torch.zeros(3, PAGE_SIZE, 2, 8),
        "slots": torch.arange(2),
    }
    with pytest.raises(ValueError, match=message):
        rope_kv_write(**{**arguments, **change})
