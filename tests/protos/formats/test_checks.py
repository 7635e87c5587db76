"""Refusals of config keys: each names the field, what was found in it, and what is supported."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import checks, parse_config
from softprompt_api.formats.kinds import FORMATS
from softprompt_api.formats.patterns import pattern_map

# With these a config of any kind is complete.
SIZES: Mapping[str, Any] = {
    "num_virtual_tokens": 5, "token_dim": 32, "num_layers": 2, "num_attention_heads": 2, "num_tasks": 2,
    "num_ranks": 1, "r": 4, "lora_alpha": 8, "bias": "none",
}  # fmt: skip
FILLED: tuple[Any, ...] = ("what is this?", {"what": "is this?"}, -7, [{"what": "is this?"}])


@pytest.mark.parametrize(
    ("check", "value", "problem"),
    [
        (checks.text, 7, "is 7; supported: text or null"),
        (checks.flag, "yes", "is 'yes'; supported: true, false or null"),
        (checks.number, True, "is true; supported: a number or null"),
        (checks.count, -1, "is -1; supported: a whole number from 0 to 2147483647, or null"),
        (checks.integers, "1,2", "is '1,2'; supported: a list of integers, or null"),
        (checks.integers, [1, 2.5, "x"], "has 2.5; supported: a list of integers, or null"),
        (checks.integers_or_one, {"a": 1}, "is {\"a\": 1}; supported: a list of integers, or null"),
        (checks.names, 3, "is 3; supported: text, a list of texts, or null"),
        (checks.names, ["a", None], "has null; supported: text, a list of texts, or null"),
        (checks.record, [], "is []; supported: an object or null"),
        (checks.factor, 0.0, "is 0.0; supported: a number other than 0, of at most 2147483647"),
        (checks.size, "eight", "is 'eight'; supported: a whole number from 1 to 2147483647"),
        (checks.size, None, "is null or missing; supported: a whole number from 1 to 2147483647"),
        (checks.one_of("none", None), "all", "is 'all'; supported: 'none', null"),
        (checks.one_of(1), True, "is true; supported: 1"),
        (checks.unused("but not served"), [1], "is [1], but not served; supported: null, false or empty"),
        (
            checks.unused("but not served", default="usual"),
            {"a": 1},
            "is {\"a\": 1}, but not served; supported: 'usual', null, false or empty",
        ),
        (pattern_map(checks.size), ["q"], "is [\"q\"]; supported: a map of names of modules, or null"),
    ],
)  # fmt: skip
def test_a_refusal_tells_what_was_found_and_what_is_supported(check: checks.Check, value: Any, problem: str):
    with pytest.raises(AdapterInvalid) as refused:
        check("a_key", value)
    assert refused.value.message == f"'a_key' in adapter_config.json {problem}"
    assert refused.value.field == "config.a_key"


@pytest.mark.parametrize(
    ("value", "shown"), [("a\nb\u202e", r"'a\nb\u202e'"), ("x" * 70, f"'{'x' * 64}\\u2026'"), ([0] * 99, "[0, 0")]
)
def test_what_was_found_is_short_and_printable(value: Any, shown: str):
    found = checks.found(value)
    assert found.startswith(shown)
    assert len(found) < 80
    assert found.isprintable()


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_every_key_of_every_kind_is_refused_with_field_found_and_supported(kind: str):
    format_ = FORMATS[kind]
    whole = {"peft_type": kind, **{key: value for key, value in SIZES.items() if key in format_.keys}}
    parse_config(json.dumps(whole))
    for key in (*format_.keys, "a_future_feature"):
        refusals = [(value, error) for value in FILLED if (error := _refusal({**whole, key: value}))]
        assert refusals, key
        for value, error in refusals:
            assert error.field.startswith(f"config.{key}")
            assert any(told in error.message for told in _told(value)), error.message
            assert "; supported: " in error.message


def _refusal(config: Mapping[str, Any]) -> AdapterInvalid | None:
    try:
        parse_config(json.dumps(config))
    except AdapterInvalid as error:
        return error
    return None


def _told(value: Any) -> list[str]:
    """How a message may tell of a value, or of what is at fault inside it."""
    inside = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return [f"{verb} {checks.found(one)}" for verb in ("is", "has") for one in (value, *inside)]


@pytest.mark.parametrize("kind", [*sorted(FORMATS), "IA3", None, 7])
def test_a_kind_that_nobody_serves_is_told_with_those_that_are(kind: Any):
    if kind in FORMATS:
        kind = f"x{kind}"
    with pytest.raises(AdapterInvalid) as refused:
        parse_config(json.dumps({"peft_type": kind}))
    found = "null or missing" if kind is None else checks.found(kind)
    assert f"is {found}; supported: {', '.join(sorted(FORMATS))}" in refused.value.message


@pytest.mark.parametrize("brackets", [("[", "]"), ('{"a":', "}")])
def test_a_value_nested_as_deeply_as_can_be_is_an_answer_too(brackets: tuple[str, str]):
    fields = set()
    for depth in range(10, 3000):
        nested = brackets[0] * depth + "1" + brackets[1] * depth
        with pytest.raises(AdapterInvalid) as refused:
            parse_config(f'{{"peft_type": "CPT", "task_type": {nested}}}')
        fields.add(refused.value.field)
    assert "config.task_type" in fields
