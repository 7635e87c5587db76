"""`POST /v1/completions`: the request, and how its answers are spelled."""

from typing import Annotated, Any, TypeGuard

from pydantic import Field, PlainValidator, field_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import MAX_LOGPROBS

from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.fields import Count, GenerationFields, Unserved, refuse, sampling_message
from softprompt_gateway.openai.generation import Choice, finish_reason, stop_reason
from softprompt_gateway.openai.logprobs import completion_logprobs
from softprompt_gateway.openai.parts import PROMPT_PARTS_SCHEMA, Parts, parse_parts
from softprompt_gateway.openai.style import Style
from softprompt_gateway.resolve import Target
from softprompt_gateway.session import Delta

Prompt = str | list[int] | Parts
DEFAULT_MAX_TOKENS = 16
_MAX_ID = 2**31 - 1


def parse_prompts(value: object) -> list[Prompt]:
    """One prompt or many, each a text, ids or parts; raise InvalidArgument for anything else."""
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif _are_parts(value):
        prompts = [_parts(value)]
    elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        prompts = value
    elif isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        prompts = [_parts(one) if _are_parts(one) else _ids(one) for one in value]
    elif isinstance(value, list):
        prompts = [_ids(value)]
    else:
        raise InvalidArgument("prompt must be a string, strings, token ids, or lists of token ids", field="prompt")
    if not all(prompts):
        raise InvalidArgument("prompt must not be empty", field="prompt")
    return prompts


def parse_prompt(value: object) -> str | Parts:
    """One prompt, a text or parts, as `/tokenize` takes it."""
    if isinstance(value, str):
        return value
    if _are_parts(value):
        return _parts(value)
    raise InvalidArgument("prompt must be a string or a list of parts", field="prompt")


def _are_parts(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _parts(value: list[dict[str, Any]]) -> Parts:
    parts = parse_parts(value, field="prompt", between="")
    if not parts.text:
        raise InvalidArgument("prompt must have text beside its soft prompts", field="prompt")
    return parts


def _ids(value: list[Any]) -> list[int]:
    # Its type: bool is an int in Python, and true is nobody's token.
    if not all(type(one) is int and 0 <= one <= _MAX_ID for one in value):
        raise InvalidArgument("prompt must hold strings only, or token ids only (integers from 0)", field="prompt")
    return value


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[list[Prompt], PlainValidator(parse_prompts), schemas.prompts(PROMPT_PARTS_SCHEMA)]
    max_tokens: Count | None = Field(None, description=f"default {DEFAULT_MAX_TOKENS}")
    best_of: Any = Field(None, description="only equal to n")
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Unserved = Field(None, description="not supported")
    add_special_tokens: bool | None = Field(None, description="default true; text prompts only")

    @field_validator("suffix")
    @classmethod
    def _refuse_suffix(cls, value: object) -> None:
        refuse("suffix", value)

    @property
    def soft_prompts(self) -> list[str]:
        """The adapters that stand inside prompts."""
        return [name for prompt in self.prompt if isinstance(prompt, Parts) for name in prompt.names]

    def calls(self, target: Target, *, request_id: str, max_choices: int) -> list[pb.GenerateRequest]:
        """One Generate request per prompt."""
        if self.best_of is not None and (type(self.best_of) is not int or self.best_of != self.choices_per_prompt):
            refuse("best_of", self.best_of or True, because="is supported only where it equals n")
        if self.echo and self.logprobs is not None:
            refuse("echo", True, because="with logprobs is not supported")
        check_choices(len(self.prompt), self.choices_per_prompt, max_choices)
        check_ids(self.prompt, target.served.base_model.vocab_size)
        sampling = sampling_message(
            self.sampling(max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS, logprobs=self.logprobs)
        )
        return [
            pb.GenerateRequest(
                request_id=request_id,
                adapter=target.digest,
                cache_salt=target.caller.salt(self.cache_salt),
                tenant=target.caller.tenant,
                **as_prompt(prompt, target),
                sampling=sampling,
                add_special_tokens=self.add_special_tokens,
            )
            for prompt in self.prompt
        ]


def as_prompt(prompt: Prompt, target: Target) -> dict[str, Any]:
    """The field of a request to the inference service that has the prompt."""
    if isinstance(prompt, Parts):
        return {"parts": prompt.prompt(target.digests_inside)}
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}


def check_choices(num_prompts: int, choices_per_prompt: int, max_choices: int) -> None:
    """Raise InvalidArgument where one request asks for too much."""
    if num_prompts * choices_per_prompt > max_choices:
        raise InvalidArgument(
            f"{num_prompts} prompts with n={choices_per_prompt} make {num_prompts * choices_per_prompt} choices; "
            f"at most {max_choices} in one request",
            field="n" if choices_per_prompt > 1 else "prompt",
        )


def check_ids(prompts: list[Prompt], vocab_size: int) -> None:
    """Raise InvalidArgument where a prompt has an id outside the vocabulary."""
    for prompt in prompts:
        if isinstance(prompt, list) and max(prompt) >= vocab_size:
            raise InvalidArgument(
                f"prompt has token id {max(prompt)}, but the vocabulary ends at {vocab_size - 1}", field="prompt"
            )


class CompletionStyle(Style):
    """OpenAI's `text_completion`.

    Args:
        echoes: what stands before each prompt's text; empty strings without echo.
    """

    id_prefix = "cmpl"
    whole = "text_completion"
    chunk = "text_completion"

    def __init__(self, request: CompletionRequest, echoes: list[str]) -> None:
        self._with_logprobs = request.logprobs is not None
        self._with_ids = bool(request.return_token_ids)
        self._per_prompt = request.choices_per_prompt
        self._echoes = echoes
        self._offsets = [0] * (len(echoes) * self._per_prompt)

    def opening(self, index: int, accepted: pb.Accepted) -> dict[str, Any] | None:
        """The echoed prompt, and its ids where asked for."""
        text = self._echoes[index // self._per_prompt]
        if not text and not self._with_ids:
            return None
        shape = self._shape(index, text)
        if self._with_ids:
            shape |= {"prompt_token_ids": list(accepted.prompt_token_ids), "token_ids": []}
        return shape

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text."""
        shape = self._shape(index, delta.text)
        if self._with_logprobs:
            shape["logprobs"], self._offsets[index] = completion_logprobs(delta.logprobs, self._offsets[index])
        if self._with_ids:
            shape["token_ids"] = list(delta.token_ids)
        return shape

    def end(self, index: int, finished: pb.Finished) -> dict[str, Any]:
        """Why it ended."""
        return self._shape(index, "", finished)

    def choice(self, index: int, accepted: pb.Accepted, choice: Choice) -> dict[str, Any]:
        """The whole text."""
        text = self._echoes[index // self._per_prompt] + "".join(choice.text)
        shape = self._shape(index, text, choice.finished)
        if self._with_logprobs:
            shape["logprobs"], _ = completion_logprobs(choice.logprobs, 0)
        if self._with_ids:
            shape |= {"prompt_token_ids": list(accepted.prompt_token_ids), "token_ids": choice.token_ids}
        return shape

    @staticmethod
    def _shape(index: int, text: str, finished: pb.Finished | None = None) -> dict[str, Any]:
        shape: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if finished is not None:
            shape |= {"finish_reason": finish_reason(finished), "stop_reason": stop_reason(finished)}
        return shape
