"""The forms in which prompts may be given, made one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, TypeVar, cast

from softprompt_api.errors import InvalidArgument

from softprompt.requests import PromptAdapterRequest


class TextPrompt(TypedDict):
    """A prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """A prompt as token ids, taken as they are."""

    prompt_token_ids: list[int]


class PartsPrompt(TypedDict):
    """A prompt in parts: texts, token ids, and soft prompts of embeddings that stand between them."""

    parts: Sequence[str | list[int] | PromptAdapterRequest]


Prompt = str | TextPrompt | TokensPrompt | PartsPrompt | list[int]
Each = TypeVar("Each")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedPrompt:
    """A prompt in parts, and its text: None where it has token ids."""

    parts: Sequence[str | list[int] | PromptAdapterRequest]
    text: str | None = None

    @classmethod
    def of_text(cls, text: str) -> "ParsedPrompt":
        """One text."""
        return cls(parts=[text], text=text)


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
        return ParsedPrompt.of_text(prompt)
    if _is_ids(prompt):
        return ParsedPrompt(parts=[list(cast(Sequence[int], prompt))])
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt"} and isinstance(prompt["prompt"], str):
        return ParsedPrompt.of_text(prompt["prompt"])
    if isinstance(prompt, Mapping) and set(prompt) == {"prompt_token_ids"} and _is_ids(prompt["prompt_token_ids"]):
        return ParsedPrompt(parts=[list(prompt["prompt_token_ids"])])
    if isinstance(prompt, Mapping) and set(prompt) == {"parts"} and isinstance(prompt["parts"], list | tuple):
        return _parse_parts(prompt["parts"], place)
    raise InvalidArgument(
        f"{place} must be a string, a list of token ids, {{'prompt': '…'}}, {{'prompt_token_ids': [...]}} or "
        "{'parts': [...]}",
        field=place,
    )


def _parse_parts(given: Sequence[object], place: str) -> ParsedPrompt:
    parts: list[str | list[int] | PromptAdapterRequest] = []
    for number, part in enumerate(given):
        if isinstance(part, str | PromptAdapterRequest):
            parts.append(part)
        elif _is_ids(part):
            parts.append(list(cast(Sequence[int], part)))
        else:
            raise InvalidArgument(
                f"{place}: part {number} must be a string, a list of token ids or a PromptAdapterRequest",
                field=place,
            )
    texts = [part for part in parts if isinstance(part, str)]
    has_ids = any(isinstance(part, list) for part in parts)
    return ParsedPrompt(parts=parts, text=None if has_ids else "".join(texts))


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


def check_each(values: Iterable[object], kind: type, field: str) -> None:
    """InvalidArgument where one is of another kind."""
    for value in values:
        if not isinstance(value, kind):
            raise InvalidArgument(f"{field} takes {kind.__name__}, not {type(value).__name__}", field=field)
