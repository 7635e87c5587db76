"""How deep JSON from strangers nests: how much of it Python parses depends on its version, and on who calls."""

from collections.abc import Iterable
from typing import Any


def is_nested_deeper(value: Any, most: int) -> bool:
    """Whether parsed JSON has more than `most` objects and lists within each other; at least 1."""
    level = [value]
    for _ in range(most):
        level = [inner for outer in level for inner in _members(outer) if isinstance(inner, (dict, list))]
        if not level:
            return False
    return True


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
