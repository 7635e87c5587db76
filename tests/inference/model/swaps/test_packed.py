import pytest
import torch
import torch.nn.functional as F
from softprompt_inference.model.swaps.packed import NativeGate, NativeLinear, PackedLinear, can_pack, pack
from torch import nn


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


@pytest.mark.parametrize("bias", [False, True])
def test_float32_weights_that_bfloat16_holds_are_kept_in_it(wide: None, bias: bool) -> None:
    weight, x, b = torch.randn(24, 40).bfloat16().float(), torch.randn(1, 3, 40), torch.randn(24) if bias else None
    product = pack(weight, b)
    assert isinstance(product, NativeLinear)
    assert product.packed.dtype == torch.bfloat16
    torch.testing.assert_close(product(x), F.linear(x, weight, b), rtol=1e-5, atol=1e-5)
    assert isinstance(pack(torch.randn(24, 40), b), PackedLinear)


@pytest.mark.parametrize("bias", [False, True])
def test_gate_and_up_of_such_weights(wide: None, bias: bool) -> None:
    gate, up = (nn.Linear(40, 41, bias=bias).bfloat16().float() for _ in range(2))
    x = torch.randn(1, 3, 40)
    with torch.inference_mode():
        product = NativeGate(gate, up, "silu")
        torch.testing.assert_close(product(x), F.silu(gate(x)) * up(x), rtol=1e-5, atol=1e-5)
