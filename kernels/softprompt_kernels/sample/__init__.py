"""Draw one token for each row of logits, by inverting a cumulative distribution.

Semantics, of one row:
    x = where(allowed, logits, -inf)                            # bit i % 32 of word i // 32 allows token i
    if not isfinite(x.max()): token = -1                        # also where any is NaN
    if temperature == 0: token = x.argmax()                     # the first of the largest
    scaled = x / temperature
    scaled[scaled < scaled.max() + log(min_p)] = -inf
    k = top_k if top_k > 0 else V
    best = scaled.sort(descending=True)[:k]
    before = softmax(best).cumsum() - softmax(best)             # the mass of those that are likelier
    scaled[scaled < best[before < top_p].min()] = -inf          # ties of the last stay
    mass = softmax(scaled).cumsum()                             # summed in float64
    token = searchsorted(mass, point * mass[-1], right=True)

logits       [n, V]              bf16/fp16/fp32, last stride 1
temperature  [n] float64
top_k        [n] int64           0 or less: all
top_p        [n] float64         above 0; 1: all
min_p        [n] float64         0: all
points       [n] float64         in [0, 1)
allowed      [n, ceil(V / 32)]   int32, last stride 1; None: every token is
tokens       [n] int64           the answer

The small ones are contiguous. A row's token depends on that row alone. Nothing waits for a GPU.
"""

import torch
from torch import Tensor

from softprompt_kernels import native
from softprompt_kernels.sample.reference import NO_TOKEN
from softprompt_kernels.sample.reference import sample as _reference

__all__ = ["NO_TOKEN", "sample"]


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    points: Tensor,
    allowed: Tensor | None = None,
) -> Tensor:
    """`tokens`; see the module's docstring.

    Raises:
        ValueError: shapes, dtypes or strides are not as listed.
    """
    _check(logits, allowed)
    for name, values in (
        ("temperature", temperature),
        ("top_k", top_k),
        ("top_p", top_p),
        ("min_p", min_p),
        ("points", points),
    ):
        _check_column(name, values, logits)
    if logits.device.type == "cuda":
        # Triton is needed on a GPU only, and need not be installed elsewhere.
        from softprompt_kernels.sample.kernel import sample as _kernel

        return _kernel(logits, temperature, top_k, top_p, min_p, points, allowed)
    if allowed is None and native.supports_rows(logits) and not temperature.any():
        return native.argmax(logits)
    return _reference(logits, temperature, top_k, top_p, min_p, points, allowed)


def _check(logits: Tensor, allowed: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[1] == 0 or logits.stride(1) != 1:
        raise ValueError(f"logits {list(logits.shape)} must be [n, V], not empty and dense in their last axis")
    if not logits.dtype.is_floating_point or logits.dtype == torch.float64:
        raise ValueError(f"logits are {logits.dtype}; they must be floats of 16 or 32 bits")
    if allowed is None:
        return
    shape = (logits.shape[0], -(-logits.shape[1] // 32))
    if allowed.shape != shape or allowed.dtype != torch.int32 or allowed.stride(1) != 1:
        raise ValueError(
            f"allowed {list(allowed.shape)} {allowed.dtype} must be {list(shape)} int32 and dense in its last axis"
        )


def _check_column(name: str, values: Tensor, logits: Tensor) -> None:
    dtype = torch.int64 if name == "top_k" else torch.float64
    if values.shape != logits.shape[:1] or values.dtype != dtype or not values.is_contiguous():
        raise ValueError(
            f"{name} {list(values.shape)} {values.dtype} must be [{logits.shape[0]}] {dtype} and contiguous"
        )
