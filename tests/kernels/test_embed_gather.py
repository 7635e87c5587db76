import pytest
import torch
from softprompt_kernels.embed_gather import embed_gather
from softprompt_kernels.testing import DTYPES
from torch import Tensor


def gather(implementation: str, device: str, out: Tensor, rows: Tensor, dst: Tensor, src: Tensor) -> Tensor:
    """A copy of `out` after the operation."""
    written = out.to(device, copy=True)
    if implementation == "kernel":
        from softprompt_kernels.embed_gather.kernel import embed_gather as kernel

        kernel(written, rows.to(device), dst.to(device), src.to(device))
    else:
        embed_gather(written, rows.to(device), dst.to(device), src.to(device))
    return written.cpu()


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("num_virtual", [0, 1, 63, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_virtual_tokens_get_their_rows_and_others_stay(
    implementation: str, num_virtual: int, dtype: torch.dtype, device: str
) -> None:
    out, rows = torch.randn(70, 40).to(dtype), torch.randn(9, 40).to(dtype)
    dst = torch.randperm(70)[:num_virtual]
    src = torch.randint(9, (num_virtual,))
    expected = out.clone()
    expected[dst] = rows[src]
    assert torch.equal(gather(implementation, device, out, rows, dst, src), expected)


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
@pytest.mark.parametrize("popularity", ["identical", "distinct", "skewed"])
def test_adapters_may_be_popular_in_any_way(implementation: str, popularity: str, device: str) -> None:
    out, rows = torch.zeros(64, 2000), torch.randn(64, 2000)
    src = {
        "identical": torch.full((64,), 5),
        "distinct": torch.randperm(64),
        "skewed": torch.tensor([0] * 60 + [1, 2, 3, 63]),
    }[popularity]
    assert torch.equal(gather(implementation, device, out, rows, torch.arange(64), src), rows[src])


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_a_source_of_minus_one_leaves_the_token_alone(implementation: str, device: str) -> None:
    out, rows = torch.randn(3, 8), torch.randn(2, 8)
    written = gather(implementation, device, out, rows, torch.tensor([0, 2]), torch.tensor([-1, 1]))
    assert torch.equal(written, torch.stack([out[0], out[1], rows[1]]))


@pytest.mark.parametrize("implementation", ["reference", "kernel"])
def test_strided_rows_are_read_rightly(implementation: str, device: str) -> None:
    rows = torch.randn(4, 20)[:, :8]
    out = torch.zeros(4, 30)[:, :8]
    index = torch.arange(4)
    assert torch.equal(gather(implementation, device, out, rows, index, index), rows)


@pytest.mark.parametrize(
    ("rows", "src", "message"),
    [
        (torch.zeros(2, 7), torch.zeros(1, dtype=torch.int64), "do not fit"),
        (torch.zeros(2, 8, dtype=torch.float16), torch.zeros(1, dtype=torch.int64), "must be the same"),
        (torch.zeros(8, 2).T, torch.zeros(1, dtype=torch.int64), "dense"),
        (torch.zeros(2, 8), torch.zeros(1, dtype=torch.int32), "int64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(rows: Tensor, src: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed_gather(torch.zeros(3, 8), rows, torch.zeros(1, dtype=torch.int64), src)
