import math
import random

import pytest
from softprompt_api.errors import AdapterInvalid, Overloaded
from softprompt_inference.engine.lora import LoraSlots, check_lora


def test_slots_come_and_go_and_are_never_shared() -> None:
    generator, slots = random.Random(0), LoraSlots(5)
    held: dict[str, int] = {}
    for index in range(500):
        if held and generator.random() < 0.45:
            digest = generator.choice(sorted(held))
            assert slots.retire(digest) == held.pop(digest)
        elif len(held) < 5:
            held[str(index)] = slots.assign(str(index))
        else:
            with pytest.raises(Overloaded, match="all 5 places"):
                slots.assign(str(index))
        slots.check()
        assert len(slots) == len(held) == len(set(held.values()))
        assert all(digest in slots and slots.find(digest) == slot for digest, slot in held.items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "layers.0.proj has rank 0; 1 to 4"),
        ({"rank": 5}, "layers.0.proj has rank 5; 1 to 4"),
        ({"scale": math.nan}, "layers.0.proj has a scale of nan"),
        ({"scale": math.inf}, "a scale of inf"),
        ({"dtype": "int8"}, "dtype int8"),
    ],
)
def test_what_no_model_could_compute_is_refused(fakes, changes: dict[str, object], message: str) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        check_lora(fakes.lora("x", **changes), max_rank=4)


def test_a_lora_of_no_module_or_of_one_twice_is_refused(fakes) -> None:
    lora = fakes.lora("x")
    check_lora(lora, max_rank=4)
    [module] = lora.modules
    for modules, message in (([], "no modules"), ([module, module], "layers.0.proj twice")):
        with pytest.raises(AdapterInvalid, match=message):
            check_lora(type(lora)(digest="", modules=modules, dtype="float32"), max_rank=4)
