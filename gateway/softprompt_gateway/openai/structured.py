"""What a request wants its output to be, in the several ways in which it can say so."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.names import shown
from softprompt_api.structured import FIELD, KINDS, StructuredOutputsParams

from softprompt_gateway.errors import Refused, fields_spelled
from softprompt_gateway.openai import schemas
from softprompt_gateway.validation import RequestModel, check_name

# vLLM's names before `structured_outputs` → the member that means the same.
OLD_NAMES = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What the output must be, and the field of the request that says so."""

    field: str
    params: StructuredOutputsParams


def form_of(given: Mapping[str, Mapping[str, Any] | None]) -> Form | None:
    """The form that one field asks for; InvalidArgument where two do, or where it is none.

    Args:
        given: by field, the one argument of StructuredOutputsParams that it holds; None where it is not set.
    """
    fields = [name for name, value in given.items() if value is not None]
    if len(fields) > 1:
        raise InvalidArgument(f"{fields[0]} and {fields[1]} both say what the output must be", field=fields[1])
    for field in fields:
        with fields_spelled(**{FIELD: field}):
            return Form(field=field, params=StructuredOutputsParams(**given[field] or {}))
    return None


def check_members(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """The members of `structured_outputs` that are set; Refused where one is unknown."""
    if value is None:
        return None
    for name in value:
        if name not in KINDS:
            raise Refused(
                f"unknown parameter {shown(name)}; {FIELD} has {', '.join(KINDS)}",
                code="unknown_parameter",
                param=f"{FIELD}.{shown(name)[1:-1]}",
            )
    return {name: member for name, member in value.items() if member is not None}


def grammar_message(params: StructuredOutputsParams | None) -> pb.Grammar | None:
    """The form as the inference service takes it."""
    if params is None:
        return None
    kind, text = params.spelled
    match kind:
        case "choice":
            return pb.Grammar(choice=pb.Choices(texts=params.choice or ()))
        case "json_object":
            return pb.Grammar(json_object=True)
        case "json":
            return pb.Grammar(json_schema=text)
        case "regex":
            return pb.Grammar(regex=text)
        case _:
            return pb.Grammar(lark=text)


class JsonSchema(RequestModel):
    """A schema with a name, as OpenAI spells it."""

    name: str = Field(json_schema_extra=schemas.NAME)
    description: Annotated[str, Field(max_length=1024)] | None = Field(None, description="without effect")
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="without effect: the schema always holds")

    @field_validator("name")
    @classmethod
    def _check_name(cls, value: str) -> str:
        return check_name(value, what="a schema", field="response_format")


class ResponseFormat(RequestModel):
    """What the output must be, as OpenAI spells it."""

    model_config = ConfigDict(json_schema_extra=schemas.RESPONSE_FORMAT)

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="before")
    @classmethod
    def _check_object(cls, value: object) -> object:
        if not isinstance(value, dict):
            raise InvalidArgument(
                'response_format must be an object with a type, as {"type": "json_object"}',
                field="response_format",
            )
        return value

    @model_validator(mode="after")
    def _check_schema(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidArgument(
                'response_format has json_schema exactly where its type is "json_schema"', field="response_format"
            )
        return self

    def wanted(self) -> dict[str, Any] | None:
        """The argument of StructuredOutputsParams; None for text."""
        if self.json_schema is not None:
            return {"json": self.json_schema.schema_}
        return {"json_object": True} if self.type == "json_object" else None
