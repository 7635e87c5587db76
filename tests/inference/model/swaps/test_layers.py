"""A fused decoder layer answers as the layer's own code does, and only layers it fits are replaced."""

from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.attention import CallRecorder, attach, detach
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.swaps import layers, stacks
from softprompt_inference.model.swaps.verify import relative_error, verify
from softprompt_kernels import native


@pytest.fixture(autouse=True)
def kernels(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The native kernels, of which every part of a fused layer is one."""
    monkeypatch.setattr(native, "_library", None)
    try:
        native.load(lab.folder / "kernels")
    except native.CannotCompile as error:
        pytest.skip(str(error))
    if not native.supports_linear(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this processor does not multiply pairs of bfloat16")


def load(lab: Any, kind: str, dtype: str = "bfloat16") -> LoadedModel:
    config = EngineConfig(model_path=str(lab.model(kind)), device="cpu", dtype=dtype)
    return load_model(config, lambda _: None)


@pytest.fixture(autouse=True)
def no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave each layer its own forward."""
    monkeypatch.setattr(stacks, "find", lambda *_: [])


def fused(loaded: LoadedModel) -> list[torch.nn.Module]:
    """The layers whose forward is the fused one."""
    return [module for module in loaded.model.modules() if layers.fused_forward(module) is not None]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_layers_of_llamas_shape_are_fused(lab: Any, kind: str) -> None:
    loaded = load(lab, kind)
    assert len(fused(loaded)) == len(loaded.layers)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3", "gpt2"])
def test_layers_of_another_shape_are_left_alone(lab: Any, kind: str) -> None:
    assert fused(load(lab, kind)) == []


def test_layers_in_float32_are_left_alone(lab: Any) -> None:
    assert fused(load(lab, "llama", "float32")) == []


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 40])
def test_a_model_answers_as_without_fused_layers(lab: Any, num_tokens: int) -> None:
    loaded = load(lab, "llama")
    x = torch.randn(1, num_tokens, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    replaced = _logits(loaded, x)
    for layer in fused(loaded):
        del layer.__dict__["forward"]
    assert relative_error(replaced, _logits(loaded, x)) < 1e-2


def test_a_token_has_the_same_answer_in_any_batch(lab: Any) -> None:
    """In bfloat16 too, where a sum in another order would round differently."""
    loaded = load(lab, "llama")
    [layer, *_] = fused(loaded)
    x = torch.randn(30, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos, sin = torch.randn(2, 30, loaded.layers[0].head_dim, generator=torch.Generator().manual_seed(1)).bfloat16()
    decoder = _decoder(layer)
    with torch.inference_mode():
        q, k, v = decoder.before(x, cos, sin)
        for start, stop in ((0, 1), (7, 20), (29, 30)):
            some = decoder.before(x[start:stop].clone(), cos[start:stop], sin[start:stop])
            for part, whole in zip(some, (q, k, v), strict=True):
                assert torch.equal(part, whole[start:stop])
            assert torch.equal(
                decoder.after(q[start:stop].clone(), x[start:stop].clone()), decoder.after(q, x)[start:stop]
            )


def test_a_layer_that_computes_something_else_is_undone(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(lab, "llama")
    for layer in fused(loaded):
        del layer.__dict__["forward"]
    before = layers.DecoderLayer.before

    def wrong(self: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        q, k, v = before(self, hidden, cos, sin)
        return q, k, v + 1

    monkeypatch.setattr(layers.norms, "is_fused", lambda _: True)
    monkeypatch.setattr(layers.DecoderLayer, "before", wrong)
    swaps = layers.find(loaded.model, loaded.lora)
    assert len(swaps) == len(loaded.layers)
    assert not any(verify(swap) for swap in swaps)
    assert fused(loaded) == []


def _decoder(layer: Any) -> layers.DecoderLayer:
    forward = layers.fused_forward(layer)
    assert forward is not None
    return forward.decoder


def _logits(loaded: LoadedModel, x: torch.Tensor) -> torch.Tensor:
    for spec in loaded.layers:
        attach(spec.module, CallRecorder())
    try:
        with torch.inference_mode():
            logits: torch.Tensor = loaded.model(inputs_embeds=x, use_cache=False).logits
    finally:
        for spec in loaded.layers:
            detach(spec.module)
    return logits
