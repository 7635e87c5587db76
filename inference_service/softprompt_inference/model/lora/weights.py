"""The LoRA weights of one product, for all slots, and what they add to it."""

import math
from collections.abc import Sequence

import torch
from softprompt_kernels.lora_expand import lora_expand
from softprompt_kernels.lora_shrink import lora_shrink
from softprompt_kernels.native.lora import PackedLoras
from softprompt_kernels.native.memory import PooledPages
from torch import Tensor

from softprompt_inference.model.lora.context import LoraContext, attach, detach
from softprompt_inference.model.lora.linears import Product
from softprompt_inference.model.swaps.packed import NativeGate, NativeLinear

# A multiple of 16: the kernels for CPUs take 16 values at once.
_FIRST_SLOTS, _FIRST_RANK = 2, 16


def make_packed(
    product: Product, context: LoraContext, max_loras: int, memory: Sequence[PooledPages]
) -> PackedLoras | None:
    """Room for LoRAs that the product's own kernel adds; None: it does not.

    Args:
        memory: for each slot.
    """
    module, widths = product.module, [linear.out_features for linear in product.linears]
    if not isinstance(module, NativeGate | NativeLinear):
        return None
    is_gate = isinstance(module, NativeGate)
    if not (is_gate or PackedLoras.can_hold(widths)):
        return None
    module.lora = context
    module.loras.prepare(widths, gated=is_gate, num_slots=max_loras, memory=memory)
    return module.loras


class ProductWeights:
    """Stacked weights. They take memory, and the product's module notices them, only while some slot has any.

    Of a fixed rank, both from the beginning, and then they stay where they are.

    a       [filled, S, R, in]      S: linears of the product; filled and R double when they are too few
    b       [filled, out, R]        the linears' rows one below the other
    scales  [max_loras, S] float32
    ranks   [max_loras, S] int32    0: the slot does not change this linear

    Args:
        fixed_rank: the highest there will be, for which all slots get their memory at once; None: they grow.
    """

    def __init__(
        self,
        product: Product,
        context: LoraContext,
        max_loras: int,
        device: torch.device,
        fixed_rank: int | None = None,
    ) -> None:
        self._module = product.module
        self._context = context
        widths = [linear.out_features for linear in product.linears]
        self._starts = [sum(widths[:i]) for i in range(len(widths) + 1)]
        self._device_starts = torch.tensor(self._starts, dtype=torch.int32, device=device)
        self._unit = math.gcd(*widths)
        self._in_features = product.linears[0].in_features
        # On a processor, small products are faster in float32 than in 16 bits; PEFT has its adapters in it too.
        self._dtype = torch.float32 if device.type == "cpu" else product.linears[0].dtype
        self._slots: set[int] = set()
        shape = (max_loras, len(widths))
        self._scales = torch.zeros(shape, dtype=torch.float32, device=device)
        self._ranks = torch.zeros(shape, dtype=torch.int32, device=device)
        self._is_fixed = fixed_rank is not None
        self._make_empty(fixed_rank or _FIRST_RANK)
        if fixed_rank is not None:
            self._grow(max_loras, fixed_rank)
            attach(self._module, self.add)

    def _make_empty(self, max_rank: int = _FIRST_RANK) -> None:
        num_linears, out_features = len(self._starts) - 1, self._starts[-1]
        self._a = self._scales.new_empty(0, num_linears, max_rank, self._in_features, dtype=self._dtype)
        self._b = self._scales.new_empty(0, out_features, max_rank, dtype=self._dtype)

    @property
    def num_bytes(self) -> int:
        """Memory of the stacked weights."""
        return self._a.nbytes + self._b.nbytes

    def put(self, slot: int, index: int, a: Tensor, b: Tensor, scale: float) -> None:
        """Give a slot weights for the linear at `index`: a [rank, in], b [out, rank]."""
        rank = len(a)
        self._make_room(slot, rank)
        if not self._slots and not self._is_fixed:
            attach(self._module, self.add)
        self._slots.add(slot)  # first: whoever is interrupted below drops it
        self._a[slot, index, :rank] = a
        self._b[slot, self._starts[index] : self._starts[index + 1], :rank] = b
        self._scales[slot, index] = scale
        self._ranks[slot, index] = rank

    def drop(self, slot: int) -> None:
        """Take a slot's weights away, if it has any."""
        if slot not in self._slots:
            return
        self._slots.remove(slot)
        self._ranks[slot] = 0
        if not self._slots and not self._is_fixed:
            detach(self._module)
            self._make_empty()

    def _make_room(self, slot: int, rank: int) -> None:
        slots, max_rank = self._a.shape[0], self._a.shape[2]
        wanted_slots, wanted_rank = max(slots, _FIRST_SLOTS), max_rank
        while wanted_slots <= slot:
            wanted_slots *= 2
        wanted_slots = min(wanted_slots, len(self._ranks))
        while wanted_rank < rank:
            wanted_rank *= 2
        if (wanted_slots, wanted_rank) != (slots, max_rank):
            assert not self._is_fixed, "a slot or a rank is above those that were announced"
            self._grow(wanted_slots, wanted_rank)

    def _grow(self, wanted_slots: int, wanted_rank: int) -> None:
        slots, max_rank = self._a.shape[0], self._a.shape[2]
        a = self._a.new_zeros(wanted_slots, self._a.shape[1], wanted_rank, self._a.shape[3])
        b = self._b.new_zeros(wanted_slots, self._b.shape[1], wanted_rank)
        a[:slots, :, :max_rank] = self._a
        b[:slots, :, :max_rank] = self._b
        self._a, self._b = a, b

    def add(self, out: Tensor, x: Tensor) -> Tensor:
        """The product's result with what the step's LoRAs add to it, in place: x [1, T, in], out [1, T, out]."""
        tiles = self._context.tiles
        if tiles is not None:
            h = lora_shrink(x[0].contiguous(), self._a, self._scales, self._ranks, tiles)
            lora_expand(out[0], h, self._b, self._ranks, self._device_starts, tiles, self._unit)
        return out
