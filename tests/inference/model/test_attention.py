from typing import Any

import pytest
import torch
from softprompt_inference.model.attention import (
    AttentionCall,
    CallRecorder,
    LayerSpec,
    PagedLayer,
    StepContext,
    attach,
    attach_pages,
    attention_forward,
    build_step_batch,
    detach,
    page_bytes,
)
from torch import Tensor, nn

CPU = torch.device("cpu")


def spec(module: nn.Module, *, num_kv_heads: int = 2, head_dim: int = 8) -> LayerSpec:
    return LayerSpec(module=module, num_heads=4, num_kv_heads=num_kv_heads, head_dim=head_dim, sliding_window=None)


def qkv(num_tokens: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """As transformers passes them: [1, heads, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, heads, num_tokens, 8, generator=generator) for heads in (4, 2, 2))
    return q, k, v


def whole_answer(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """[1, T, H, D] of one sequence without pages."""
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    answer = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
    return answer.transpose(1, 2)


def test_a_step_lays_sequences_side_by_side() -> None:
    batch = build_step_batch([(4, 1, [7, 9]), (0, 3, [2]), (3, 4, [5, 1, 6])], page_size=4, device=CPU)
    assert batch.slots.tolist() == [36, 8, 9, 10, 23, 4, 5, 6]
    assert batch.page_table.tolist() == [[7, 9], [2, 0], [5, 1]]
    assert batch.query_start.tolist() == [0, 1, 4, 8]
    assert batch.context_lens.tolist() == [5, 3, 7]


def test_pages_beyond_the_context_are_left_out() -> None:
    batch = build_step_batch([(0, 4, [1, 2, 3])], page_size=4, device=CPU)
    assert batch.page_table.tolist() == [[1]]


def test_a_sequence_in_pieces_gets_what_it_gets_whole() -> None:
    module, context = nn.Module(), StepContext()
    attach_pages([spec(module)], context, num_pages=8, page_size=4, dtype=torch.float32, device=CPU)
    q, k, v = qkv(11)
    pieces = []
    for first, end in ((0, 5), (5, 6), (6, 11)):
        context.batch = build_step_batch([(first, end - first, [6, 0, 3])], page_size=4, device=CPU)
        answer, weights = attention_forward(
            module, q[:, :, first:end], k[:, :, first:end], v[:, :, first:end], None, scaling=0.3
        )
        assert weights is None
        pieces.append(answer)
    torch.testing.assert_close(torch.cat(pieces, 1), whole_answer(q, k, v, scale=0.3))


def test_the_scale_defaults_to_that_of_the_head_dimension() -> None:
    module, recorder = nn.Module(), CallRecorder()
    attach(module, recorder)
    q, k, v = qkv(3)
    answer, _ = attention_forward(module, q, k, v, None)
    torch.testing.assert_close(answer, whole_answer(q, k, v))
    assert recorder.calls[0][1].scale == 8**-0.5


def test_layers_with_one_window_share_a_plan() -> None:
    batch = build_step_batch([(0, 6, [0, 1])], page_size=4, device=CPU)
    keys = torch.zeros(2, 4, 2, 8)
    plan = batch.plan(None, keys, is_plain=True)
    assert batch.plan(None, keys, is_plain=True) is plan
    assert batch.plan(3, keys, is_plain=True) is not plan


def test_every_layer_has_pages_of_its_own() -> None:
    modules, context = [nn.Module(), nn.Module()], StepContext()
    layers = [spec(modules[0]), spec(modules[1], num_kv_heads=1, head_dim=16)]
    attach_pages(layers, context, num_pages=3, page_size=4, dtype=torch.bfloat16, device=CPU)
    first, second = (module.softprompt_attention for module in modules)
    assert isinstance(first, PagedLayer)
    assert first is not second
    assert page_bytes(layers, page_size=4, dtype=torch.bfloat16) == 2 * 4 * (2 * 8 + 16) * 2


def test_queries_in_another_dtype_are_cast_to_that_of_the_pages() -> None:
    module, context = nn.Module(), StepContext()
    attach_pages([spec(module)], context, num_pages=2, page_size=4, dtype=torch.bfloat16, device=CPU)
    context.batch = build_step_batch([(0, 4, [1])], page_size=4, device=CPU)
    q, k, v = qkv(4)
    answer, _ = attention_forward(module, q, k, v.bfloat16(), None)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, whole_answer(q, k, v), atol=0.03, rtol=0.03)


def test_a_model_that_runs_outside_a_step_is_stopped() -> None:
    module = nn.Module()
    attach_pages([spec(module)], StepContext(), num_pages=1, page_size=4, dtype=torch.float32, device=CPU)
    with pytest.raises(AssertionError, match="outside a step"):
        attention_forward(module, *qkv(1), None)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_mask": torch.zeros(1)}, "mask"),
        ({"is_causal": False}, "later tokens"),
        ({"position_bias": torch.zeros(1)}, "position bias"),
    ],
)
def test_what_pages_cannot_answer_is_noted(options: dict[str, Any], reason: str) -> None:
    module, recorder = nn.Module(), CallRecorder()
    attach(module, recorder)
    answer, _ = attention_forward(module, *qkv(2), **{"attention_mask": None, **options})
    call: AttentionCall = recorder.calls[0][1]
    assert reason in call.unsupported
    assert answer.shape == (1, 2, 4, 8)


def test_detaching_twice_is_harmless() -> None:
    module = nn.Module()
    attach(module, CallRecorder())
    detach(module)
    detach(module)
    assert not hasattr(module, "softprompt_attention")
