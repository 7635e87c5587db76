"""The forms in which prompts may be given, made one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, cast

from softprompt_api.errors import InvalidArgument


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, taken as they are."""

    prompt_token_ids: list[int]


Prompt = str | TextPrompt | TokensPrompt | list[int]
Each = TypeVar("Each")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedPrompt:
    """Text, or token ids; the other is None."""

    text: str | None = None
    token_ids: list[int] | None = None


def parse_prompts(prompts: Prompt | Sequence[Prompt]) -> list[ParsedPrompt]:
    """One prompt or several, in order; InvalidArgument names the one that cannot be."""
    several = _as_several(prompts)
    return [_parse(prompt, f"prompts[{index}]") for index, prompt in enumerate(several)]


def _as_several(prompts: object) -> Sequence[object]:
    if isinstance(prompts, str | Mapping) or _is_ids(prompts):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise InvalidArgument(
            "prompts must be a string, a list of strings, or {'prompt_token_ids': [...]}", field="prompts"
        )
    return prompts


def _parse(prompt: object, place: str) -> ParsedPrompt:
    if isinstance(prompt, str):
        return ParsedPrompt(text=prompt)
    if _is_ids(prompt):
        return ParsedPrompt(token_ids=list(cast(Sequence[int], prompt)))
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
        return ParsedPrompt(text=prompt["prompt"])
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt_token_ids"} and _is_ids(prompt["prompt_token_ids"]):
        return ParsedPrompt(token_ids=list(prompt["prompt_token_ids"]))
    raise InvalidArgument(
        f"{place} must be a string, a list of token ids, {{'prompt': '…'}} or {{'prompt_token_ids': [...]}}",
        field=place,
    )


def _is_ids(value: object) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)
    return is_list and bool(value) and all(type(token_id) is int for token_id in cast(Sequence[object], value))


def one_each(value: Each | Sequence[Each], count: int, field: str) -> list[Each]:
    """`value` for every prompt, or its element for each; InvalidArgument where the numbers differ."""
    if not isinstance(value, list | tuple):
        return [cast(Each, value)] * count
    if len(value) != count:
        raise InvalidArgument(f"{field} has {len(value)} entries for {count} prompts", field=field)
    return list(value)
