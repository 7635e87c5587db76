"""LoRAs for a loaded model."""

from collections.abc import Callable

import pytest
import torch
from softprompt_inference.engine.messages import LoadLora, LoraModule
from softprompt_inference.model.loader import LoadedModel
from softprompt_inference.model.lora.loras import Loras


@pytest.fixture
def load_loras() -> Callable[[LoadedModel], Loras]:
    """`load_loras(loaded)`: random LoRAs of all linears in the slots 0 and 2."""

    def load(loaded: LoadedModel) -> Loras:
        loras = Loras(loaded.model, loaded.linears, loaded.lora, max_loras=4, device=torch.device("cpu"))
        for slot in (0, 2):
            list(loras.load(slot, _lora(loaded, slot)))
        return loras

    return load


def _lora(loaded: LoadedModel, seed: int) -> LoadLora:
    """Random weights in bfloat16 for every linear, of rank 5."""
    generator = torch.Generator().manual_seed(seed)
    modules = []
    for linear in loaded.linears:
        shapes = ((5, linear.in_features), (linear.out_features, 5))
        a, b = (
            (torch.randn(*shape, generator=generator) * shape[1] ** -0.5).bfloat16().view(torch.uint8).numpy()
            for shape in shapes
        )
        modules.append(LoraModule(name=linear.name, rank=5, scale=0.5, a=a.tobytes(), b=b.tobytes()))
    return LoadLora(digest=f"sha256:{seed}", modules=modules, dtype="bfloat16")
