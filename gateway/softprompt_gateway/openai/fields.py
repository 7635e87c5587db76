"""What completions and chat requests share: sampling fields, and fields that are accepted or refused by name."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator
from softprompt_api.composition import MAX_ADAPTERS
from softprompt_api.errors import InvalidArgument, SoftpromptError, Unsupported
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.names import shown
from softprompt_api.params import (
    MAX_LOGIT_BIAS,
    MAX_N,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKEN_IDS,
    MAX_TOKENS_LIMIT,
    SamplingParams,
)
from softprompt_api.structured import FIELD as STRUCTURED
from softprompt_api.structured import KINDS

from softprompt_gateway.body import Holds
from softprompt_gateway.errors import Refused
from softprompt_gateway.openai import schemas
from softprompt_gateway.openai.structured import OLD_NAMES, Form, check_members, form_of, grammar_message
from softprompt_gateway.validation import RequestModel, at_most

_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("stop", "stop_token_ids", "include_stop_str_in_output", "min_tokens", "ignore_eos", "skip_special_tokens"),
)
# What a model may recommend otherwise: left to the inference service where a request does not say.
_MODELS_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
# Parameters of other servers and routes that clients send though they want nothing of them, each with the number
# that says so.
_FOREIGN: Mapping[str, int | None] = {
    **dict.fromkeys(("use_beam_search", "early_stopping", "bad_words", "allowed_token_ids", "logits_processors")),
    **dict.fromkeys(("chat_template", "chat_template_kwargs", "documents", "mm_processor_kwargs")),
    **dict.fromkeys(("echo", "suffix", "best_of", "prompt_logprobs")),
    "length_penalty": 1,
    "priority": 0,
}
_TOKEN_ID = re.compile(r"(?:0|[1-9][0-9]{0,9})\Z")  # one spelling, or one entry would hide another
Count = Annotated[int, Field(ge=1, le=MAX_TOKENS_LIMIT)]
TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)]
# Room for as many digests as go together.
Model = Annotated[str, Field(max_length=2048)]
Adapters = Annotated[list[Annotated[str, Field(max_length=512)]], Field(max_length=MAX_ADAPTERS)]
LogitBias = Annotated[
    dict[str, float],
    Field(max_length=MAX_LOGIT_BIAS, json_schema_extra=schemas.LOGIT_BIAS),
    at_most(MAX_LOGIT_BIAS),
]


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _is_number(value: object, number: int | None) -> bool:
    """Whether it is this number, and no boolean, which Python takes for one."""
    return type(value) in (int, float) and value == number


def _check_bias_keys(value: dict[str, float]) -> dict[str, float]:
    for key in value:
        if not _TOKEN_ID.match(key):
            raise InvalidArgument(f"logit_bias: {shown(key)} is not a token id", field="logit_bias")
    return value


def is_off(value: object) -> bool:
    """Whether a field that holds this asks for nothing."""
    return value is False or value in (None, "", [], {})  # 0 equals False, and is not empty


def refuse(field: str, value: object, *, because: str = "is not supported") -> None:
    """Raise Unsupported where a field that we do not serve holds something that would change the answer."""
    if not is_off(value):
        raise Unsupported(f"{field} {because}", field=field)


def only(field: str, served: object, value: object) -> None:
    """Raise Unsupported where a field holds something else than the one value of it that we serve."""
    refuse(field, None if value == served else value, because=f"other than {served!r} is not supported")


def check_each(
    field: str, values: list[Any], check: Callable[[Any], object], check_one: Callable[[Any], object]
) -> object:
    """What `check` makes of a list; errors that our own checks of its items raise say which item it is.

    Those that pydantic makes do so anyway.
    """
    try:
        return check(values)
    except (Refused, SoftpromptError):
        for number, value in enumerate(values):
            with _fields_in(f"{field}.{number}"), suppress(ValidationError):
                check_one(value)
        raise


@contextmanager
def _fields_in(place: str) -> Iterator[None]:
    """Let errors say where the field is that they name."""
    try:
        yield
    except Refused as error:
        body = error.body
        told, param = f"{place}: {body.message}", f"{place}.{body.param}"
        raise Refused(told, code=body.answer.code, param=param) from None
    except SoftpromptError as error:
        raise type(error)(f"{place}: {error.message}", field=f"{place}.{error.field}") from None


Unserved = Annotated[Any, schemas.unserved()]
StopStrings = Annotated[list[str], Field(max_length=MAX_STOP_STRINGS), BeforeValidator(_as_list), schemas.STOP]


class StreamOptions(RequestModel):
    """How to stream."""

    include_usage: bool | None = Field(None, description="send a last chunk with the usage")
    continuous_usage_stats: bool | None = Field(
        None, description="with include_usage: send what was used so far with every chunk, as vLLM does"
    )
    include_obfuscation: Unserved = Field(None, description="only false")

    @field_validator("include_obfuscation")
    @classmethod
    def _refuse_obfuscation(cls, value: object) -> None:
        refuse("stream_options.include_obfuscation", value)


class GenerationFields(RequestModel):
    """Fields of every request that generates; null means the default."""

    model: Model = Field(description="the base model's id, or adapters joined by '+': name, name@1 or sha256:…")
    adapters: Adapters | None = Field(None, description="adapters, where model is the base model's id")
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKENS_LIMIT)] | None = Field(None, description="-1 or 0: all")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    logit_bias: LogitBias | None = None
    stop: StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKENS_LIMIT)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = Field(None, description="add the token ids of prompt and choices")
    structured_outputs: (
        Annotated[dict[str, Any], schemas.STRUCTURED_OUTPUTS, Holds((frozenset(KINDS),))] | None
    ) = Field(None, description="what the output must be: one of json, regex, choice, grammar, json_object")
    guided_json: Annotated[Any, schemas.member("json")] = Field(
        None, description="older name of structured_outputs.json"
    )
    guided_regex: Annotated[Any, schemas.member("regex")] = Field(
        None, description="older name of structured_outputs.regex"
    )
    guided_choice: Annotated[Any, schemas.member("choice")] = Field(
        None, description="older name of structured_outputs.choice"
    )
    guided_grammar: Annotated[Any, schemas.member("grammar")] = Field(
        None, description="older name of structured_outputs.grammar"
    )
    guided_decoding_backend: Any = Field(None, description="accepted, without effect")
    guided_whitespace_pattern: Unserved = Field(None, description="not supported")

    cache_salt: Annotated[str, Field(min_length=1, max_length=256)] | None = Field(
        None, description="share KV only with requests that have the same"
    )

    typical_p: Annotated[Any, schemas.only(1)] = Field(None, description="only 1")
    truncate_prompt_tokens: Unserved = Field(None, description="not supported")

    user: Any = Field(None, description="accepted, without effect")
    metadata: Any = Field(None, description="accepted, without effect")
    store: Any = Field(None, description="accepted, without effect")
    service_tier: Any = Field(None, description="accepted, without effect")
    safety_identifier: Any = Field(None, description="accepted, without effect")
    prompt_cache_key: Any = Field(None, description="accepted, without effect")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_foreign(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        foreign = value.keys() & (_FOREIGN.keys() - cls.model_fields.keys())
        idle = {name for name in foreign if is_off(value[name]) or _is_number(value[name], _FOREIGN[name])}
        return {name: member for name, member in value.items() if name not in idle} if idle else value

    @field_validator("structured_outputs")
    @classmethod
    def _check_members(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        return check_members(value)

    @field_validator("typical_p")
    @classmethod
    def _only_typical_one(cls, value: object) -> None:
        if value is not None and not _is_number(value, 1):
            raise Unsupported("typical_p other than 1 is not supported", field="typical_p")

    @field_validator("truncate_prompt_tokens", "guided_whitespace_pattern")
    @classmethod
    def _refuse_unsupported(cls, value: object, info: Any) -> None:
        refuse(info.field_name, value)

    @model_validator(mode="after")
    def _check_shared(self) -> "GenerationFields":
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options needs stream to be true", field="stream_options")
        if self.logit_bias:
            _check_bias_keys(self.logit_bias)
        return self

    @property
    def choices_per_prompt(self) -> int:
        """`n`, or its default."""
        return self.n or 1

    @property
    def generated_per_prompt(self) -> int:
        """As many, unless the best of several are answered."""
        return self.choices_per_prompt

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def include_usage_so_far(self) -> bool:
        """Whether every chunk of a stream has the usage so far."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def wanted(self) -> dict[str, dict[str, Any] | None]:
        """What each field wants the output to be; see `form_of`."""
        old = {name: getattr(self, name) for name in OLD_NAMES}
        return {
            STRUCTURED: self.structured_outputs,
            **{name: None if value is None else {OLD_NAMES[name]: value} for name, value in old.items()},
        }

    @cached_property
    def form(self) -> Form | None:
        """What the output must be; None: anything."""
        return form_of(self.wanted())

    @property
    def form_field(self) -> str:
        """The field that says what the output must be."""
        return self.form.field if self.form else STRUCTURED

    @property
    def spelled(self) -> dict[str, str]:
        """The inference service's own fields as this route spells them."""
        return {STRUCTURED: self.form_field}

    def sampling(
        self, *, max_tokens: int | None, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """The checked parameters, the same that every service checks."""
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        bias = {int(key): value for key, value in (self.logit_bias or {}).items()}
        return SamplingParams(
            **given,
            n=self.generated_per_prompt,
            logit_bias=bias,
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured_outputs=self.form.params if self.form else None,
        )

    def message(self, params: SamplingParams) -> pb.SamplingParams:
        """The parameters as the inference service takes them, without those that are left to the model."""
        said = {name: value for name in _MODELS_OWN if (value := getattr(self, name)) is not None}
        return pb.SamplingParams(
            **said,
            max_tokens=params.max_tokens,
            seed=params.seed,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            stop=params.stop,
            stop_token_ids=params.stop_token_ids,
            min_tokens=params.min_tokens,
            ignore_eos=params.ignore_eos,
            logit_bias=params.logit_bias,
            logprobs=params.logprobs,
            prompt_logprobs=params.prompt_logprobs,
            n=params.n,
            include_stop_str_in_output=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            grammar=grammar_message(params.structured_outputs),
        )
