from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from softprompt_inference.model.swaps import norms, residuals
from softprompt_inference.model.swaps.verify import Swap, verify
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(lab: Any, name: str, dtype: torch.dtype = torch.float32) -> Any:
    model = AutoModelForCausalLM.from_pretrained(lab.model(name), dtype=dtype, attn_implementation="eager").eval()
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            # As loaded they are all ones or zeros.
            norm.weight.data += torch.randn(norm.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.2
    return model


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits


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
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    swaps = found(load(lab, "llama", dtype).cuda())
    assert len(swaps) == 2
    assert all(verify(swap) for swap in swaps)
