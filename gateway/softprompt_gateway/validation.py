"""Checked request models, and what is wrong with a request in words."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticKnownError
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import shown

from softprompt_gateway.errors import Refused

# What other servers call a parameter of ours.
_FOREIGN_NAMES = {
    "do_sample": "temperature",
    "max_length": "max_tokens",
    "max_new_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "num_return_sequences": "n",
    "random_seed": "seed",
    "repeat_penalty": "repetition_penalty",
    "stop_sequences": "stop",
}


# OpenAI's names of functions and schemas.
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def check_name(value: str, *, what: str, field: str) -> str:
    """A name of something that a request brings; InvalidArgument for what OpenAI takes for none."""
    if not _NAME.match(value):
        raise InvalidArgument(
            f"{what} must have a name of 1 to 64 letters, digits, _ or -; {shown(value)} is none", field=field
        )
    return value


def at_most(limit: int) -> BeforeValidator:
    """How many members an object may have, where a field takes any names.

    pydantic counts them when it has looked at all of them, and makes an error of each that is wrong.
    """

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > limit:
            counts = {"field_type": "Dictionary", "max_length": limit, "actual_length": len(value)}
            raise PydanticKnownError("too_long", counts)
        return value

    return BeforeValidator(check)


class RequestModel(BaseModel):
    """A request body: exact types (no "16" for 16, no true for 1), and no field that we do not know.

    Attributes:
        foreign_names: what other routes call a parameter of this one.
    """

    foreign_names: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _keep_one_unknown(cls, value: object) -> object:
        # The first is told of: pydantic would make an error of each, of as many as fit into a body.
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(name for name in value if name not in known)
        return {name: member for name, member in value.items() if name in known or name == unknown}

    @classmethod
    def checked(cls, value: dict[str, Any]) -> Self:
        """Validate; raise Refused, or the InvalidArgument of a field's own check."""
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            raise _refusal(cls, value, error.errors(include_url=False, include_input=False)[0]) from None


def _refusal(model: type[RequestModel], value: dict[str, Any], error: ErrorDetails) -> Refused:
    param = ".".join(str(part)[:64] for part in _place(value, error))
    if error["type"] == "extra_forbidden":
        return Refused(_unknown(model, error), code="unknown_parameter", param=shown(param).strip("'"))
    if error["type"] == "missing":
        return Refused(f"{param} is required", code="missing_required_parameter", param=param)
    problem = "should be an object" if error["type"] == "model_type" else error["msg"].removeprefix("Input ")
    return Refused(f"{param}: {problem}", code="invalid_value", param=param)


def _place(value: Any, error: ErrorDetails) -> Iterator[int | str]:
    """Where in a request it is wrong.

    pydantic also tells which of several kinds it took a value for: no part of the request has such a name.
    """
    for number, part in enumerate(error["loc"], start=1):
        if _has(value, part):
            yield part
            value = value[part]
        elif error["type"] == "missing" and number == len(error["loc"]):
            yield part


def _has(value: Any, part: int | str) -> bool:
    return part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)


def _unknown(model: type[RequestModel], error: ErrorDetails) -> str:
    name = str(error["loc"][-1])
    message = f"unknown parameter {shown(name)}"
    if len(error["loc"]) > 1:
        return message
    near = (
        model.foreign_names.get(name)
        or _FOREIGN_NAMES.get(name)
        or next(iter(difflib.get_close_matches(name[:64], model.model_fields, n=1)), "")
    )
    return f"{message}; did you mean {near!r}?" if near in model.model_fields else message
