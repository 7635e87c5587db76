"""JSON objects from strangers: UTF-8, finite numbers, no key twice, bounded nesting."""

import json
import math
from collections import Counter
from typing import Any, NoReturn

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats.checks import found
from softprompt_api.names import shown
from softprompt_api.nesting import is_nested_deeper

MAX_DEPTH = 64
_TOO_DEEP = f"is nested deeper than {MAX_DEPTH}"


def parse_object(text: str | bytes | bytearray, *, what: str, field: str) -> dict[str, Any]:
    """The JSON object in `text`; AdapterInvalid on anything else, naming `field`.

    Args:
        what: how messages call the text, for example "adapter_config.json".
    """

    def refuse(problem: str) -> NoReturn:
        raise AdapterInvalid(f"{what} {problem}", field=field)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_pairs = dict(pairs)
        if len(unique_pairs) < len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            refuse(f"has the key {shown(twice)} twice")
        return unique_pairs

    def finite(number: str) -> float:
        value = float(number)
        if not math.isfinite(value):
            refuse(f"has the number {shown(number)}, which is not finite")
        return value

    try:
        # json.loads would guess UTF-16 and UTF-32 from bytes.
        decoded = text if isinstance(text, str) else bytes(text).decode("utf-8")
        value = json.loads(
            decoded,
            object_pairs_hook=unique,
            parse_float=finite,
            parse_constant=lambda name: refuse(f"has the number {name}, which is not finite"),
        )
    except UnicodeDecodeError:
        refuse("is not UTF-8")
    except RecursionError:
        refuse(_TOO_DEEP)
    except ValueError as error:  # also an integer with thousands of digits
        where = f" (line {error.lineno}, column {error.colno})" if isinstance(error, json.JSONDecodeError) else ""
        refuse(f"is not JSON{where}")
    if is_nested_deeper(value, MAX_DEPTH):
        refuse(_TOO_DEEP)
    if not isinstance(value, dict):
        refuse(f"is not a JSON object, but {found(value)}")
    return value
