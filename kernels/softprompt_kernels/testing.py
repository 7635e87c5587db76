"""What every kernel's tests share: the tolerances, awkward shapes, and poisoned memory."""

import torch
from torch import Tensor

__all__ = ["AWKWARD_SIZES", "DTYPES", "TOLERANCES", "assert_close", "poisoned"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Largest |difference| against a float64 answer of values of size about one: (relative, absolute). One step of the
# dtype, plus the rounding of the weights before the last product.
TOLERANCES = {
    torch.float32: (1e-5, 2e-6),
    torch.bfloat16: (1.6e-2, 8e-3),
    torch.float16: (2e-3, 1e-3),
}

# Around a page (16), a tile (32, 64) and nothing at all.
AWKWARD_SIZES = (1, 15, 16, 17, 63, 64, 65)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless `actual` is within its dtype's tolerance of `expected` (of any float dtype)."""
    relative, absolute = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=absolute)


def poisoned(*shape: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """A tensor of NaN, standing for memory that nobody has written."""
    return torch.full(shape, float("nan"), dtype=dtype, device=device)
