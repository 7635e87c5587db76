"""Checks for the values of config keys. Each takes the key and its value, and raises AdapterInvalid.

Every refusal names the field, what was found in it and what is supported.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from softprompt_api.errors import AdapterInvalid
from softprompt_api.names import shown

Check = Callable[[str, Any], None]
MAX_INTEGER = 2**31 - 1
OFF = "null, false or empty"


def refuse(key: str, problem: str) -> NoReturn:
    """Raise AdapterInvalid for a config key."""
    raise AdapterInvalid(f"{shown(key)} in adapter_config.json {problem}", field=f"config.{printable(key)}")


def unsupported(key: str, value: Any, supported: str, *, verb: str = "is", because: str = "") -> NoReturn:
    """Raise AdapterInvalid for what a config key is, or has in it."""
    what = "null or missing" if value is None and verb == "is" else found(value)
    refuse(key, f"{verb} {what}{because and f', {because}'}; supported: {supported}")


def found(value: Any) -> str:
    """A value of a config for a message: as JSON, but text as `shown` has it; short and harmless in a log line."""
    return shown(value) if isinstance(value, str) else printable(json.dumps(value))


def printable(key: str) -> str:
    """A key as part of a field name: short, and harmless in a log line."""
    return shown(key)[1:-1]


def text(key: str, value: Any) -> None:
    """A string or null; kept as it is and never acted on."""
    if value is not None and not isinstance(value, str):
        unsupported(key, value, "text or null")


def flag(key: str, value: Any) -> None:
    """True, false or null."""
    if value is not None and not isinstance(value, bool):
        unsupported(key, value, "true, false or null")


def number(key: str, value: Any) -> None:
    """A finite number or null."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        unsupported(key, value, "a number or null")


def is_integer(value: Any) -> bool:
    """Whether it is an integer; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def count(key: str, value: Any) -> None:
    """A whole number from 0, or null."""
    if value is not None and not (is_integer(value) and 0 <= value <= MAX_INTEGER):
        unsupported(key, value, f"a whole number from 0 to {MAX_INTEGER}, or null")


def integers(key: str, value: Any) -> None:
    """A list of integers, or null."""
    if value is None:
        return
    supported = "a list of integers, or null"
    if not isinstance(value, list):
        unsupported(key, value, supported)
    for item in value:
        if not is_integer(item):
            unsupported(key, item, supported, verb="has")


def integers_or_one(key: str, value: Any) -> None:
    """An integer, a list of integers, or null."""
    if not is_integer(value):
        integers(key, value)


def names(key: str, value: Any) -> None:
    """Text, a list of texts, or null; kept as it is and never acted on."""
    supported = "text, a list of texts, or null"
    if value is None or isinstance(value, str):
        return
    if not isinstance(value, list):
        unsupported(key, value, supported)
    for item in value:
        if not isinstance(item, str):
            unsupported(key, item, supported, verb="has")


def record(key: str, value: Any) -> None:
    """An object or null; never acted on."""
    if value is not None and not isinstance(value, dict):
        unsupported(key, value, "an object or null")


def factor(key: str, value: Any) -> None:
    """A required number other than 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < abs(value) <= MAX_INTEGER:
        unsupported(key, value, f"a number other than 0, of at most {MAX_INTEGER}")


def size(key: str, value: Any) -> None:
    """A required whole number from 1."""
    if not is_integer(value) or not 1 <= value <= MAX_INTEGER:
        unsupported(key, value, f"a whole number from 1 to {MAX_INTEGER}")


def require(config: Mapping[str, Any], *sizes: str) -> None:
    """Refuse a config that lacks one of these sizes."""
    for key in sizes:
        size(key, config.get(key))


def one_of(*allowed: str | int | None) -> Check:
    """Exactly one of these values."""

    def check(key: str, value: Any) -> None:
        # A bool equals 1 in Python; the type must agree as well.
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            unsupported(key, value, ", ".join(found(choice) for choice in allowed))

    return check


def unused(because: str, default: str | None = None) -> Check:
    """A feature that must be off: null, false, empty, or what PEFT writes when it is not used."""
    supported = OFF if default is None else f"{default!r}, {OFF}"

    def check(key: str, value: Any) -> None:
        if not is_off(value) and not (default is not None and value == default):
            unsupported(key, value, supported, because=because)

    return check


def is_off(value: Any) -> bool:
    """Whether this is how PEFT writes an unused feature: null, false or empty."""
    return value is None or value is False or value in ("", [], {})
