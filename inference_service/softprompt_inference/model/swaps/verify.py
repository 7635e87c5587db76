"""One replacement in a model, kept only where it computes what the original did."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

_log = logging.getLogger(__name__)
_SEED = 0
# A power of two, which changes no digit.
_LARGE = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Swap:
    """A replacement that can be tried.

    Attributes:
        name: what is replaced where, for the log.
        apply: puts the replacement in.
        undo: restores the original exactly.
        run: computes the place on random input drawn from the generator.
    """

    name: str
    apply: Callable[[], None]
    undo: Callable[[], None]
    run: Callable[[Generator], Tensor]


def verify(swap: Swap) -> bool:
    """Apply a swap and keep it only if the place answers as before; whether it was kept.

    The relative error (of norms) must be below 1e-5 in float32, 1e-2 in 16 bits.
    """
    expected = _run(swap)
    try:
        swap.apply()
        error = relative_error(_run(swap), expected)
    except Exception:
        swap.undo()
        _log.warning("%s is left as it was: its replacement fails", swap.name, exc_info=True)
        return False
    allowed = 1e-5 if expected.dtype == torch.float32 else 1e-2
    if error < allowed:
        return True
    swap.undo()
    _log.warning("%s is left as it was: its replacement is off by %.2g (relative)", swap.name, error)
    return False


def _run(swap: Swap) -> Tensor:
    with torch.inference_mode():
        return swap.run(Generator().manual_seed(_SEED))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over norm of what was expected; infinite where the shapes or dtypes differ."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return float("inf")
    reference = expected.float()
    return float((actual.float() - reference).norm() / reference.norm().clamp_min(1e-30))


def random_input(generator: Generator, width: int, like: Tensor) -> Tensor:
    """Some rows as a layer may see them: [1, 3, width] with the dtype and device of `like`."""
    return torch.randn(1, 3, width, generator=generator).to(like)


def small_and_large(compute: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a gated MLP makes of x, and of 256 times x where that can be told: some limit how large values become.

    [..., size] → [2 * ..., size], each about as large as the other.
    """
    if x.dtype == torch.float16:  # which such values may leave
        return compute(x)
    # Together: reading the weights takes longer than computing with them.
    small, large = compute(torch.cat([x, x * _LARGE])).chunk(2)
    return torch.cat([small, large / _LARGE**2])
