"""Expressions are measured with their repetitions written out."""

import contextlib
import time
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_inference.grammar.limits import MAX_LENGTH, check_lark, check_patterns, check_regex, regex_length


@pytest.mark.parametrize(
    ("regex", "length"),
    [
        ("", 0),
        ("abc", 3),
        ("a*b+c?", 6),
        ("a{5}", 5),
        ("a{2,5}", 5),
        ("a{5,}", 5),
        ("ab{3}", 4),
        ("(ab){3}", 6),
        ("(a{10}b){10}", 110),
        ("((a{10}){10}){10}", 1000),
        ("a{10}{10}", 100),
        ("[a-z]{4}", 4),
        ("[]{}]{4}", 4),
        (r"[\]{9}]{4}", 4),
        (r"\(a{3}", 4),
        (r"\d{3}-\d{4}", 8),
        ("a|b{4}", 5),
        ("a{x}", 4),
        ("a{}", 3),
        ("((", 0),
        ("))", 0),
        ("a{0}", 1),
        ("(a{2}", 2),
    ],
)
def test_a_regular_expression_has_a_length(regex: str, length: int) -> None:
    assert regex_length(regex) == length


REGEXES_TOO_LONG = [
    "(a{1000}){1000}",
    "a{999999999}",
    "((((a{100}){100}){100}){100}){100}",
    "(" * 600 + "a" + "{999999999})" * 600,  # a number that nobody would write
]


@pytest.mark.parametrize("regex", REGEXES_TOO_LONG)
def test_one_that_is_too_long_is_refused_with_numbers(regex: str) -> None:
    with pytest.raises(InvalidArgument, match=f"at most {MAX_LENGTH}") as caught:
        check_regex(regex)
    assert caught.value.field == "structured_outputs"


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "(a{1000}){1000}"},
        {"items": [{"anyOf": [{"pattern": "a{30000}"}]}]},
        {"patternProperties": {"a{30000}": True}},
    ],
)
def test_patterns_are_found_wherever_they_stand(schema: Any) -> None:
    with pytest.raises(InvalidArgument):
        check_patterns(schema)


def test_what_only_looks_like_a_pattern_is_none() -> None:
    check_patterns({"properties": {"pattern": {"const": "a{30000}"}}, "enum": ["a{30000}"], "pattern": 5})


@pytest.mark.parametrize(
    "lark",
    [
        "start: /(a{1000}){1000}/",
        "start: A\nA: /a{200}/ ~ 200",
        "start: A\nA: B{200}\nB: /x{200}/",
        "start: A\nA: (B C){200}\nB: C{50} | D\nC: /x/\nD: /y/ ~ 1 .. 100",
        'start: A\nA: "x"\n | ("yy" B){1000}\nB: "a" ~ 50',
        'start: %json {"pattern": "a{30000}"}',
        'start: %json\n{"items": {"pattern": "(a{1000}){1000}"}} "x"',
        "start: A0\n" + "\n".join(f"A{n}: A{n + 1}" for n in range(5000)),
        "start: A0\n" + "\n".join(f"A{n}: A{n + 1} A{n + 1}" for n in range(40)) + "\nA40: /a/",
    ],
)
def test_grammars_with_long_terminals_are_refused(lark: str) -> None:
    with pytest.raises(InvalidArgument):
        check_lark(lark)


@pytest.mark.parametrize("text", ['\\"' * 60_000, "/\\" * 60_000, "[" * 120_000, "(" * 120_000, "{1,2}" * 25_000])
def test_a_text_of_the_largest_size_is_measured_soon(text: str) -> None:
    began = time.thread_time()
    for check in (check_regex, check_lark):
        with contextlib.suppress(InvalidArgument):
            check(text)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize(
    "lark",
    [
        'start: "a" ("," "a"){1,5}',
        'start: WORD (" " WORD){1,4} "."\nWORD: /[a-z]{1,6}/',
        'start: "a{30000}" // a{30000}\n# (a{1000}){1000}\n',
        "start: A\nA: A",
        'start: %json {"enum": ["a{30000}"]}',
        "start: %json {",
        "nothing of sense ((( ~ {",
    ],
)
def test_other_grammars_are_left_to_the_compiler(lark: str) -> None:
    check_lark(lark)
