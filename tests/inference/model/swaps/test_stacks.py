"""A stack answers as its layers do one by one, to the last bit, and makes way where it cannot."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.attention import (
    CallRecorder,
    StepContext,
    attach,
    attach_pages,
    build_step_batch,
    detach,
)
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.source import native_kernels_dir
from softprompt_inference.model.swaps import layers, stacks
from softprompt_inference.model.swaps.verify import verify
from softprompt_kernels import native
from softprompt_kernels.native.layer import DecoderLayers
from softprompt_kernels.paged_attention import reference
from torch import Tensor

_PAGE_SIZE = 4
# Decodes, pieces of prompts that end inside pages, and both; (first position, tokens, pages) of each sequence.
_STEPS: tuple[Sequence[tuple[int, int, Sequence[int]]], ...] = (
    [(0, 7, [3, 1]), (0, 1, [2])],
    [(7, 1, [3, 1]), (1, 6, [2, 5])],
    [(8, 1, [3, 1, 0]), (7, 1, [2, 5])],
    [(8, 9, [2, 5, 4, 7, 6])],
    # And decodes that have a long beginning in common.
    [(0, 70, range(8, 26))],
    [(70, 1, range(8, 26)), (68, 1, [*range(8, 25), 6]), (9, 1, [3, 1, 0])],
)
_PREFIX_LENS = (*[()] * 5, (68, 68, 0))


pytestmark = pytest.mark.usefixtures("native_kernels")


def load(lab: Any, kind: str, dtype: torch.dtype = torch.bfloat16) -> LoadedModel:
    """A model of weights in bfloat16."""
    path = lab.model(kind, torch.bfloat16)
    config = EngineConfig(model_path=str(path), device="cpu", dtype=str(dtype).removeprefix("torch."))
    return load_model(config, lambda _: None)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of a stack computed."""
    found: list[int] = []
    original = DecoderLayers.__call__

    def counted(self: DecoderLayers, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        found.append(len(hidden))
        return original(self, hidden, *args, **kwargs)

    monkeypatch.setattr(DecoderLayers, "__call__", counted)
    return found


def without_stacks(loaded: LoadedModel) -> LoadedModel:
    loaded.model.__dict__.pop("forward", None)  # see whole_model
    for module in loaded.model.modules():
        forward = module.__dict__.get("forward")
        owner = getattr(getattr(forward, "func", forward), "__self__", None)
        if isinstance(owner, stacks.Stack):
            index = forward.args[0] if hasattr(forward, "args") else 0
            module.__dict__["forward"] = owner.forwards[index]
    return loaded


def answers(loaded: LoadedModel, slots: Sequence[int] = ()) -> list[Tensor]:
    """Logits of all tokens of _STEPS, one step after the other over the same pages.

    Args:
        slots: of the LoRAs that the tokens of each step use in turn; empty: none.
    """
    context, found = StepContext(), []
    attach_pages(
        loaded.layers, context, num_pages=26, page_size=_PAGE_SIZE, dtype=loaded.dtype, device=loaded.device
    )
    generator = torch.Generator().manual_seed(0)
    for spans, prefix_lens in zip(_STEPS, _PREFIX_LENS, strict=True):
        context.batch = build_step_batch(
            spans, page_size=_PAGE_SIZE, device=loaded.device, prefix_lens=prefix_lens
        )
        positions = torch.cat([torch.arange(start, start + count) for start, count, _ in spans])
        x = torch.randn(len(positions), loaded.hidden_size, generator=generator).to(loaded.dtype)
        used = [slots[token % len(slots)] for token in range(len(x))] if slots else [-1]
        loaded.lora.tiles = build_tiles(used, loaded.device)
        with torch.inference_mode():
            found.append(loaded.logits(x, positions, torch.arange(len(positions))))
    loaded.lora.tiles = None
    for layer in loaded.layers:
        detach(layer.module)
    return found


# Several queries have a kernel in bfloat16 only for heads of a multiple of 32. For other heads those of
# short prompts are answered one by one, and a stack makes way for the rest.
@pytest.mark.parametrize(
    ("kind", "most_one_by_one", "tokens"),
    [
        ("llama_wide", 0, [8, 7, 2, 9, 70, 3]),
        # Layers with a window and those without stand in stacks of their own.
        ("qwen2_windows", 0, [8, 8, 7, 7, 2, 2, 9, 9, 70, 70, 3, 3]),
        ("llama", 0, [2, 3]),
        ("mistral", 0, [2, 3]),
        ("qwen2", 0, [2, 3]),
        ("llama", 9 * 17, [8, 7, 2, 9, 3]),
    ],
)
@pytest.mark.usefixtures("pairs")
def test_a_model_answers_the_same_with_stacks_and_without(
    lab: Any,
    kind: str,
    most_one_by_one: int,
    tokens: list[int],
    calls: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reference, "_MIN_PREFIX", 64)
    monkeypatch.setattr(reference, "_MAX_ONE_BY_ONE", most_one_by_one)
    loaded = load(lab, kind)
    calls.clear()
    stacked = answers(loaded)
    assert calls == tokens
    for one, other in zip(stacked, answers(without_stacks(loaded)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("wide")
def test_in_float32_a_stack_computes_steps_with_short_prompts(lab: Any, calls: list[int]) -> None:
    loaded = load(lab, "llama", torch.float32)
    calls.clear()
    stacked = answers(loaded)
    assert calls == [8, 7, 2, 9, 70, 3]
    for one, other in zip(stacked, answers(without_stacks(loaded)), strict=True):
        assert torch.equal(one, other)


def test_a_stack_computes_loras_as_its_layers_do(
    lab: Any, calls: list[int], load_loras: Any, dtype: torch.dtype
) -> None:
    loaded = load(lab, "llama_wide", dtype)
    load_loras(loaded)
    plain = answers(loaded)
    calls.clear()
    stacked = answers(loaded, slots=[2, -1, 0])
    assert calls == [len(logits) for logits in stacked]
    assert not torch.equal(stacked[0], plain[0])
    for one, other in zip(stacked, answers(without_stacks(loaded), slots=[2, -1, 0]), strict=True):
        assert torch.equal(one, other)


def test_steps_that_do_not_fit_go_through_the_layers(lab: Any, calls: list[int], dtype: torch.dtype) -> None:
    loaded = load(lab, "llama", dtype)
    for spec in loaded.layers:
        attach(spec.module, CallRecorder())
    x = torch.randn(1, 3, loaded.hidden_size, generator=torch.Generator().manual_seed(0)).to(loaded.dtype)
    calls.clear()
    with torch.inference_mode():
        plain = loaded.model(inputs_embeds=x, use_cache=False).logits
        loaded.lora.tiles = build_tiles([0, 0, 0], loaded.device)
        with_tiles = loaded.model(inputs_embeds=x, use_cache=False).logits
    loaded.lora.tiles = None
    assert calls == []
    assert plain.shape == with_tiles.shape


def test_layers_of_another_shape_stand_in_no_stack(lab: Any, calls: list[int], dtype: torch.dtype) -> None:
    loaded = load(lab, "qwen3", dtype)
    calls.clear()
    answers(loaded)
    assert calls == []


def test_a_stack_that_computes_something_else_is_undone(
    lab: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "find", lambda *_: [])
    loaded = load(lab, "llama", dtype)
    monkeypatch.undo()
    native.load(native_kernels_dir())
    original = DecoderLayers.__call__
    monkeypatch.setattr(
        DecoderLayers, "__call__", lambda self, hidden, *args, **kw: original(self, hidden * 2, *args, **kw)
    )
    before = [layers.fused_forward(module) for module in loaded.model.modules()]

    def run() -> None:
        for spec in loaded.layers:
            attach(spec.module, CallRecorder())
        loaded.model(inputs_embeds=torch.ones(1, 3, loaded.hidden_size, dtype=loaded.dtype), use_cache=False)

    [swap] = stacks.find(loaded.model, run)
    assert not verify(swap)
    assert [layers.fused_forward(module) for module in loaded.model.modules()] == before
