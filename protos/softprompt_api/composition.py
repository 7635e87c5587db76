"""Which adapters go together in one request, and where each of them may stand.

    model "a+b+l"      virtual tokens of a, virtual tokens of b, the prompt; all of it computed with the LoRA l
    inside the prompt  text, virtual tokens of c, text

Rows of embeddings may stand anywhere, any number of times. Keys and values were made for the positions from 0
on, so an adapter that gives them is the first of all. One LoRA computes a request, its virtual tokens included.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from softprompt_api.errors import InvalidArgument
from softprompt_api.formats import kinds
from softprompt_api.formats.spec import Role

MAX_ADAPTERS = 16


def role_of(kind: str) -> Role:
    """The role of a kind, by PEFT's name of it."""
    return kinds.FORMATS[kind].role if kind in kinds.FORMATS else Role.EMBEDDINGS


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One adapter of a request, under the name that errors have for it."""

    name: str
    role: Role


def check_number(num_adapters: int, *, field: str) -> None:
    """Raise InvalidArgument for more adapters than one request may have."""
    if num_adapters > MAX_ADAPTERS:
        raise InvalidArgument(
            f"the request has {num_adapters} adapters; at most {MAX_ADAPTERS} go together", field=field
        )


def check_front(parts: Sequence[Part], *, field: str) -> None:
    """Raise InvalidArgument where adapters cannot stand in front of a prompt together, in this order."""
    loras = [part.name for part in parts if part.role is Role.LORA]
    if len(loras) > 1:
        raise InvalidArgument(
            f"{loras[0]} and {loras[1]} are both LoRAs; a request is computed with one at most", field=field
        )
    soft_prompts = [part for part in parts if part.role is not Role.LORA]
    for part in soft_prompts[1:]:
        if part.role is not Role.KEY_VALUES:
            continue
        first = soft_prompts[0]
        if first.role is Role.KEY_VALUES:
            raise InvalidArgument(
                f"{first.name} and {part.name} both give {_key_values()}; a request has one of them at most",
                field=field,
            )
        raise InvalidArgument(
            f"{part.name} gives {_key_values()}; it must come before the other soft prompts, so before "
            f"{first.name}",
            field=field,
        )


def check_inside(parts: Sequence[Part], *, field: str) -> None:
    """Raise InvalidArgument where an adapter cannot stand inside a prompt."""
    for part in parts:
        if part.role is Role.KEY_VALUES:
            raise InvalidArgument(
                f"{part.name} gives {_key_values()}; it can stand in front of the whole prompt alone, "
                "by its name in model or adapters",
                field=field,
            )
        if part.role is Role.LORA:
            raise InvalidArgument(
                f"{part.name} is a LoRA, which has no virtual tokens; its place is in model or adapters, "
                "and not inside the prompt",
                field=field,
            )


def _key_values() -> str:
    names = sorted(kind for kind in kinds.FORMATS if role_of(kind) is Role.KEY_VALUES)
    return f"keys and values ({', '.join(names)}), whose positions are fixed"
