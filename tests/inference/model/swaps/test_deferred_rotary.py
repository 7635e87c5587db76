from functools import partial
from typing import Any

import pytest
import torch
from softprompt_inference.model.attention import ATTENTION, CallRecorder, attach, detach, leave_rotary
from softprompt_inference.model.swaps import deferred_rotary, rotary
from softprompt_inference.model.swaps.verify import Swap, verify
from torch import Tensor
from transformers import AutoModelForCausalLM


def load(lab: Any, name: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(lab.model(name), attn_implementation=ATTENTION).eval()


@torch.inference_mode()
def logits(model: Any) -> tuple[Tensor, CallRecorder]:
    """And the calls for attention that led to them."""
    recorder = CallRecorder()
    for module in model.modules():
        attach(module, recorder)
    ids = torch.randint(3, 256, (1, 30), generator=torch.Generator().manual_seed(0))
    try:
        return model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=False).logits, recorder
    finally:
        for module in model.modules():
            detach(module)


def found(model: Any) -> list[Swap]:
    for swap in rotary.find(model, everywhere=True):
        assert verify(swap)
    return deferred_rotary.find(model, partial(logits, model), everywhere=True)


@pytest.mark.parametrize(("name", "num_swaps"), [("llama", 2), ("mistral", 2), ("qwen3", 2), ("phi3", 2)])
def test_the_attention_call_turns_queries_and_keys(lab: Any, name: str, num_swaps: int) -> None:
    model = load(lab, name)
    expected, recorder = logits(model)
    assert all(call.rotary is None for _, call in recorder.calls)
    swaps = found(model)
    assert len(swaps) == num_swaps
    assert all(verify(swap) for swap in swaps)
    actual, recorder = logits(model)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert [call.rotary is not None for _, call in recorder.calls] == [True] * num_swaps
    for swap in swaps:
        swap.undo()
    _, recorder = logits(model)
    assert all(call.rotary is None for _, call in recorder.calls)


def test_models_without_our_rotary_embedding_are_left_alone(lab: Any) -> None:
    assert found(load(lab, "gpt2")) == []
    model = load(lab, "llama")
    assert deferred_rotary.find(model, partial(logits, model), everywhere=True) == []
    for swap in rotary.find(model, everywhere=True):
        swap.apply()
    assert deferred_rotary.find(model, partial(logits, model)) == []


@pytest.mark.parametrize("left", [[], ["q"], ["k"]])
def test_a_model_that_computes_with_what_was_left_is_left_alone(
    lab: Any, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        # As if the model made another tensor of the one, the other or both.
        leave_rotary(q if "q" in left else q.clone(), k if "k" in left else k.clone(), cos, sin)

    model = load(lab, "llama")
    expected, _ = logits(model)
    swaps = found(model)
    monkeypatch.setattr(deferred_rotary, "leave_rotary", leave)
    assert not any(verify(swap) for swap in swaps)
    monkeypatch.undo()
    torch.testing.assert_close(logits(model)[0], expected, rtol=1e-4, atol=1e-4)
