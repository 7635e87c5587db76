import logging

import pytest
import torch
from softprompt_inference.model.swaps.verify import Swap, relative_error, verify
from torch import nn


def _swap(holder: nn.Module, replacement: nn.Module) -> Swap:
    original = holder.inner
    return Swap(
        name="holder.inner",
        apply=lambda: setattr(holder, "inner", replacement),
        undo=lambda: setattr(holder, "inner", original),
        run=lambda generator: holder.inner(torch.randn(4, 8, generator=generator)),
    )


def _holder() -> nn.Module:
    holder = nn.Module()
    holder.inner = nn.Linear(8, 8)
    return holder


class _Scaled(nn.Module):
    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.factor


@pytest.mark.parametrize(("factor", "kept"), [(1.0, True), (1 + 1e-7, True), (1 + 3e-5, False)])
def test_only_what_answers_as_before_is_kept(factor: float, kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    holder = _holder()
    original = holder.inner
    replacement = _Scaled(original, factor)
    with caplog.at_level(logging.WARNING):
        assert verify(_swap(holder, replacement)) is kept
    assert holder.inner is (replacement if kept else original)
    assert ("holder.inner is left as it was" in caplog.text) is not kept


def test_a_replacement_that_raises_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    holder = _holder()
    original = holder.inner
    assert not verify(_swap(holder, nn.Linear(9, 8)))
    assert holder.inner is original
    assert "its replacement fails" in caplog.text


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_kept(bad: float) -> None:
    holder = _holder()
    assert not verify(_swap(holder, _Scaled(holder.inner, bad)))


def test_another_shape_or_dtype_is_never_close() -> None:
    x = torch.ones(2, 3)
    assert relative_error(x, x) == 0
    assert relative_error(x.T, x) == float("inf")
    assert relative_error(x.half(), x) == float("inf")
