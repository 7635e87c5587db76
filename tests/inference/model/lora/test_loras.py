from dataclasses import replace
from typing import Any

import pytest
import torch
from softprompt_api.errors import AdapterInvalid, InvalidArgument
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import LoadLora, LoraModule
from softprompt_inference.model.attention import CallRecorder, attach, detach
from softprompt_inference.model.loader import LoadedModel, load_model
from softprompt_inference.model.lora.context import build_tiles, is_attached
from softprompt_inference.model.lora.loras import Loras, plan_fixed_bytes
from softprompt_inference.model.lora.weights import ProductWeights
from softprompt_inference.model.swaps.verify import relative_error
from softprompt_inference.model.transfer import PIECE_BYTES
from softprompt_kernels import native
from softprompt_kernels.native import memory
from torch import Tensor

CPU = torch.device("cpu")
Q = "model.layers.0.self_attn.q_proj"


def load(lab: Any, name: str = "llama", dtype: str = "float32") -> LoadedModel:
    config = EngineConfig(model_path=str(lab.model(name)), device="cpu", dtype=dtype)
    return load_model(config, lambda _: None)


def make_loras(loaded: LoadedModel) -> Loras:
    return Loras(loaded.model, loaded.linears, loaded.lora, max_loras=4, device=CPU)


def fill(loras: Loras, slot: int, load_lora: LoadLora) -> None:
    """Load every piece."""
    list(loras.load(slot, load_lora))


def values(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def lora(
    loaded: LoadedModel, *, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 0.5
) -> LoadLora:
    """Random weights for every linear."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for rank, linear in enumerate(loaded.linears, start=1):
        a = torch.randn(rank, linear.in_features, generator=generator) * linear.in_features**-0.5
        b = torch.randn(linear.out_features, rank, generator=generator) * rank**-0.5
        modules.append(
            LoraModule(name=linear.name, rank=rank, scale=scale, a=values(a.to(dtype)), b=values(b.to(dtype)))
        )
    return LoadLora(digest="sha256:x", modules=modules, dtype=str(dtype).removeprefix("torch."))


def logits(loaded: LoadedModel, x: Tensor, slots: list[int]) -> Tensor:
    for spec in loaded.layers:
        attach(spec.module, CallRecorder())
    loaded.lora.tiles = build_tiles(slots, CPU)
    try:
        with torch.inference_mode():
            answer: Tensor = loaded.model(inputs_embeds=x, use_cache=False).logits
            return answer
    finally:
        loaded.lora.tiles = None
        for spec in loaded.layers:
            detach(spec.module)


def test_memory_of_a_dropped_lora_is_the_next_ones(lab: Any, pairs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(lab, dtype="bfloat16")
    loras, x = make_loras(loaded), torch.randn(1, 3, loaded.hidden_size).bfloat16()
    sizes, make_region = [], memory._map

    def noted(size: int) -> Any:
        sizes.append(size)
        return make_region(size)

    monkeypatch.setattr(memory, "_map", noted)
    fill(loras, 1, lora(loaded, seed=1))
    wanted, needed = logits(loaded, x, [1] * 3), len(sizes)
    assert needed
    loras.drop(1)
    fill(loras, 3, lora(loaded, seed=2))
    assert relative_error(logits(loaded, x, [3] * 3), wanted) > 0.1
    loras.drop(3)
    fill(loras, 0, lora(loaded, seed=1))
    assert torch.equal(logits(loaded, x, [0] * 3), wanted)
    assert len(sizes) == needed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_dtype_change_the_model_until_they_are_dropped(lab: Any, dtype: torch.dtype) -> None:
    loaded = load(lab)
    loras, x = make_loras(loaded), torch.randn(1, 5, loaded.hidden_size)
    before = logits(loaded, x, [-1] * 5)
    fill(loras, 2, lora(loaded, dtype=dtype))
    assert torch.equal(logits(loaded, x, [-1] * 5), before)
    assert relative_error(logits(loaded, x, [2] * 5), before) > 0.1
    loras.drop(2)
    assert torch.equal(logits(loaded, x, [2] * 5), before)
    assert not any(is_attached(product.module) for product in loras.products)


def test_a_slot_is_filled_piece_by_piece_and_the_others_compute_on(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(lab)
    loras, x = make_loras(loaded), torch.randn(1, 5, loaded.hidden_size)
    fill(loras, 0, lora(loaded))
    before = logits(loaded, x, [0] * 5)
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1)
    num_pieces = 0
    for _ in loras.load(1, lora(loaded, seed=1)):
        num_pieces += 1
        assert torch.equal(logits(loaded, x, [0] * 5), before)
    assert num_pieces == 1 + len(loaded.linears)  # in the first, it is checked
    assert relative_error(logits(loaded, x, [1] * 5), before) > 0.1
    loras.drop(0)
    loras.drop(1)
    for _ in zip(range(3), loras.load(1, lora(loaded, seed=1)), strict=False):
        pass  # given up
    loras.drop(1)
    assert not any(is_attached(product.module) for product in loras.products)


@pytest.mark.parametrize("with_kernels", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_in_bfloat16_a_lora_is_as_exact_as_the_model(
    lab: Any, name: str, with_kernels: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused layers and packed weights included; beside the same in float32, no further off than without a LoRA."""
    if with_kernels:
        request.getfixturevalue("native_kernels")
    else:
        monkeypatch.setattr(native, "_library", None)
    exact, rounded = load(lab, name), load(lab, name, "bfloat16")
    x = torch.randn(1, 9, exact.hidden_size, generator=torch.Generator().manual_seed(1)).bfloat16()
    for loaded in (exact, rounded):
        fill(make_loras(loaded), 1, lora(loaded, dtype=torch.bfloat16, scale=0.05))
    without, with_lora = (
        relative_error(logits(rounded, x, slots).float(), logits(exact, x.float(), slots))
        for slots in ([-1] * 9, [1] * 9)
    )
    assert with_lora < max(1.5 * without, 0.02)


def test_slots_of_a_fixed_rank_have_their_memory_at_once_and_for_good(lab: Any) -> None:
    loaded, growing = load(lab), load(lab)
    fixed = Loras(loaded.model, loaded.linears, loaded.lora, max_loras=3, device=CPU, fixed_rank=14)
    weights: list[Any] = fixed._weights
    addresses = [(each._a.data_ptr(), each._b.data_ptr()) for each in weights]
    planned = plan_fixed_bytes(loaded.linears, max_loras=3, max_rank=14, free_bytes=2**30)
    assert fixed.num_bytes == planned
    grown, x = make_loras(growing), torch.randn(1, 5, loaded.hidden_size)
    for slot in (2, 0, 2):
        for loras, model in ((fixed, loaded), (grown, growing)):
            fill(loras, slot, lora(model, seed=slot))
        assert relative_error(logits(loaded, x, [slot] * 5), logits(growing, x, [slot] * 5)) < 1e-5
        for loras in (fixed, grown):
            loras.drop(slot)
        assert [(each._a.data_ptr(), each._b.data_ptr()) for each in weights] == addresses
    assert relative_error(logits(loaded, x, [2] * 5), logits(growing, x, [2] * 5)) < 1e-5


def test_without_slots_the_model_is_left_alone(lab: Any) -> None:
    loaded = load(lab)
    loras = Loras(loaded.model, loaded.linears, loaded.lora, max_loras=0, device=CPU)
    assert (loras.products, loras.num_bytes) == ([], 0)
    runner = lab.runner(lab.model("llama"), max_loras=0)
    assert runner.lora_bytes == 0


def test_slots_that_do_not_fit_are_refused_with_the_figures(lab: Any) -> None:
    linears = load(lab).linears
    values = sum(linear.in_features + linear.out_features for linear in linears)
    assert plan_fixed_bytes(linears, max_loras=5, max_rank=7, free_bytes=5 * 7 * 4 * values) == 5 * 7 * 4 * values
    with pytest.raises(InvalidArgument, match=r"1024 LoRAs of rank 1024 take .* GiB .*leave 0.50 GiB") as caught:
        plan_fixed_bytes(linears, max_loras=1024, max_rank=1024, free_bytes=2**29)
    assert caught.value.field == "max_loras"
    with pytest.raises(InvalidArgument, match=r"leave 0.00 GiB"):
        plan_fixed_bytes(linears, max_loras=1, max_rank=1, free_bytes=-(2**30))


def test_a_module_that_the_model_lacks_is_named(lab: Any) -> None:
    loaded = load(lab)
    load_lora = lora(loaded)
    [first, *others] = load_lora.modules
    for name, message in (
        ("model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.q_proj, which the model does not have"),
        ("lm_head", "module lm_head is not a linear layer"),
        ("model.embed_tokens", "module model.embed_tokens is not a linear layer"),
        ("model.layers.0.mlp", "module model.layers.0.mlp is not a linear layer"),
        ("", "which the model does not have"),
    ):
        with pytest.raises(AdapterInvalid, match=message):
            fill(make_loras(loaded), 0, replace(load_lora, modules=[*others, replace(first, name=name)]))


def test_weights_of_another_shape_are_refused_and_leave_nothing(lab: Any) -> None:
    loaded = load(lab)
    loras, load_lora = make_loras(loaded), lora(loaded)
    [first, *others] = load_lora.modules
    assert first.name == Q
    for changes, message in (
        ({"a": first.a[:-4]}, rf"lora_A of module {Q} has 31 values; rank 1 needs \[1, 32\]"),
        ({"b": first.b + first.b}, rf"lora_B of module {Q} has 64 values; rank 1 needs \[32, 1\]"),
        ({"rank": 2}, r"rank 2 needs \[2, 32\]"),
    ):
        with pytest.raises(AdapterInvalid, match=message):
            fill(loras, 0, replace(load_lora, modules=[*others, replace(first, **changes)]))
    assert not any(is_attached(product.module) for product in loras.products)


def test_a_device_without_room_is_left_as_it_was(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load(lab)
    loras, x = make_loras(loaded), torch.randn(1, 5, loaded.hidden_size)
    fill(loras, 0, lora(loaded))
    before = logits(loaded, x, [0] * 5)
    put, calls = ProductWeights.put, []

    def put_some(self: ProductWeights, *args: Any) -> None:
        calls.append(args)
        if len(calls) > 9:
            raise MemoryError
        put(self, *args)

    monkeypatch.setattr(ProductWeights, "put", put_some)
    with pytest.raises(MemoryError):
        fill(loras, 1, lora(loaded, seed=1))
    loras.drop(1)
    assert torch.equal(logits(loaded, x, [0] * 5), before)
    # A step with a LoRA goes another way through fused parts, in which it changes nothing here.
    assert relative_error(logits(loaded, x, [1] * 5), logits(loaded, x, [-1] * 5)) < 1e-5
