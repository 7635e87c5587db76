"""Which adapters go together, and where each may stand."""

import pytest
from softprompt_api.composition import (
    MAX_ADAPTERS,
    Part,
    check_front,
    check_inside,
    check_number,
    role_of,
)
from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import Role, kinds

SOFT, GIVEN, LORA = Role.EMBEDDINGS, Role.KEY_VALUES, Role.LORA


def parts(*roles: Role) -> list[Part]:
    """Parts named a, b, c … with these roles."""
    return [Part(name="abcdefgh"[number], role=role) for number, role in enumerate(roles)]


@pytest.mark.parametrize(
    "roles",
    [
        (),
        (SOFT,),
        (SOFT, SOFT, SOFT),
        (LORA,),
        (SOFT, LORA),
        (LORA, SOFT),
        (SOFT, LORA, SOFT),
        (GIVEN,),
        (GIVEN, SOFT, SOFT),
        (LORA, GIVEN),
        (GIVEN, LORA, SOFT),
    ],
)
def test_these_go_together_in_front(roles: tuple[Role, ...]) -> None:
    check_front(parts(*roles), field="model")


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ((LORA, LORA), "a and b are both LoRAs; a request is computed with one at most"),
        ((LORA, SOFT, LORA), "a and c are both LoRAs"),
        ((GIVEN, GIVEN), "a and b both give keys and values"),
        ((GIVEN, SOFT, GIVEN), "a and c both give keys and values"),
        ((SOFT, GIVEN), "b gives keys and values .* must come before the other soft prompts, so before a"),
        ((LORA, SOFT, GIVEN), "c gives keys and values .* so before b"),
    ],
)
def test_these_do_not_go_together_in_front(roles: tuple[Role, ...], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message) as refused:
        check_front(parts(*roles), field="adapters")
    assert refused.value.field == "adapters"


@pytest.mark.parametrize(
    ("role", "message"),
    [(GIVEN, "a gives keys and values .* in front of the whole prompt alone"), (LORA, "a is a LoRA")],
)
def test_only_embeddings_stand_inside_a_prompt(role: Role, message: str) -> None:
    check_inside(parts(SOFT, SOFT), field="messages")
    with pytest.raises(InvalidArgument, match=message) as refused:
        check_inside(parts(role), field="messages")
    assert refused.value.field == "messages"


def test_there_is_a_most_of_adapters() -> None:
    check_number(MAX_ADAPTERS, field="model")
    with pytest.raises(
        InvalidArgument, match=f"the request has {MAX_ADAPTERS + 1} adapters; at most {MAX_ADAPTERS}"
    ):
        check_number(MAX_ADAPTERS + 1, field="model")


def test_every_kind_has_its_role() -> None:
    given = {"PREFIX_TUNING", "CARTRIDGE"}
    for kind in kinds.FORMATS:
        assert role_of(kind) is (LORA if kind == "LORA" else GIVEN if kind in given else SOFT)
