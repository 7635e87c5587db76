"""`POST /v1/chat/completions`: the request, and how its answers are spelled."""

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import MAX_LOGPROBS
from softprompt_api.structured import check_object

from softprompt_gateway.errors import Refused
from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.completions import check_choices
from softprompt_gateway.openai.fields import Count, GenerationFields, Unserved, check_each, only, refuse
from softprompt_gateway.openai.generation import Choice, finish_reason, stop_reason
from softprompt_gateway.openai.logprobs import chat_logprobs
from softprompt_gateway.openai.parts import Content, Parts, check_number_of_parts, say
from softprompt_gateway.openai.structured import ResponseFormat
from softprompt_gateway.openai.style import Style
from softprompt_gateway.openai.tools import (
    MAX_TOOLS,
    Tool,
    ToolChoice,
    Tools,
    callable_tools,
    check_tools,
    tool_text,
    wanted_with_calls,
)
from softprompt_gateway.resolve import Target
from softprompt_gateway.session import Delta
from softprompt_gateway.validation import RequestModel

_FIELD = "messages"
_MAX_MESSAGES = 4096


class CalledFunction(RequestModel):
    """The function of a call."""

    name: Annotated[str, Field(max_length=64)]
    arguments: str = Field(description="a JSON object as text; empty: no arguments")
    parsed_arguments: Any = Field(None, description="accepted, without effect")


class CalledTool(RequestModel):
    """A call that an assistant made."""

    id: Annotated[str, Field(max_length=256)]
    type: Literal["function"]
    function: CalledFunction
    index: Any = Field(None, description="accepted, without effect")

    def proto(self) -> pb.ToolCall:
        """The call as the inference service takes it."""
        return pb.ToolCall(id=self.id, name=self.function.name, arguments=self.function.arguments)


class Message(RequestModel):
    """One turn. What an answer's own message holds may be sent back as it came."""

    model_config = ConfigDict(json_schema_extra=schemas.MESSAGE)

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="needed, but beside tool_calls")
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="which call a tool answers; handed to the chat template"
    )
    # There can be many in each of many messages: an error of each would keep others waiting.
    tool_calls: Annotated[list[CalledTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = Field(
        None, description="calls that an assistant made"
    )
    refusal: Unserved = Field(None, description="accepted where empty")
    annotations: Unserved = Field(None, description="accepted where empty")
    audio: Unserved = Field(None, description="accepted where empty")
    function_call: Unserved = Field(None, description="not supported")
    parsed: Any = Field(None, description="accepted, without effect; of an assistant")

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "Message":
        for name in ("refusal", "annotations", "audio", "function_call"):
            refuse(name, getattr(self, name))
        if self.role != "assistant":
            refuse("tool_calls", self.tool_calls, because="are an assistant's")
            refuse("parsed", self.parsed, because="is an assistant's")
        if self.content is None and not self.tool_calls:
            raise Refused("content is required", code="missing_required_parameter", param="content")
        return self

    def proto(self, target: Target) -> pb.ChatMessage:
        """The turn as the inference service takes it."""
        message = pb.ChatMessage(
            role=self.role,
            name=self.name or "",
            tool_call_id=self.tool_call_id or "",
            tool_calls=[call.proto() for call in self.tool_calls or ()],
        )
        say(message, self.content or "", target.digests_inside)
        return message


class ChatFields(RequestModel):
    """A conversation and how the chat template treats it."""

    messages: Annotated[list[Message], Field(max_length=_MAX_MESSAGES, json_schema_extra={"minItems": 1})]
    add_generation_prompt: bool | None = Field(
        None, description="default true, unless the last message is continued"
    )
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description='values that the chat template reads, as {"enable_thinking": false}'
    )

    @field_validator("messages", mode="wrap")
    @classmethod
    def _check_messages(cls, value: object, check: ValidatorFunctionWrapHandler) -> object:
        if not isinstance(value, list):
            return check(value)
        # Where there are more, that is what is wrong; to look at all of them would keep others waiting.
        few = value[:_MAX_MESSAGES]
        contents = (message.get("content") for message in few if isinstance(message, dict))
        check_number_of_parts(contents, field=_FIELD)
        return check_each(_FIELD, value, check, Message.model_validate)

    @field_validator("chat_template_kwargs")
    @classmethod
    def _check_values(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        name = "chat_template_kwargs"
        return None if value is None else check_object(value, what=name, field=name)

    @model_validator(mode="after")
    def _check_conversation(self) -> "ChatFields":
        if not self.messages:
            raise InvalidArgument("messages must not be empty", field=_FIELD)
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidArgument(
                "continue_final_message and add_generation_prompt cannot both be true",
                field="continue_final_message",
            )
        return self

    @property
    def soft_prompts(self) -> list[str]:
        """The adapters that stand inside messages."""
        contents = [message.content for message in self.messages]
        return [name for content in contents if isinstance(content, Parts) for name in content.names]

    def chat_prompt(self, target: Target) -> pb.ChatPrompt:
        """The conversation as the inference service takes it."""
        opens = (
            not self.continue_final_message if self.add_generation_prompt is None else self.add_generation_prompt
        )
        values = self.chat_template_kwargs
        return pb.ChatPrompt(
            messages=[message.proto(target) for message in self.messages],
            add_generation_prompt=opens,
            continue_final_message=bool(self.continue_final_message),
            chat_template_kwargs=json.dumps(values, ensure_ascii=False) if values else "",
        )


class ChatRequest(ChatFields, GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    max_completion_tokens: Count | None = Field(None, description="default: as many as fit the context")
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = Field(None, description="text, json_object or json_schema")
    tools: Tools | None = Field(None, description="functions that may be called")
    tool_choice: ToolChoice | None = Field(
        None, description='"auto" (default with tools), "none", "required", or the function that must be called'
    )
    parallel_tool_calls: bool | None = Field(None, description="whether several calls may come; default true")
    functions: Unserved = Field(None, description="not supported")
    function_call: Annotated[Any, schemas.unserved("none")] = Field(None, description='only "none"')
    modalities: Annotated[Any, schemas.unserved(["text"])] = Field(None, description='only ["text"]')
    audio: Unserved = Field(None, description="not supported")
    prediction: Unserved = Field(None, description="not supported")
    reasoning_effort: Annotated[Any, schemas.unserved("none")] = Field(None, description='only "none"')
    verbosity: Annotated[Any, schemas.unserved("medium")] = Field(None, description='only "medium"')
    web_search_options: Unserved = Field(None, description="not supported")
    moderation: Unserved = Field(None, description="not supported")
    prompt_cache_options: Unserved = Field(None, description="not supported")
    prompt_cache_retention: Any = Field(None, description="accepted, without effect")
    add_special_tokens: Unserved = Field(None, description="only false: the chat template writes special tokens")

    @field_validator(
        "functions", "audio", "prediction", "web_search_options", "moderation", "prompt_cache_options"
    )
    @classmethod
    def _refuse(cls, value: object, info: Any) -> None:
        refuse(info.field_name, value)

    @field_validator("function_call", "reasoning_effort")
    @classmethod
    def _only_none(cls, value: object, info: Any) -> None:
        only(info.field_name, "none", value)

    @field_validator("verbosity")
    @classmethod
    def _only_medium(cls, value: object) -> None:
        only("verbosity", "medium", value)

    @field_validator("modalities")
    @classmethod
    def _only_text_modality(cls, value: object) -> None:
        refuse("modalities", None if value == ["text"] else value, because='other than ["text"] are not supported')

    @field_validator("add_special_tokens")
    @classmethod
    def _no_special_tokens(cls, value: object) -> None:
        refuse("add_special_tokens", value, because="is not supported in chat: the template writes special tokens")

    @model_validator(mode="after")
    def _check_pairs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidArgument("top_logprobs needs logprobs to be true", field="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidArgument("max_tokens and max_completion_tokens differ; give one", field="max_tokens")
        check_tools(self.tools or ())
        return self

    @cached_property
    def callable(self) -> Sequence[Tool]:
        """The tools that may be called."""
        return callable_tools(self.tools, self.tool_choice)

    def wanted(self) -> dict[str, dict[str, Any] | None]:
        """What each field wants the output to be; see `form_of`."""
        wanted = super().wanted()
        wanted["response_format"] = self.response_format.wanted() if self.response_format else None
        is_parallel = self.parallel_tool_calls is not False
        return wanted_with_calls(wanted, self.callable, self.tool_choice, parallel=is_parallel)

    @property
    def spelled(self) -> dict[str, str]:
        """The inference service's own fields as this route spells them."""
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().spelled, "prompt": "messages", "max_tokens": limit}

    def calls(self, target: Target, *, request_id: str, max_choices: int) -> list[pb.GenerateRequest]:
        """The one Generate request."""
        check_choices(1, self.choices_per_prompt, max_choices)
        params = self.sampling(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )
        return [
            pb.GenerateRequest(
                request_id=request_id,
                adapter=target.digest,
                cache_salt=target.caller.salt(self.cache_salt),
                tenant=target.caller.tenant,
                chat=self._prompt_with_tools(target),
                sampling=self.message(params),
            )
        ]

    def _prompt_with_tools(self, target: Target) -> pb.ChatPrompt:
        prompt = self.chat_prompt(target)
        if self.callable:  # those that may not be called now are told all the same: calls before were of them
            prompt.tools.extend(map(tool_text, self.tools or ()))
        return prompt


class ChatStyle(Style):
    """OpenAI's `chat.completion`, and `chat.completion.chunk` where streamed."""

    id_prefix = "chatcmpl"
    whole = "chat.completion"
    chunk = "chat.completion.chunk"

    def __init__(self, request: ChatRequest) -> None:
        self._with_logprobs = bool(request.logprobs)
        self._with_ids = bool(request.return_token_ids)

    def opening(self, index: int, accepted: pb.Accepted) -> dict[str, Any]:  # noqa: ARG002
        """The role."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def delta(self, index: int, delta: Delta) -> dict[str, Any] | None:
        """New content."""
        return self._with_extras(self._chunk(index, {"content": delta.text}), delta)

    @property
    def _has_extras(self) -> bool:
        return self._with_logprobs or self._with_ids

    def _with_extras(self, shape: dict[str, Any], delta: Delta) -> dict[str, Any]:
        if self._with_logprobs:
            shape["logprobs"] = chat_logprobs(delta.logprobs)
        if self._with_ids:
            shape["token_ids"] = list(delta.token_ids)
        return shape

    def end(self, index: int, finished: pb.Finished) -> dict[str, Any]:
        """Why it ended."""
        return self._chunk(index, {}) | _ending(finished)

    def choice(self, index: int, accepted: pb.Accepted, choice: Choice) -> dict[str, Any]:  # noqa: ARG002
        """The whole message."""
        message = {"role": "assistant", "content": "".join(choice.text), "refusal": None}
        shape = {"index": index, "message": message, "logprobs": None, **_ending(choice.finished)}
        if self._with_logprobs:
            shape["logprobs"] = chat_logprobs(choice.logprobs)
        if self._with_ids:
            shape["token_ids"] = choice.token_ids
        return shape

    def extras(self, accepted: Sequence[pb.Accepted]) -> dict[str, Any]:
        """The conversation's ids, where asked for."""
        return {"prompt_token_ids": list(accepted[0].prompt_token_ids)} if self._with_ids else {}

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _ending(finished: pb.Finished) -> dict[str, Any]:
    return {"finish_reason": finish_reason(finished), "stop_reason": stop_reason(finished)}
