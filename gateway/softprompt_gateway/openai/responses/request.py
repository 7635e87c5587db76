"""`POST /v1/responses`: the request."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.names import shown
from softprompt_api.params import MAX_LOGPROBS

from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.fields import Count, GenerationFields, Unserved, only, refuse
from softprompt_gateway.openai.responses.items import Input, conversation, soft_prompts
from softprompt_gateway.openai.responses.tools import (
    FunctionChoice,
    FunctionTools,
    as_in_chat,
    callable_functions,
)
from softprompt_gateway.openai.tools import Tool, check_tools, tool_text, wanted_with_calls
from softprompt_gateway.resolve import Target
from softprompt_gateway.validation import RequestModel, at_most, check_name

_FORMAT = "text.format"
_LOGPROBS = "message.output_text.logprobs"
_NOT_SUPPORTED = (
    *("previous_response_id", "conversation", "background", "prompt", "max_tool_calls"),
    *("access_programs", "background_options", "context_management", "image", "moderation"),
    "prompt_cache_options",
)
_MAX_METADATA = 16
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=_MAX_METADATA),
    at_most(_MAX_METADATA),
]


class TextFormat(RequestModel):
    """What the output must be, as this route spells it."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: Annotated[str, Field(max_length=1024)] | None = Field(None, description="without effect")
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="without effect: the schema always holds")

    @model_validator(mode="after")
    def _check_schema(self) -> "TextFormat":
        has_schema = self.type == "json_schema"
        if has_schema != (self.schema_ is not None) or has_schema != (self.name is not None):
            raise InvalidArgument(
                f'{_FORMAT} has name and schema exactly where its type is "json_schema"', field=_FORMAT
            )
        if self.name is not None:
            check_name(self.name, what="a schema", field=_FORMAT)
        return self

    def wanted(self) -> dict[str, Any] | None:
        """The argument of StructuredOutputsParams; None for text."""
        if self.schema_ is not None:
            return {"json": self.schema_}
        return {"json_object": True} if self.type == "json_object" else None


class TextOptions(RequestModel):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, schemas.only("medium")] = Field(None, description='only "medium"')

    @field_validator("verbosity")
    @classmethod
    def _only_medium(cls, value: object) -> None:
        only("text.verbosity", "medium", value)


class ResponsesRequest(GenerationFields):
    """Body of `POST /v1/responses`."""

    foreign_names: ClassVar[Mapping[str, str]] = {
        "max_tokens": "max_output_tokens",
        "max_completion_tokens": "max_output_tokens",
        "messages": "input",
        "response_format": "text",
        "functions": "tools",
        "logprobs": "include",
    }

    input: Input
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Count | None = Field(None, description="default: as many as fit the context")
    text: TextOptions | None = Field(None, description="what the output must be: text, json_object or json_schema")
    tools: FunctionTools | None = Field(None, description="functions that may be called")
    tool_choice: FunctionChoice | None = Field(
        None,
        description='"auto" (default with tools), "none", "required", the function that must be called, or those '
        "that may be",
    )
    parallel_tool_calls: bool | None = Field(None, description="whether several calls may come; default true")
    include: Annotated[list[str], Field(max_length=16)] | None = Field(None, description=f'only "{_LOGPROBS}"')
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    n: Annotated[Any, schemas.only(1)] = Field(None, description="only 1")
    truncation: Annotated[Any, schemas.only("disabled")] = Field(None, description='only "disabled"')
    metadata: Metadata | None = Field(None, description="repeated in the answer")
    user: str | None = Field(None, description="repeated in the answer")
    safety_identifier: str | None = Field(None, description="repeated in the answer")
    prompt_cache_key: str | None = Field(None, description="repeated in the answer")
    previous_response_id: Unserved = Field(None, description="not supported: nothing is stored")
    conversation: Unserved = Field(None, description="not supported: nothing is stored")
    background: Unserved = Field(None, description="not supported")
    background_options: Unserved = Field(None, description="not supported")
    prompt: Unserved = Field(None, description="not supported")
    reasoning: Annotated[Any, schemas.REASONING] = Field(None, description='only effort "none"')
    max_tool_calls: Unserved = Field(None, description="not supported")
    access_programs: Unserved = Field(None, description="not supported")
    context_management: Unserved = Field(None, description="not supported")
    image: Unserved = Field(None, description="not supported")
    moderation: Unserved = Field(None, description="not supported")
    prompt_cache_options: Unserved = Field(None, description="not supported")
    prompt_cache_retention: Any = Field(None, description="accepted, without effect")

    @field_validator(*_NOT_SUPPORTED)
    @classmethod
    def _refuse(cls, value: object, info: Any) -> None:
        is_state = info.field_name in ("previous_response_id", "conversation")
        because = "is not supported: nothing is stored; send the earlier items as input"
        refuse(info.field_name, value, because=because if is_state else "is not supported")

    @field_validator("reasoning")
    @classmethod
    def _refuse_reasoning(cls, value: object) -> None:
        if isinstance(value, dict):
            value = {"effort": "none"} | {name: member for name, member in value.items() if member is not None}
        only("reasoning", {"effort": "none"}, value)

    @field_validator("n")
    @classmethod
    def _refuse_choices(cls, value: object) -> None:
        is_one = value is None or (type(value) is int and value == 1)
        refuse("n", None if is_one else True, because="other than 1 is not supported in responses")

    @field_validator("truncation")
    @classmethod
    def _only_disabled(cls, value: object) -> None:
        only("truncation", "disabled", value)

    @field_validator("include")
    @classmethod
    def _only_logprobs(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name != _LOGPROBS:
                raise Unsupported(
                    f"include of {shown(name)} is not supported; only {_LOGPROBS!r}", field="include"
                )
        return value

    @model_validator(mode="after")
    def _check_pairs(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.with_logprobs:
            raise InvalidArgument(f"top_logprobs needs include to have {_LOGPROBS}", field="top_logprobs")
        check_tools(self.functions)
        if self.with_logprobs and self.callable:
            refuse("include", _LOGPROBS, because=f"of {_LOGPROBS} is not supported where functions may be called")
        return self

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return bool(self.include)

    @property
    def soft_prompts(self) -> list[str]:
        """The adapters that stand inside the input."""
        return soft_prompts(self.input)

    @cached_property
    def functions(self) -> Sequence[Tool]:
        """The tools, as chat spells them."""
        return [tool.tool for tool in self.tools or ()]

    @cached_property
    def callable(self) -> Sequence[Tool]:
        """The tools that may be called."""
        return callable_functions(None if self.tools is None else self.functions, self.tool_choice)

    @property
    def is_parallel(self) -> bool:
        """Whether several calls may come."""
        return self.parallel_tool_calls is not False

    @property
    def spelled(self) -> dict[str, str]:
        """The inference service's own fields as this route spells them."""
        return {**super().spelled, "messages": "input", "prompt": "input", "max_tokens": "max_output_tokens"}

    def wanted(self) -> dict[str, dict[str, Any] | None]:
        """What each field wants the output to be; see `form_of`."""
        wanted = super().wanted()
        wanted[_FORMAT] = self.text.format.wanted() if self.text and self.text.format else None
        return wanted_with_calls(wanted, self.callable, as_in_chat(self.tool_choice), parallel=self.is_parallel)

    def call(self, target: Target, *, request_id: str) -> pb.GenerateRequest:
        """The Generate request."""
        params = self.sampling(
            max_tokens=self.max_output_tokens, logprobs=(self.top_logprobs or 0) if self.with_logprobs else None
        )
        prompt = pb.ChatPrompt(
            messages=conversation(self.input, self.instructions, target.digests_inside), add_generation_prompt=True
        )
        if self.callable:  # those that may not be called now are told all the same: calls before were of them
            prompt.tools.extend(map(tool_text, self.functions))
        return pb.GenerateRequest(
            request_id=request_id,
            adapter=target.digest,
            cache_salt=target.caller.salt(self.cache_salt),
            tenant=target.caller.tenant,
            chat=prompt,
            sampling=self.message(params),
        )
