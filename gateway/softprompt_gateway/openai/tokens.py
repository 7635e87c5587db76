"""`/tokenize` and `/detokenize`, in vLLM's shapes with virtual tokens counted."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.chat import ChatFields
from softprompt_gateway.openai.completions import as_prompt, parse_prompt
from softprompt_gateway.openai.fields import Adapters, Model, TokenId, Unserved, refuse
from softprompt_gateway.openai.parts import PROMPT_PARTS_SCHEMA, Parts
from softprompt_gateway.resolve import Target
from softprompt_gateway.validation import RequestModel

_PROMPT_SCHEMA = {"anyOf": [{"type": "string"}, PROMPT_PARTS_SCHEMA]}


class TokenizeCompletionRequest(RequestModel):
    """Body of `POST /tokenize` for a text."""

    prompt_field: ClassVar[str] = "prompt"

    model: Model | None = Field(None, description="default: the base model")
    adapters: Adapters | None = Field(None, description="adapters, where model is the base model's id")
    prompt: Annotated[str | Parts, PlainValidator(parse_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    add_special_tokens: bool | None = Field(None, description="default true")
    return_token_strs: bool | None = None

    @property
    def soft_prompts(self) -> list[str]:
        """The adapters that stand inside the prompt."""
        return self.prompt.names if isinstance(self.prompt, Parts) else []

    def call(self, target: Target) -> pb.TokenizeRequest:
        """The request to the inference service."""
        return pb.TokenizeRequest(
            **as_prompt(self.prompt, target),
            add_special_tokens=self.add_special_tokens,
            adapter=target.digest,
            return_token_strings=bool(self.return_token_strs),
        )


class TokenizeChatRequest(ChatFields):
    """Body of `POST /tokenize` for a conversation."""

    prompt_field: ClassVar[str] = "messages"

    model: Model | None = Field(None, description="default: the base model")
    adapters: Adapters | None = Field(None, description="adapters, where model is the base model's id")
    add_special_tokens: Unserved = Field(None, description="only false: the chat template writes special tokens")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _no_special_tokens(self) -> "TokenizeChatRequest":
        refuse("add_special_tokens", self.add_special_tokens, because="is not supported in chat")
        return self

    def call(self, target: Target) -> pb.TokenizeRequest:
        """The request to the inference service."""
        return pb.TokenizeRequest(
            chat=self.chat_prompt(target), adapter=target.digest, return_token_strings=bool(self.return_token_strs)
        )


def parse_tokenize(body: dict[str, Any]) -> TokenizeCompletionRequest | TokenizeChatRequest:
    """A text has `prompt`, a conversation has `messages`."""
    if "prompt" in body and "messages" in body:
        raise InvalidArgument("give prompt or messages, not both", field="prompt")
    return (TokenizeChatRequest if "messages" in body else TokenizeCompletionRequest).checked(body)


def tokenized(answer: pb.TokenizeResponse, *, with_strings: bool) -> dict[str, Any]:
    """vLLM's answer, and how many virtual tokens stand in front."""
    return {
        "count": len(answer.ids),
        "max_model_len": answer.max_model_len,
        "tokens": list(answer.ids),
        "token_strs": list(answer.token_strings) if with_strings else None,
        "virtual_tokens": answer.virtual_tokens,
    }


class DetokenizeRequest(RequestModel):
    """Body of `POST /detokenize`."""

    model: Model | None = Field(None, description="default: the base model")
    # As many as fit into a body: an error of each would take a gigabyte.
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
