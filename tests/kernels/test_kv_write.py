import pytest
import torch
from softprompt_kernels.kv_write import kv_write
from softprompt_kernels.testing import DTYPES, poisoned
from torch import Tensor

PAGE_SIZE, KV_HEADS, HEAD_DIM = 16, 3, 24


def write(implementation: str, device: str, k: Tensor, v: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Fresh pages after the write."""
    pages = poisoned(8, PAGE_SIZE, *k.shape[1:], dtype=k.dtype, device=device)
    keys, values = pages, pages.clone()
    if implementation == "kernel":
        from softprompt_kernels.kv_write.kernel import kv_write as kernel

        kernel(keys, values, k.to(device), v.to(device), slots.to(device))
    else:
        kv_write(keys, values, k.to(device), v.to(device), slots.to(device))
    return keys.cpu(), values.cpu()


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_go_to_their_slots_and_nowhere_else(
    implementation: str, num_tokens: int, dtype: torch.dtype, device: str
) -> None:
    slots = torch.randperm(8 * PAGE_SIZE)[:num_tokens]
    k, v = torch.randn(2, num_tokens, KV_HEADS, HEAD_DIM).to(dtype)
    keys, values = write(implementation, device, k, v, slots)
    for pages, rows in ((keys, k), (values, v)):
        flat = pages.flatten(0, 1)
        assert torch.equal(flat[slots], rows)
        assert flat.isnan().all(-1).all(-1).sum() == 8 * PAGE_SIZE - num_tokens


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_strided_tokens_are_read_rightly(implementation: str, device: str) -> None:
    k = torch.randn(KV_HEADS, 5, HEAD_DIM).transpose(0, 1)
    v = torch.randn(5, KV_HEADS, 2 * HEAD_DIM)[..., :HEAD_DIM]
    slots = torch.tensor([3, 100, 17, 16, 0])
    keys, values = write(implementation, device, k, v, slots)
    assert torch.equal(keys.flatten(0, 1)[slots], k)
    assert torch.equal(values.flatten(0, 1)[slots], v)


@pytest.mark.parametrize(
    ("k", "slots", "message"),
    [
        (torch.zeros(2, 3, 24), torch.zeros(3, dtype=torch.int64), "do not fit"),
        (torch.zeros(2, 3, 24, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64), "must be the same"),
        (torch.zeros(2, 24, 3).transpose(1, 2), torch.zeros(2, dtype=torch.int64), "dense"),
        (torch.zeros(2, 3, 24), torch.zeros(2, dtype=torch.int32), "int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(k: Tensor, slots: Tensor, message: str) -> None:
    pages = torch.zeros(8, PAGE_SIZE, KV_HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=message):
        kv_write(pages, pages.clone(), k, k, slots)
