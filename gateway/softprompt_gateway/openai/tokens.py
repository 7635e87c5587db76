"""`/tokenize` and `/detokenize`, in vLLM's shapes with virtual tokens counted."""

from typing import Any

from pydantic import Field, model_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway.openai.chat import ChatFields
from softprompt_gateway.openai.fields import TokenId, refuse
from softprompt_gateway.validation import RequestModel


class TokenizeCompletionRequest(RequestModel):
    """Body of `POST /tokenize` for a text."""

    model: str | None = Field(None, description="default: the base model", max_length=512)
    prompt: str
    add_special_tokens: bool | None = Field(None, description="default true")
    return_token_strs: bool | None = None

    def call(self, digest: str) -> pb.TokenizeRequest:
        """The request to the inference service."""
        return pb.TokenizeRequest(
            text=self.prompt,
            add_special_tokens=self.add_special_tokens,
            adapter=digest,
            return_token_strings=bool(self.return_token_strs),
        )


class TokenizeChatRequest(ChatFields):
    """Body of `POST /tokenize` for a conversation."""

    model: str | None = Field(None, description="default: the base model", max_length=512)
    add_special_tokens: Any = Field(None, description="only false: the chat template writes special tokens")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _no_special_tokens(self) -> "TokenizeChatRequest":
        refuse("add_special_tokens", self.add_special_tokens, because="is not supported in chat")
        return self

    def call(self, digest: str) -> pb.TokenizeRequest:
        """The request to the inference service."""
        return pb.TokenizeRequest(
            chat=self.chat_prompt(), adapter=digest, return_token_strings=bool(self.return_token_strs)
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

    model: str | None = Field(None, description="default: the base model", max_length=512)
    tokens: list[TokenId]
