"""A model in one piece answers as transformers' code does over the same layers, and makes way where it cannot."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model.attention import CallRecorder, StepContext, attach, attach_pages, build_step_batch
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.swaps import whole_model
from softprompt_inference.model.swaps.verify import Swap, verify
from torch import Tensor

pytestmark = pytest.mark.usefixtures("native_kernels")

_PAGE_SIZE = 4
# (first position, tokens, pages) of each sequence: prompts, and decodes behind them.
_STEPS: Any = ([(0, 7, [3, 1]), (0, 2, [2])], [(7, 1, [3, 1]), (2, 1, [2])])
# Past the first block of the rotary embedding's tables.
_LONG_STEPS: Any = ([(0, 1022, range(257))], [(1022, 3, range(257)), (0, 1, [257])])


def load(lab: Any, kind: str, dtype: torch.dtype) -> LoadedModel:
    """A model of weights in bfloat16."""
    config = EngineConfig(
        model_path=str(lab.model(kind, torch.bfloat16)),
        device="cpu",
        dtype=str(dtype).removeprefix("torch."),
    )
    return load_model(config, lambda _: None)


def is_whole(loaded: LoadedModel) -> bool:
    return isinstance(loaded.model.__dict__.get("forward"), whole_model._Forward)


def plain_calls(loaded: LoadedModel) -> list[None]:
    """One for each call from now on that goes through transformers' code."""
    calls: list[None] = []
    loaded.model.get_decoder().register_forward_pre_hook(lambda *_: calls.append(None))
    return calls


def answers(loaded: LoadedModel, steps: Any = _STEPS, *, slots: Sequence[int] = ()) -> list[Tensor]:
    """Logits of all tokens of each step, one behind the other over the same pages, and of the last one's alone.

    Args:
        slots: of the LoRAs that the tokens use in turn; empty: none.
    """
    context, found = StepContext(), []
    attach_pages(
        loaded.layers, context, num_pages=258, page_size=_PAGE_SIZE, dtype=loaded.dtype, device=loaded.device
    )
    generator = torch.Generator().manual_seed(0)
    for spans in steps:
        context.batch = build_step_batch(spans, page_size=_PAGE_SIZE, device=loaded.device)
        positions = context.batch.positions
        x = torch.randn(len(positions), loaded.hidden_size, generator=generator).to(loaded.dtype)
        used = [slots[token % len(slots)] for token in range(len(x))] if slots else [-1]
        loaded.lora.tiles = build_tiles(used, loaded.device)
        with torch.inference_mode():
            for rows in (torch.arange(len(x)), torch.tensor([len(x) - 1])):
                found.append(loaded.logits(x, positions, rows))
    loaded.lora.tiles = None
    return found


def without(loaded: LoadedModel) -> LoadedModel:
    """The same with transformers' own code from the embeddings to the logits."""
    del loaded.model.__dict__["forward"]
    return loaded


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(kind, _STEPS) for kind in ("llama", "mistral", "qwen2")]
    + [(kind, _LONG_STEPS) for kind in ("llama_wide", "llama_dynamic")],
)
def test_a_model_in_one_piece_answers_the_same(lab: Any, kind: str, steps: Any, dtype: torch.dtype) -> None:
    loaded = load(lab, kind, dtype)
    assert is_whole(loaded)
    calls = plain_calls(loaded)
    whole = answers(loaded, steps)
    assert calls == []
    plain = answers(without(loaded), steps)
    assert len(calls) == len(plain)
    for one, other in zip(whole, plain, strict=True):
        assert torch.equal(one, other)


def test_loras_join_in(lab: Any, load_loras: Any, dtype: torch.dtype) -> None:
    loaded = load(lab, "llama", dtype)
    load_loras(loaded)
    base, whole = answers(loaded), answers(loaded, slots=[2, -1, 0])
    assert not torch.equal(whole[0], base[0])
    for one, other in zip(whole, answers(without(loaded), slots=[2, -1, 0]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "phi3", "qwen2_windows"])
def test_models_of_another_shape_are_left_alone(lab: Any, kind: str, dtype: torch.dtype) -> None:
    assert not is_whole(load(lab, kind, dtype))


def test_a_head_whose_logits_are_changed_behind_it_is_left_alone(
    lab: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = without(load(lab, "llama", dtype))
    original = type(loaded.model).forward

    def scaled(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        answer.logits = answer.logits * 2
        return answer

    monkeypatch.setattr(type(loaded.model), "forward", scaled)
    assert find(loaded) == []


def test_embeddings_that_are_changed_before_the_layers_are_left_alone(
    lab: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = without(load(lab, "llama", dtype))
    decoder = type(loaded.model.get_decoder())
    original = decoder.forward

    def scaled(self: Any, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        return original(self, *args, inputs_embeds=inputs_embeds * 2, **kwargs)

    monkeypatch.setattr(decoder, "forward", scaled)
    assert find(loaded) == []


def test_what_answers_otherwise_is_undone(lab: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = without(load(lab, "llama", dtype))
    [swap] = find(loaded)
    original = whole_model._Tables.find
    monkeypatch.setattr(whole_model._Tables, "find", lambda self, x, positions: original(self, x, positions * 2))
    assert not verify(swap)
    assert not is_whole(loaded)


def test_calls_of_another_kind_go_through_transformers_code(lab: Any, dtype: torch.dtype) -> None:
    loaded = load(lab, "llama", dtype)
    calls = plain_calls(loaded)
    embeddings = torch.ones(1, 3, loaded.hidden_size, dtype=loaded.dtype)
    run(loaded)
    assert len(calls) == 1
    for spec in loaded.layers:
        attach(spec.module, CallRecorder())
    with torch.inference_mode():
        positions = torch.arange(3)[None]
        whole = loaded.model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        last = loaded.model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, logits_to_keep=1)
        by_ids = loaded.model(input_ids=torch.ones(1, 3, dtype=torch.int64), use_cache=False)
    assert len(calls) == 4
    assert torch.equal(whole.logits[:, -1:], last.logits)
    assert by_ids.logits.shape == whole.logits.shape


def find(loaded: LoadedModel) -> list[Swap]:
    return whole_model.find(loaded.model, lambda: run(loaded), max_positions=loaded.max_positions)


def run(loaded: LoadedModel) -> None:
    """As the loader runs a model to see what it does: outside steps."""
    for spec in loaded.layers:
        attach(spec.module, CallRecorder())
    with torch.inference_mode():
        loaded.model(inputs_embeds=torch.ones(1, 3, loaded.hidden_size, dtype=loaded.dtype), use_cache=False)
