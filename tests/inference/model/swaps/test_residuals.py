from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from softprompt_inference.model.swaps import norms, residuals
from softprompt_inference.model.swaps.verify import Swap, verify

from tests.inference.model.swaps import test_norms
from tests.inference.model.swaps.test_norms import logits


def load(lab: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = test_norms.load(lab.model(name), dtype)
    test_norms.vary_norms(model)
    return model


def found(model: Any) -> list[Swap]:
    for swap in norms.find(model, everywhere=True):
        assert verify(swap)
    return residuals.find(model, partial(logits, model), everywhere=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "qwen3"])
def test_every_layers_sum_goes_with_the_norm_behind_it(lab: Any, name: str) -> None:
    model = load(lab, name)
    expected = logits(model)
    swaps = found(model)
    assert len(swaps) == len(model.model.layers)
    before = logits(model)
    assert all(verify(swap) for swap in swaps)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for swap in reversed(swaps):
        swap.undo()
    assert torch.equal(logits(model), before)


def test_no_sum_is_computed_alone(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(lab, "llama")
    assert all(verify(swap) for swap in found(model))
    computed: list[str] = []

    def counted(name: str, operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            computed.append(name)
            return operation(*args, **named)

        return call

    for module, name in ((norms, "rms_norm"), (norms, "add_rms_norm"), (residuals, "add_rms_norm")):
        monkeypatch.setattr(module, name, counted(f"{module.__name__}.{name}", getattr(module, name)))
    logits(model)
    # Of two layers: the first layer's first norm alone, and each of the others with the sum before it.
    assert [name.rpartition("swaps.")[2] for name in computed] == [
        "norms.rms_norm",
        *["norms.add_rms_norm", "residuals.add_rms_norm"] * 2,
    ]


def test_a_norm_that_is_given_something_else_computes_it(lab: Any) -> None:
    model = load(lab, "llama")
    x = torch.randn(1, 3, model.config.hidden_size)
    expected = model.model.norm(x)
    for swap in found(model):
        swap.apply()
    logits(model)
    torch.testing.assert_close(model.model.norm(x), expected)
    with torch.inference_mode():
        model.model.layers[-1](x, position_embeddings=model.model.rotary_emb(x, torch.arange(3)[None]))
    torch.testing.assert_close(model.model.norm(x), expected)


def test_layers_of_another_shape_and_those_on_a_cpu_are_left_alone(lab: Any) -> None:
    assert found(load(lab, "gemma2")) == []
    model = load(lab, "llama")
    assert all(verify(swap) for swap in norms.find(model, everywhere=True))
    assert residuals.find(model, partial(logits, model)) == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sums_verify_on_a_gpu(lab: Any, dtype: torch.dtype) -> None:
    swaps = found(load(lab, "llama", dtype).cuda())
    assert len(swaps) == 2
    assert all(verify(swap) for swap in swaps)
