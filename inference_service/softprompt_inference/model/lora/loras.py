"""All LoRAs on the device: slots filled from what the engine was sent, and checked against the model."""

from collections.abc import Iterator, Sequence

import torch
from softprompt_api.errors import AdapterInvalid, InvalidArgument
from softprompt_kernels.native.memory import PooledPages, RegionPool
from torch import nn

from softprompt_inference.engine.messages import LoadLora, LoraModule
from softprompt_inference.model.hardware import DTYPES
from softprompt_inference.model.lora.context import LoraContext
from softprompt_inference.model.lora.linears import Linear, find_products
from softprompt_inference.model.lora.weights import ProductWeights, make_packed
from softprompt_inference.model.transfer import PIECE_BYTES, upload_bytes

# What a LoRA leaves of its last region is lost while it is there.
_REGION_BYTES = 4 * 2**20


def plan_fixed_bytes(linears: Sequence[Linear], *, max_loras: int, max_rank: int, free_bytes: int) -> int:
    """Memory of all slots, where they get theirs at once. Raises InvalidArgument when there is less."""
    values = sum((linear.in_features + linear.out_features) * linear.dtype.itemsize for linear in linears)
    slot_bytes = values * max_rank
    if max_loras * slot_bytes > free_bytes:
        raise InvalidArgument(
            f"{max_loras} LoRAs of rank {max_rank} take {max_loras * slot_bytes / 2**30:.2f} GiB "
            f"({slot_bytes / 2**20:.0f} MiB each), but the weights leave {max(free_bytes, 0) / 2**30:.2f} GiB for "
            "them and for KV pages; lower max_loras or max_lora_rank",
            field="max_loras",
        )
    return max_loras * slot_bytes


class Loras:
    """The weights of every slot.

    Attributes:
        products: that a LoRA may change.

    Args:
        model: as it serves, swaps made.
        linears: of the model as it was loaded.
        context: of the steps.
        max_loras: slots are 0 … max_loras − 1; without any, the model is left alone.
        fixed_rank: the highest there will be, for which all slots get their memory at once and for good; None:
            each takes what it needs while it is filled.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: list[Linear],
        context: LoraContext,
        *,
        max_loras: int,
        device: torch.device,
        fixed_rank: int | None = None,
    ) -> None:
        self._model = model
        self._device = device
        self.products = find_products(model, linears) if max_loras else []
        pool = RegionPool(_REGION_BYTES)
        self._memory = [PooledPages(pool) for _ in range(max_loras)]
        self._weights = [
            make_packed(product, context, max_loras, self._memory)
            or ProductWeights(product, context, max_loras, device, fixed_rank)
            for product in self.products
        ]
        self._places = {
            linear.name: (linear, weights, index)
            for product, weights in zip(self.products, self._weights, strict=True)
            for index, linear in enumerate(product.linears)
        }

    @property
    def num_bytes(self) -> int:
        """Memory of all slots."""
        return sum(weights.num_bytes for weights in self._weights)

    def load(self, slot: int, lora: LoadLora) -> Iterator[None]:
        """Fill an empty slot, piece by piece: it is filled at the end, and to be dropped where that does not come.

        Raises AdapterInvalid when a module is not in the model, cannot have a LoRA, or has another shape.
        """
        for module in lora.modules:
            self._check(module, DTYPES[lora.dtype].itemsize)
        num_bytes, piece_bytes = 0, PIECE_BYTES[self._device.type]
        if sum(len(module.a) + len(module.b) for module in lora.modules) > piece_bytes:
            yield  # reading and checking what came was a piece
        for module in lora.modules:
            linear, weights, index = self._places[module.name]
            dtype = DTYPES[lora.dtype]
            a = upload_bytes(module.a, (module.rank, linear.in_features), dtype, self._device)
            b = upload_bytes(module.b, (linear.out_features, module.rank), dtype, self._device)
            weights.put(slot, index, a, b, module.scale)
            num_bytes += len(module.a) + len(module.b)
            if num_bytes >= piece_bytes:
                num_bytes = 0
                yield

    def drop(self, slot: int) -> None:
        """Empty a slot, however much of a LoRA is in it."""
        for weights in self._weights:
            weights.drop(slot)
        self._memory[slot].free()

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
