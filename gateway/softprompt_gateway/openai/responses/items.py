"""`input` of a response request: messages, calls and their outputs, and the conversation that they are."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    TypeAdapter,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.names import shown

from softprompt_gateway.body import Holds
from softprompt_gateway.openai.fields import Unserved, check_each, refuse
from softprompt_gateway.openai.parts import (
    MAX_PARTS,
    AnyTextPart,
    Parts,
    SoftPromptPart,
    check_number_of_parts,
    parse_content,
    say,
)
from softprompt_gateway.validation import RequestModel

FIELD = "input"
_MAX_ITEMS = 4096


class InputText(AnyTextPart):
    """A text that somebody said, or that a function gave back."""

    type: Literal["input_text"]


class OutputText(AnyTextPart):
    """A text of an answer, which may be sent back as it came."""

    type: Literal["output_text"]
    annotations: Any = Field(None, description="accepted where empty")
    logprobs: Any = Field(None, description="accepted, without effect")
    parsed: Any = Field(None, description="accepted, without effect")

    @model_validator(mode="after")
    def _refuse_annotations(self) -> "OutputText":
        refuse("content.annotations", self.annotations)
        return self


_TEXTS: Mapping[str, type[AnyTextPart]] = {"input_text": InputText, "output_text": OutputText}


def _content(value: object, info: ValidationInfo) -> str | Parts:
    return parse_content(value, field=str(info.field_name), texts=_TEXTS)


_PART_SCHEMAS = [part.model_json_schema() for part in (InputText, OutputText, SoftPromptPart)]
_PARTS_SCHEMA = {"type": "array", "items": {"anyOf": _PART_SCHEMAS}, "maxItems": MAX_PARTS}
_CONTENT_SCHEMA = {"anyOf": [{"type": "string"}, _PARTS_SCHEMA]}
_HOLDS_PARTS = Holds((InputText, OutputText, SoftPromptPart))
ItemContent = Annotated[str | Parts, PlainValidator(_content), WithJsonSchema(_CONTENT_SCHEMA), _HOLDS_PARTS]
CallId = Annotated[str, Field(max_length=256)]


class _Item(RequestModel):
    """What every item may have, since those of an answer do."""

    id: Any = Field(None, description="accepted, without effect")
    status: Any = Field(None, description="accepted, without effect")


class InputMessage(_Item):
    """One turn."""

    type: Literal["message"] | None = None
    role: Literal["developer", "system", "user", "assistant"]
    content: ItemContent
    phase: Any = Field(None, description="not supported")

    @model_validator(mode="after")
    def _refuse_phase(self) -> "InputMessage":
        refuse("phase", self.phase)
        return self


class FunctionCall(_Item):
    """A call that an answer had."""

    type: Literal["function_call"]
    call_id: CallId
    name: Annotated[str, Field(max_length=64)]
    arguments: str = Field(description="a JSON object as text; empty: no arguments")
    parsed_arguments: Any = Field(None, description="accepted, without effect")
    async_: Unserved = Field(None, description="accepted where empty")
    is_async: Unserved = Field(None, alias="async", description="accepted where empty")  # its name in JSON
    caller: Unserved = Field(None, description="accepted where empty")
    namespace: Unserved = Field(None, description="accepted where empty")

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "FunctionCall":
        for name in ("async_", "caller", "namespace"):
            refuse(name, getattr(self, name))
        refuse("async", self.is_async)
        return self


class FunctionCallOutput(_Item):
    """What a call gave back."""

    type: Literal["function_call_output"]
    call_id: CallId
    output: ItemContent


_ITEMS = ("message", "function_call", "function_call_output")


def _kind(item: object) -> str:
    """Which item it is; Unsupported, by its name, for one that we do not take."""
    kind = item.get("type") if isinstance(item, dict) else None
    if kind is None:
        return "message"
    if kind not in _ITEMS:
        raise Unsupported(
            f"input item of type {shown(str(kind))} is not supported; only {', '.join(map(repr, _ITEMS))}",
            field="type",
        )
    return str(kind)


Item = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")],
    Discriminator(_kind),
]


_item: TypeAdapter[Item] = TypeAdapter(Item)


def _check_items(value: object, check: ValidatorFunctionWrapHandler) -> object:
    return check_each(FIELD, value, check, _item.validate_python) if isinstance(value, list) else check(value)


def _as_items(value: object) -> object:
    """A text alone is what the user says."""
    if value in ("", []):
        raise InvalidArgument("input must not be empty", field=FIELD)
    if isinstance(value, list):
        # Where there are more, that is what is wrong; to look at all of them would keep others waiting.
        items = [item for item in value[:_MAX_ITEMS] if isinstance(item, dict)]
        check_number_of_parts((item.get(name) for item in items for name in ("content", "output")), field=FIELD)
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


Items = Annotated[list[Item], Field(min_length=1, max_length=_MAX_ITEMS)]
Text = Annotated[str, Field(min_length=1)]
Input = Annotated[
    Items, WrapValidator(_check_items), BeforeValidator(_as_items, json_schema_input_type=Text | Items)
]


def soft_prompts(items: Sequence[Item]) -> list[str]:
    """The adapters that stand inside the items."""
    contents = [_said(item) for item in items]
    return [name for content in contents if isinstance(content, Parts) for name in content.names]


def conversation(
    items: Sequence[Item], instructions: str | None, digests: Mapping[str, str]
) -> list[pb.ChatMessage]:
    """The items as turns: calls belong to the assistant's turn before them, if it is its turn.

    Args:
        digests: of the soft prompts inside, by name.
    """
    messages = [pb.ChatMessage(role="system", content=instructions)] if instructions else []
    for item in items:
        if isinstance(item, FunctionCall):
            if not messages or messages[-1].role != "assistant":
                messages.append(pb.ChatMessage(role="assistant"))
            call = pb.ToolCall(id=item.call_id, name=item.name, arguments=item.arguments)
            messages[-1].tool_calls.append(call)
        elif isinstance(item, FunctionCallOutput):
            messages.append(pb.ChatMessage(role="tool", tool_call_id=item.call_id))
            say(messages[-1], item.output, digests)
        else:
            messages.append(pb.ChatMessage(role=item.role))
            say(messages[-1], item.content, digests)
    return messages


def _said(item: Item) -> str | Parts:
    if isinstance(item, FunctionCall):
        return ""
    return item.output if isinstance(item, FunctionCallOutput) else item.content
