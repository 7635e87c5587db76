"""Prompts and messages in parts: texts, and soft prompts that stand between them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.names import shown

from softprompt_gateway.body import Holds
from softprompt_gateway.errors import Refused
from softprompt_gateway.openai import schemas
from softprompt_gateway.validation import RequestModel


class AnyTextPart(RequestModel):
    """A text among the parts of a prompt or a message; routes differ in what they call it."""

    text: str


class TextPart(AnyTextPart):
    """A text among the parts of a prompt or a message."""

    type: Literal["text"]


class SoftPromptPart(RequestModel):
    """All virtual tokens of an adapter, in this place."""

    type: Literal["soft_prompt"]
    name: str = Field(description="the adapter: name, name@version or sha256:…", max_length=512)


Part = str | SoftPromptPart
TextParts = Mapping[str, type[AnyTextPart]]
_TEXTS: TextParts = {"text": TextPart}
# Of one request: a part of a few bytes can be a digest that is ten times as long.
MAX_PARTS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Texts and soft prompts in order; no text follows another."""

    parts: Sequence[Part]

    @property
    def text(self) -> str:
        """The texts alone, one behind the other: virtual tokens have none."""
        return "".join(part for part in self.parts if isinstance(part, str))

    @property
    def names(self) -> list[str]:
        """The adapters of its soft prompts."""
        return [part.name for part in self.parts if isinstance(part, SoftPromptPart)]

    def prompt(self, digests: Mapping[str, str]) -> pb.PromptParts:
        """As the inference service takes a prompt; `digests` of the adapters by name."""
        return pb.PromptParts(
            parts=[
                pb.PromptPart(text=part)
                if isinstance(part, str)
                else pb.PromptPart(soft_prompt=digests[part.name])
                for part in self.parts
            ]
        )

    def content(self, digests: Mapping[str, str]) -> list[pb.ContentPart]:
        """As the inference service takes what a message says; `digests` as in `prompt`."""
        return [
            pb.ContentPart(text=part) if isinstance(part, str) else pb.ContentPart(soft_prompt=digests[part.name])
            for part in self.parts
        ]


def check_number_of_parts(contents: Iterable[object], *, field: str) -> None:
    """Raise InvalidArgument where what a request says, as it came, has too many parts together."""
    number = 0
    for content in contents:
        number += len(content) if isinstance(content, list) else 0
        if number > MAX_PARTS:
            raise InvalidArgument(
                f"{field} has too many content parts; send at most {MAX_PARTS} in one request", field=field
            )


def parse_parts(parts: list[Any], *, field: str, between: str, texts: TextParts = _TEXTS) -> Parts:
    """Parts of a request, checked; parts of other types are refused by name.

    Args:
        between: what stands between neighbouring texts, which become one.
        texts: the types that texts may have.
    """
    check_number_of_parts([parts], field=field)
    checked = [_checked(part, field, number, texts) for number, part in enumerate(parts)]
    merged: list[Part] = []
    for are_texts, group in groupby(checked, key=lambda part: isinstance(part, str)):
        if are_texts:
            merged.append(between.join(part for part in group if isinstance(part, str)))
        else:
            merged += group
    return Parts(parts=merged)


def _checked(part: object, field: str, number: int, texts: TextParts) -> Part:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise InvalidArgument("each content part must be an object with a type", field=field)
    try:
        if kind in texts:
            return texts[kind].checked(part).text
        if kind == "soft_prompt":
            return SoftPromptPart.checked(part)
    except Refused as error:
        # Which message it is in is not known here.
        body = error.body
        raise Refused(f"content part {number}: {body.message}", code=body.answer.code, param=field) from None
    raise Unsupported(
        f"content part of type {shown(kind)} is not supported; only {', '.join(map(repr, texts))} "
        "and 'soft_prompt'",
        field=field,
    )


def parse_content(value: object, *, field: str, texts: TextParts = _TEXTS) -> str | Parts:
    """What a message says: a text, also where it came in parts, or parts with soft prompts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise PydanticCustomError("string_type", "Input should be a string or a list of parts")
    parts = parse_parts(value, field=field, between="\n", texts=texts)
    return parts if parts.names else parts.text


def _content(value: object) -> str | Parts:
    return parse_content(value, field="content")


def say(message: pb.ChatMessage, content: str | Parts, digests: Mapping[str, str]) -> None:
    """Let a message of the inference service say this; `digests` as in `Parts.prompt`."""
    if isinstance(content, Parts):
        message.parts.extend(content.content(digests))
    else:
        message.content = content


PARTS_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {"anyOf": [TextPart.model_json_schema(), SoftPromptPart.model_json_schema()]},
    "maxItems": MAX_PARTS,
}
PROMPT_PARTS_SCHEMA = PARTS_SCHEMA | schemas.SOME_TEXT
HOLDS_PARTS = Holds((TextPart, SoftPromptPart))
Content = Annotated[
    str | Parts,
    PlainValidator(_content),
    WithJsonSchema({"anyOf": [{"type": "string"}, PARTS_SCHEMA]}),
    HOLDS_PARTS,
]
