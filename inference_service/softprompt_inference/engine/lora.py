"""LoRAs as the engine knows them: which slot of the device stands for which, and what no model could compute."""

import math

from softprompt_api.errors import AdapterInvalid, Overloaded

from softprompt_inference.engine.messages import ITEM_BYTES, LoadLora, LoraModule


class LoraSlots:
    """A bounded number of places on the device; a digest keeps its own until it is dropped.

    Args:
        num_slots: slots 0 … num_slots − 1.
    """

    def __init__(self, num_slots: int) -> None:
        self._num_slots = num_slots
        self._slot_of: dict[str, int] = {}
        self._free = list(range(num_slots - 1, -1, -1))

    def __contains__(self, digest: str) -> bool:
        return digest in self._slot_of

    def __len__(self) -> int:
        return len(self._slot_of)

    def find(self, digest: str) -> int:
        """The slot of a digest that has one."""
        return self._slot_of[digest]

    def assign(self, digest: str) -> int:
        """Give a free slot to a digest that has none. Raises Overloaded when all are taken."""
        assert digest not in self._slot_of
        if not self._free:
            raise Overloaded(f"all {self._num_slots} places for LoRAs are taken", field="adapter")
        slot = self._slot_of[digest] = self._free.pop()
        return slot

    def retire(self, digest: str) -> int:
        """Take the slot of a digest back."""
        slot = self._slot_of.pop(digest)
        self._free.append(slot)
        return slot

    def check(self) -> None:
        """Assert that every slot is free or taken, and by one digest only."""
        assert sorted([*self._free, *self._slot_of.values()]) == list(range(self._num_slots))


def check_lora(lora: LoadLora, *, max_rank: int) -> None:
    """Refuse what no model could compute. Raises AdapterInvalid."""
    if lora.dtype not in ITEM_BYTES:
        raise AdapterInvalid(f"a LoRA of dtype {lora.dtype} is not supported", field="tensors")
    if not lora.modules:
        raise AdapterInvalid("the LoRA has no modules", field="tensors")
    names = [module.name for module in lora.modules]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise AdapterInvalid(f"the LoRA has module {twice} twice", field="tensors")
    for module in lora.modules:
        _check_module(module, max_rank=max_rank)


def _check_module(module: LoraModule, *, max_rank: int) -> None:
    if not 1 <= module.rank <= max_rank:
        raise AdapterInvalid(
            f"module {module.name} has rank {module.rank}; 1 to {max_rank} are allowed", field="config.r"
        )
    if not math.isfinite(module.scale):
        raise AdapterInvalid(f"module {module.name} has a scale of {module.scale}", field="config.lora_alpha")
