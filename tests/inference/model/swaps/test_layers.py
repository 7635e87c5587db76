"""A fused decoder layer answers as the layer's own code does, and only layers it fits are replaced."""

from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.attention import CallRecorder, attach, detach
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.swaps import layers, stacks
from softprompt_inference.model.swaps.verify import relative_error, verify
from softprompt_kernels.native.lora import LoraStep, PackedLoras

pytestmark = pytest.mark.usefixtures("native_kernels")


def load(lab: Any, kind: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A model of weights in bfloat16."""
    path = lab.model(kind, torch.bfloat16)
    config = EngineConfig(model_path=str(path), device="cpu", dtype=str(dtype).removeprefix("torch."))
    return load_model(config, lambda _: None)


@pytest.fixture(autouse=True)
def no_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave each layer its own forward."""
    monkeypatch.setattr(stacks, "find", lambda *_: [])


def fused(loaded: LoadedModel) -> list[torch.nn.Module]:
    """The layers whose forward is the fused one."""
    return [module for module in loaded.model.modules() if layers.fused_forward(module) is not None]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_layers_of_llamas_shape_are_fused(lab: Any, kind: str, dtype: torch.dtype) -> None:
    loaded = load(lab, kind, dtype)
    assert len(fused(loaded)) == len(loaded.layers)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "phi3", "gpt2", "llama_widest"])
def test_layers_of_another_shape_are_left_alone(lab: Any, kind: str, dtype: torch.dtype) -> None:
    assert fused(load(lab, kind, dtype)) == []


def test_layers_of_weights_that_need_float32_are_left_alone(lab: Any) -> None:
    config = EngineConfig(model_path=str(lab.model("llama")), device="cpu", dtype="float32")
    assert fused(load_model(config, lambda _: None)) == []


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 40])
def test_a_model_answers_as_without_fused_layers(lab: Any, num_tokens: int, dtype: torch.dtype) -> None:
    loaded = load(lab, "llama", dtype)
    x = torch.randn(1, num_tokens, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    replaced = _logits(loaded, x)
    for layer in fused(loaded):
        del layer.__dict__["forward"]
    assert relative_error(replaced, _logits(loaded, x)) < (1e-5 if dtype == torch.float32 else 1e-2)


def test_a_token_has_the_same_answer_in_any_batch(lab: Any, dtype: torch.dtype) -> None:
    """In bfloat16 too, where a sum in another order would round differently."""
    loaded = load(lab, "llama", dtype)
    [layer, *_] = fused(loaded)
    x = torch.randn(30, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = torch.randn(2, 30, loaded.layers[0].head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
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


def _logits_with(loaded: LoadedModel, x: torch.Tensor, slots: list[int]) -> torch.Tensor:
    loaded.lora.tiles = build_tiles(slots, torch.device("cpu"))
    try:
        return _logits(loaded, x)
    finally:
        loaded.lora.tiles = None


@pytest.mark.parametrize("num_tokens", [1, 2, 13, 40])
def test_a_model_with_loras_answers_as_without_fused_layers(
    lab: Any, load_loras: Any, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(lab, "llama", dtype)
    load_loras(loaded)
    x = torch.randn(1, num_tokens, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots = [2, 0, -1, 2, 1] * 8
    plain, replaced = _logits(loaded, x), _logits_with(loaded, x, slots[:num_tokens])
    assert relative_error(replaced, plain) > 0.1
    calls: list[object] = []
    monkeypatch.setattr(layers.DecoderLayer, "before", lambda *_: calls.append(None))
    for layer in fused(loaded):
        del layer.__dict__["forward"]
    rounding = 1e-5 if dtype == torch.float32 else 1e-2
    assert relative_error(replaced, _logits_with(loaded, x, slots[:num_tokens])) < rounding
    assert calls == []


def test_a_token_has_the_same_answer_beside_any_loras(lab: Any, load_loras: Any, dtype: torch.dtype) -> None:
    loaded = load(lab, "llama", dtype)
    load_loras(loaded)
    decoder = _decoder(fused(loaded)[0])
    x = torch.randn(30, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).to(dtype)
    cos, sin = torch.randn(2, 30, loaded.layers[0].head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    slots = [2, 0, 0, -1, 2, 1] * 5

    def step(start: int, stop: int) -> LoraStep | None:
        tiles = build_tiles(slots[start:stop], torch.device("cpu"))
        return None if tiles is None else LoraStep(tiles)

    with torch.inference_mode():
        whole = decoder.before(x, cos, sin, step(0, 30))
        after = decoder.after(whole[0], x, step(0, 30))
        for start, stop in ((0, 1), (7, 20), (27, 28), (29, 30)):
            own = x[start:stop].clone()
            some = decoder.before(own, cos[start:stop], sin[start:stop], step(start, stop))
            for part, all_of_it in zip(some, whole, strict=True):
                assert torch.equal(part, all_of_it[start:stop])
            assert torch.equal(decoder.after(some[0], own, step(start, stop)), after[start:stop])


def test_parts_that_cannot_add_a_lora_go_one_by_one_in_steps_that_have_one(
    lab: Any, load_loras: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots, calls = [2, 0, -1] * 3, []
    loaded = load(lab, "llama", dtype)
    load_loras(loaded)
    expected = _logits_with(loaded, x, slots)
    monkeypatch.setattr(PackedLoras, "can_hold", lambda _: False)
    loaded = load(lab, "llama", dtype)
    loras = load_loras(loaded)
    before = layers.DecoderLayer.before
    monkeypatch.setattr(layers.DecoderLayer, "before", lambda *args: calls.append(None) or before(*args))
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    assert relative_error(_logits_with(loaded, x, slots), expected) < rounding
    assert calls == []
    for slot in (0, 2):
        loras.drop(slot)
    _logits_with(loaded, x, slots)
    assert len(calls) == len(loaded.layers)


def test_a_layer_that_computes_something_else_is_undone(
    lab: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(lab, "llama", dtype)
    for layer in fused(loaded):
        del layer.__dict__["forward"]
    before = layers.DecoderLayer.before

    def wrong(self: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, step: Any) -> Any:
        q, k, v = before(self, hidden, cos, sin, step)
        return q, k, v + 1

    monkeypatch.setattr(layers.norms, "fused_norm", lambda _: True)
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
