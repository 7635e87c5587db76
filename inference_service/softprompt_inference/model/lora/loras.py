"""All LoRAs on the device: slots filled from what the engine was sent, and checked against the model."""

import torch
from softprompt_api.errors import AdapterInvalid
from torch import nn

from softprompt_inference.engine.messages import LoadLora, LoraModule
from softprompt_inference.model.hardware import DTYPES
from softprompt_inference.model.lora.context import LoraContext
from softprompt_inference.model.lora.linears import Linear, find_products
from softprompt_inference.model.lora.weights import ProductWeights
from softprompt_inference.model.transfer import upload_bytes


class Loras:
    """The weights of every slot.

    Attributes:
        products: that a LoRA may change.

    Args:
        model: as it serves, swaps made.
        linears: of the model as it was loaded.
        context: of the steps.
        max_loras: slots are 0 … max_loras − 1.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: list[Linear],
        context: LoraContext,
        *,
        max_loras: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._device = device
        self.products = find_products(model, linears)
        self._weights = [ProductWeights(product, context, max_loras, device) for product in self.products]
        self._places = {
            linear.name: (linear, weights, index)
            for product, weights in zip(self.products, self._weights, strict=True)
            for index, linear in enumerate(product.linears)
        }

    def load(self, slot: int, lora: LoadLora) -> None:
        """Fill an empty slot; whatever is raised leaves it empty.

        Raises AdapterInvalid when a module is not in the model, cannot have a LoRA, or has another shape.
        """
        for module in lora.modules:
            self._check(module, DTYPES[lora.dtype].itemsize)
        try:
            for module in lora.modules:
                linear, weights, index = self._places[module.name]
                dtype = DTYPES[lora.dtype]
                a = upload_bytes(module.a, (module.rank, linear.in_features), dtype, self._device)
                b = upload_bytes(module.b, (linear.out_features, module.rank), dtype, self._device)
                weights.put(slot, index, a, b, module.scale)
        except Exception:
            self.drop(slot)
            raise

    def drop(self, slot: int) -> None:
        """Empty a slot."""
        for weights in self._weights:
            weights.drop(slot)

    def _check(self, module: LoraModule, item_bytes: int) -> None:
        if module.name not in self._places:
            raise AdapterInvalid(self._why_not(module.name), field="tensors")
        linear = self._places[module.name][0]
        shapes = {"lora_A": (module.rank, linear.in_features), "lora_B": (linear.out_features, module.rank)}
        for data, (name, (rows, columns)) in zip((module.a, module.b), shapes.items(), strict=True):
            if len(data) != rows * columns * item_bytes:
                raise AdapterInvalid(
                    f"{name} of module {module.name} has {len(data) // item_bytes} values; "
                    f"rank {module.rank} needs [{rows}, {columns}] here",
                    field="tensors",
                )

    def _why_not(self, name: str) -> str:
        modules = {module for module, _ in self._model.named_modules() if module}
        if name in modules:
            return f"module {name} is not a linear layer that LoRA can be served on"
        return f"the LoRA has module {name}, which the model does not have"
