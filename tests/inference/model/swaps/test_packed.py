import pytest
import torch
import torch.nn.functional as F
from softprompt_inference.model.swaps.packed import PackedLinear, can_pack


@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_equals_the_plain_one(rows: int, bias: bool) -> None:
    weight, x = torch.randn(24, 40), torch.randn(1, rows, 40)
    b = torch.randn(24) if bias else None
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(weight, b)(x), F.linear(x, weight, b))
        factor = torch.randn(1, rows, 24)
        torch.testing.assert_close(
            PackedLinear(weight, b).forward_times(x, factor), F.linear(x, weight, b) * factor
        )


def test_a_view_is_packed_by_its_values() -> None:
    stored, x = torch.randn(40, 24), torch.randn(3, 40)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(stored.T, None)(x), x @ stored)


def test_what_onednn_does_not_know_is_not_packed() -> None:
    assert not can_pack(torch.randn(4, 4, dtype=torch.float64))
    assert not can_pack(torch.empty(4, 4, device="meta"))


def test_without_the_ops_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_inference.model.swaps.packed._ops", object())
    assert not can_pack(torch.randn(4, 4))
