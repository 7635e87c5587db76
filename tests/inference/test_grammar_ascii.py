"""Classes of expressions written out as ASCII's."""

import pytest
from softprompt_inference.grammar.ascii import ascii_classes


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        (r"\d{3}\D", "[0-9]{3}[^0-9]"),
        (r"\w\W", "[0-9A-Za-z_][^0-9A-Za-z_]"),
        (r"[\d-]", "[[:digit:]-]"),
        (r"[^\D\W]", "[^[:^digit:][:^word:]]"),
        (r"[]\d]\d", "[][:digit:]][0-9]"),
        (r"[^]\d]\d", "[^][:digit:]][0-9]"),
        (r"[a[\w]\d]\w", "[a[[:word:]][:digit:]][0-9A-Za-z_]"),
        (r"[[:alpha:]\d]", "[[:alpha:][:digit:]]"),
        (r"\\d\[\d\]", r"\\d\[[0-9]\]"),
        (r"\p{Nd}\s\.", r"\p{Nd}\s\."),
        ("]\\d", "][0-9]"),
        ("\\", "\\"),
    ],
)
def test_classes_are_written_out(expression: str, expected: str) -> None:
    assert ascii_classes(expression) == expected
