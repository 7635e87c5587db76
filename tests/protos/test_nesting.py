from typing import Any

import pytest
from softprompt_api.nesting import is_nested_deeper


@pytest.mark.parametrize(
    ("value", "depth"),
    [
        (1, 0),
        ("[[]]", 0),
        ([], 1),
        ({"a": None}, 1),
        ([1, [2], {"a": []}], 3),
        ({"a": {"b": {}}, "c": []}, 3),
    ],
    ids=str,
)
def test_objects_and_lists_within_each_other_are_counted(value: Any, depth: int) -> None:
    assert not is_nested_deeper(value, max(depth, 1))
    assert depth < 2 or is_nested_deeper(value, depth - 1)


def test_more_than_python_itself_would_follow() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    assert is_nested_deeper(deep, 1_000)
