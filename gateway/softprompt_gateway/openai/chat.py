"""`POST /v1/chat/completions`: the request, and how its answers are spelled."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import MAX_LOGPROBS

from softprompt_gateway.openai.completions import check_choices
from softprompt_gateway.openai.fields import Count, GenerationFields, refuse, sampling_message
from softprompt_gateway.openai.generation import Choice, finish_reason, stop_reason
from softprompt_gateway.openai.logprobs import chat_logprobs
from softprompt_gateway.openai.parts import Content, Parts
from softprompt_gateway.openai.style import Style
from softprompt_gateway.resolve import Target
from softprompt_gateway.session import Delta
from softprompt_gateway.validation import RequestModel

_FIELD = "messages"
_MAX_MESSAGES = 4096


class Message(RequestModel):
    """One turn. What an answer's own message holds may be sent back as it came."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Content
    name: Annotated[str, Field(max_length=64)] | None = None
    tool_call_id: Annotated[str, Field(max_length=256)] | None = Field(
        None, description="accepted, without effect"
    )
    refusal: Any = Field(None, description="accepted where empty")
    annotations: Any = Field(None, description="accepted where empty")
    audio: Any = Field(None, description="accepted where empty")
    function_call: Any = Field(None, description="not supported")
    tool_calls: Any = Field(None, description="not supported")

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> "Message":
        for name in ("refusal", "annotations", "audio", "function_call", "tool_calls"):
            refuse(f"{_FIELD}.{name}", getattr(self, name))
        return self

    def proto(self, target: Target) -> pb.ChatMessage:
        """The turn as the inference service takes it."""
        content = self.content
        message = pb.ChatMessage(role=self.role, name=self.name or "")
        if isinstance(content, str):
            message.content = content
        else:
            message.parts.extend(content.content(target.digests_inside))
        return message


class ChatFields(RequestModel):
    """A conversation and how the chat template treats it."""

    messages: Annotated[list[Message], Field(max_length=_MAX_MESSAGES)]
    add_generation_prompt: bool | None = Field(
        None, description="default true, unless the last message is continued"
    )
    continue_final_message: bool | None = None

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
        return pb.ChatPrompt(
            messages=[message.proto(target) for message in self.messages],
            add_generation_prompt=opens,
            continue_final_message=bool(self.continue_final_message),
        )


class ChatRequest(ChatFields, GenerationFields):
    """Body of `POST /v1/chat/completions`."""

    max_completion_tokens: Count | None = Field(None, description="default: as many as fit the context")
    max_tokens: Count | None = Field(None, description="older name of max_completion_tokens")
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Any = Field(None, description='only {"type": "text"}')
    tools: Any = Field(None, description="not supported")
    tool_choice: Any = Field(None, description='only "none"')
    parallel_tool_calls: Any = Field(None, description="accepted, without effect while tools are not supported")
    functions: Any = Field(None, description="not supported")
    function_call: Any = Field(None, description='only "none"')
    modalities: Any = Field(None, description='only ["text"]')
    audio: Any = Field(None, description="not supported")
    prediction: Any = Field(None, description="not supported")
    reasoning_effort: Any = Field(None, description="not supported")
    web_search_options: Any = Field(None, description="not supported")
    add_special_tokens: Any = Field(None, description="only false: the chat template writes special tokens")

    @field_validator("tools", "functions", "audio", "prediction", "reasoning_effort", "web_search_options")
    @classmethod
    def _refuse(cls, value: object, info: Any) -> None:
        refuse(info.field_name, value)

    @field_validator("tool_choice", "function_call")
    @classmethod
    def _only_none(cls, value: object, info: Any) -> None:
        refuse(info.field_name, None if value == "none" else value, because="other than 'none' is not supported")

    @field_validator("response_format")
    @classmethod
    def _only_text(cls, value: object) -> None:
        refuse(
            "response_format",
            None if value == {"type": "text"} else value,
            because="other than text is not supported",
        )

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
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidArgument("top_logprobs needs logprobs to be true", field="top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidArgument("max_tokens and max_completion_tokens differ; give one", field="max_tokens")
        return self

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
                chat=self.chat_prompt(target),
                sampling=sampling_message(params),
            )
        ]


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

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """New content."""
        shape = self._chunk(index, {"content": delta.text})
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
    def _chunk(index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}


def _ending(finished: pb.Finished) -> dict[str, Any]:
    return {"finish_reason": finish_reason(finished), "stop_reason": stop_reason(finished)}
