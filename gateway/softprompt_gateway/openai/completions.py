"""`POST /v1/completions`: the request, and how its answers are spelled."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeGuard

from pydantic import Field, PlainValidator, field_validator, model_validator
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import MAX_LOGPROBS, MAX_N, MAX_TOKENS_LIMIT, SamplingParams

from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.fields import GenerationFields, Unserved, refuse
from softprompt_gateway.openai.generation import Choice, finish_reason, stop_reason
from softprompt_gateway.openai.logprobs import (
    EchoedText,
    OutputPlaces,
    completion_logprobs,
    echoed_logprobs,
    prompt_logprobs,
)
from softprompt_gateway.openai.parts import (
    HOLDS_PARTS,
    PROMPT_PARTS_SCHEMA,
    Parts,
    check_number_of_parts,
    parse_parts,
)
from softprompt_gateway.openai.style import Style
from softprompt_gateway.resolve import Target
from softprompt_gateway.session import Delta

Prompt = str | list[int] | Parts
DEFAULT_MAX_TOKENS = 16
_MAX_ID = 2**31 - 1
# As many as the setting of the most choices can allow: more are not worth a look.
_MAX_LISTS = 4096


def parse_prompts(value: object) -> list[Prompt]:
    """One prompt or many, each a text, ids or parts; raise InvalidArgument for anything else."""
    if isinstance(value, str):
        prompts: list[Prompt] = [value]
    elif _are_parts(value):
        prompts = [_parts(value)]
    elif isinstance(value, list) and value and all(isinstance(one, str) for one in value):
        prompts = value
    elif isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        if len(value) > _MAX_LISTS:
            raise InvalidArgument(f"{len(value)} prompts; at most {_MAX_LISTS} in one request", field="prompt")
        check_number_of_parts(filter(_are_parts, value), field="prompt")
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
    # Their types: bool is an int in Python, and true is nobody's token.
    if value and (set(map(type, value)) != {int} or min(value) < 0 or max(value) > _MAX_ID):
        raise InvalidArgument("prompt must hold strings only, or token ids only (integers from 0)", field="prompt")
    return value


class CompletionRequest(GenerationFields):
    """Body of `POST /v1/completions`."""

    prompt: Annotated[
        list[Prompt], PlainValidator(parse_prompts), schemas.prompts(PROMPT_PARTS_SCHEMA), HOLDS_PARTS
    ]
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)] | None = Field(
        None, description=f"default {DEFAULT_MAX_TOKENS}; 0 with echo or prompt_logprobs"
    )
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(
        None, description="generate so many for each prompt, and return the n likeliest; default n"
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = Field(
        None, description="log-probabilities of the prompt, as vLLM gives them"
    )
    suffix: Unserved = Field(None, description="not supported")
    add_special_tokens: bool | None = Field(None, description="default true; text prompts only")

    @field_validator("suffix")
    @classmethod
    def _refuse_suffix(cls, value: object) -> None:
        refuse("suffix", value)

    @model_validator(mode="after")
    def _check_counts(self) -> "CompletionRequest":
        if self.max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise InvalidArgument(
                "max_tokens of 0 needs echo or prompt_logprobs: there would be no answer", field="max_tokens"
            )
        if self.generated_per_prompt < self.choices_per_prompt:
            raise InvalidArgument(
                f"best_of is {self.best_of}, less than n, {self.choices_per_prompt}", field="best_of"
            )
        if self.stream and self.generated_per_prompt > self.choices_per_prompt:
            raise InvalidArgument(
                "best_of above n cannot be streamed: the best is known at the end", field="best_of"
            )
        return self

    @property
    def generated_per_prompt(self) -> int:
        """`best_of`, or its default."""
        return self.best_of or self.choices_per_prompt

    @property
    def soft_prompts(self) -> list[str]:
        """The adapters that stand inside prompts."""
        return [name for prompt in self.prompt if isinstance(prompt, Parts) for name in prompt.names]

    def calls(self, target: Target, *, request_id: str, max_choices: int) -> list[pb.GenerateRequest]:
        """One Generate request per prompt."""
        field = "n" if self.best_of is None else "best_of"
        check_choices(len(self.prompt), self.generated_per_prompt, max_choices, field=field)
        check_ids(self.prompt, target.served.base_model.vocab_size)
        sampling = self.message(self._params())
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

    def _params(self) -> SamplingParams:
        is_ranked = self.generated_per_prompt > self.choices_per_prompt
        told = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return self.sampling(
            max_tokens=DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens,
            logprobs=0 if is_ranked and self.logprobs is None else self.logprobs,
            prompt_logprobs=max((count for count in told if count is not None), default=None),
        )


def as_prompt(prompt: Prompt, target: Target) -> dict[str, Any]:
    """The field of a request to the inference service that has the prompt."""
    if isinstance(prompt, Parts):
        return {"parts": prompt.prompt(target.digests_inside)}
    return {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}


def check_choices(num_prompts: int, choices_per_prompt: int, max_choices: int, *, field: str = "n") -> None:
    """Raise InvalidArgument where one request asks for too much.

    Args:
        field: the one that says how many choices a prompt has.
    """
    if num_prompts * choices_per_prompt > max_choices:
        raise InvalidArgument(
            f"{num_prompts} prompts with {field}={choices_per_prompt} make {num_prompts * choices_per_prompt} "
            f"choices; at most {max_choices} in one request",
            field=field if choices_per_prompt > 1 else "prompt",
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
        self._num_top = request.logprobs
        self._num_prompt_top = request.prompt_logprobs
        self._with_ids = bool(request.return_token_ids)
        self._per_prompt = request.choices_per_prompt
        self._echoes = echoes
        self._tells_echo = bool(request.echo) and request.logprobs is not None
        self._skips_special = request.skip_special_tokens is not False
        self._places: dict[int, OutputPlaces] = {}  # of each choice of a stream that tells its tokens
        # Of each choice of a stream: its prompt, and how many tokens of it are still to be told.
        self._echoed: dict[int, EchoedText] = {}
        self._num_untold: dict[int, int] = {}

    def opening(self, index: int, accepted: pb.Accepted) -> dict[str, Any] | None:
        """The echoed prompt, where nothing is to be told of its tokens, and its ids where asked for."""
        text = self._echoes[index // self._per_prompt]
        if self._tells_echo:
            self._echoed[index] = EchoedText(text)
            self._num_untold[index] = len(accepted.prompt_token_ids)
            text = ""
        if not text and not self._with_ids:
            return None
        shape = self._shape(index, text)
        if self._with_ids:
            shape |= {"prompt_token_ids": list(accepted.prompt_token_ids), "token_ids": []}
        return shape

    def prompt(self, index: int, told: pb.PromptLogprobs) -> dict[str, Any]:
        """The next tokens of the prompt, and their echo."""
        shape = self._shape(index, "")
        if self._tells_echo:
            echoed = self._echoed[index]
            self._num_untold[index] -= len(told.tokens)
            shape["logprobs"] = echoed_logprobs([told], echoed, num_top=self._num_top or 0)
            shape["text"] = echoed.show(is_last=not self._num_untold[index])
        return shape | self._vllm_shape([told])

    def _output_places(self, echo: str) -> OutputPlaces:
        return OutputPlaces(len(echo), skips_special=self._skips_special)

    def _vllm_shape(self, told: Sequence[pb.PromptLogprobs]) -> dict[str, Any]:
        if self._num_prompt_top is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(told, num_top=self._num_prompt_top)}

    def delta(self, index: int, delta: Delta) -> dict[str, Any]:
        """New text."""
        shape = self._shape(index, delta.text)
        if self._num_top is not None:
            if index not in self._places:
                self._places[index] = self._output_places(self._echoes[index // self._per_prompt])
            shape["logprobs"] = completion_logprobs(delta.logprobs, self._places[index])
        if self._with_ids:
            shape["token_ids"] = list(delta.token_ids)
        return shape

    def end(self, index: int, finished: pb.Finished) -> dict[str, Any]:
        """Why it ended."""
        return self._shape(index, "", finished)

    def choice(self, index: int, accepted: pb.Accepted, choice: Choice) -> dict[str, Any]:
        """The whole text."""
        echo = self._echoes[index // self._per_prompt]
        shape = self._shape(index, echo + "".join(choice.text), choice.finished)
        if self._num_top is not None:
            shape["logprobs"] = completion_logprobs(choice.logprobs, self._output_places(echo))
        if self._tells_echo:
            echoed = echoed_logprobs(choice.prompt, EchoedText(echo), num_top=self._num_top or 0)
            shape["logprobs"] = {name: echoed[name] + shape["logprobs"][name] for name in echoed}
        if self._with_ids:
            shape |= {"prompt_token_ids": list(accepted.prompt_token_ids), "token_ids": choice.token_ids}
        return shape | self._vllm_shape(choice.prompt)

    @staticmethod
    def _shape(index: int, text: str, finished: pb.Finished | None = None) -> dict[str, Any]:
        shape: dict[str, Any] = {"index": index, "text": text, "logprobs": None, "finish_reason": None}
        if finished is not None:
            shape |= {"finish_reason": finish_reason(finished), "stop_reason": stop_reason(finished)}
        return shape
