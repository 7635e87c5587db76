"""Grammars over a real tokenizer: what follows is text of the grammar, and nothing strange costs much."""

import json
import random
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.grammar import GrammarCompiler, GrammarMatcher
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import Tokenizer
from softprompt_inference.text.definition import TokenizerDefinition, read_definition

VOCAB_SIZE = 49152
EOS = 2
# Generous: what is refused takes a fraction of it, even on a busy machine.
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def definition() -> TokenizerDefinition:
    return read_definition(resolve_model(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(Path(resolve_model(DEFAULT_MODEL)))


@pytest.fixture(scope="module")
def compiler(definition: TokenizerDefinition) -> GrammarCompiler:
    return GrammarCompiler(lambda: definition, vocab_size=VOCAB_SIZE)


def wanted(**kind: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**kind)


def allowed_ids(matcher: GrammarMatcher, banned: tuple[int, ...] = ()) -> list[int]:
    mask = matcher.allowed(banned)
    assert not matcher.error
    assert len(mask) == 4 * -(-VOCAB_SIZE // 32)
    return [token_id for token_id in range(VOCAB_SIZE) if mask[token_id >> 3] >> (token_id & 7) & 1]


def follow(matcher: GrammarMatcher, tokenizer: Tokenizer, text: str) -> bool:
    """Whether the text is one of the grammar, token by token, to its end."""
    for token_id in [*tokenizer.encode(text), EOS]:
        if token_id not in allowed_ids(matcher):
            return False
        matcher.accept(token_id)
    return True


def walk(matcher: GrammarMatcher, tokenizer: Tokenizer, seed: int, most: int = 400) -> str:
    """A text that random choices make; short tokens are preferred, so that it ends."""
    generator = random.Random(seed)
    ids: list[int] = []
    while len(ids) < most:
        choices = allowed_ids(matcher)
        assert choices
        token_id = EOS if EOS in choices and generator.random() < 0.5 else generator.choice(choices)
        if token_id == EOS:
            return tokenizer.decode(ids)
        ids.append(token_id)
        matcher.accept(token_id)
    raise AssertionError(f"it does not end: {tokenizer.decode(ids)!r}")


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "kind": {"const": "person"},
    },
    "required": ["name", "age", "tags", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_chosen_is_json_of_the_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, seed: int
) -> None:
    value = json.loads(walk(compiler.compile(wanted(json=SCHEMA)), tokenizer, seed))
    assert list(value) == ["name", "age", "tags", "kind"]
    assert len(value["name"]) <= 8
    assert 0 <= value["age"] <= 120
    assert set(value["tags"]) <= {"a", "b"}
    assert len(value["tags"]) <= 3
    assert value["kind"] == "person"


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ({"regex": r"\d{3}-\d{4}"}, ["555-1234"], ["555-123", "a55-1234", "555-12345", "٣55-1234"]),
        ({"regex": r"[^\W\d]+\p{Nd}\D"}, ["a_٣é"], ["é٣é", "a٣3"]),
        ({"grammar": "start: A\nA: /[\\d\\/]+/"}, ["3/3"], ["٣"]),
        (
            {"choice": ["yes", "yes!", "näin 🦜", 'a "b"\n']},
            ["yes", "yes!", "näin 🦜", 'a "b"\n'],
            ["ye", "no", "yes!!"],
        ),
        ({"grammar": 'start: "a" ("," "a")*'}, ["a", "a,a,a"], ["", "a,", "b"]),
        (
            {"json_object": True},
            ["{}", '{"a": [1, null, "x"]}', '{\n  "a": 1\n}'],
            ["[]", "5", '{"a"}', '{"a":   1}'],
        ),
        ({"json": {"$ref": "#/$defs/t", "$defs": {"t": {"type": "boolean"}}}}, ["true"], ["null"]),
        (
            {"json": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
            ["[]", "[[], [[]]]"],
            ["[1]", "[[],[],[]]"],
        ),
    ],
)
def test_what_is_in_the_grammar_can_come_and_nothing_else(
    compiler: GrammarCompiler, tokenizer: Tokenizer, kind: Any, good: list[str], bad: list[str]
) -> None:
    assert [text for text in good if not follow(compiler.compile(wanted(**kind)), tokenizer, text)] == []
    assert [text for text in bad if follow(compiler.compile(wanted(**kind)), tokenizer, text)] == []


def test_behind_the_end_nothing_but_the_end_may_come(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(wanted(choice=["yes"]))
    for token_id in tokenizer.encode("yes"):
        assert EOS not in allowed_ids(matcher)
        matcher.accept(token_id)
    assert allowed_ids(matcher) == [EOS]
    matcher.accept(EOS)
    matcher.accept(EOS)
    assert not matcher.error


def test_a_ban_holds_where_anything_else_may_come(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher = compiler.compile(wanted(regex="a{1,3}"))
    [a] = tokenizer.encode("a")
    matcher.accept(a)
    assert EOS in allowed_ids(matcher)
    assert EOS not in allowed_ids(matcher, banned=(EOS,))
    matcher.accept(a)
    matcher.accept(a)
    assert allowed_ids(matcher, banned=(EOS,)) == [EOS]


def test_a_token_that_may_not_come_is_an_error_that_stays(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    matcher, other = (compiler.compile(wanted(choice=["yes"])) for _ in range(2))
    matcher.accept(tokenizer.encode("no")[0])
    assert "cannot follow its grammar" in matcher.error
    assert not any(matcher.allowed(()))
    assert allowed_ids(other)


def test_outputs_do_not_share_how_far_they_are(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    first = compiler.compile(wanted(regex="abab"))
    before = allowed_ids(first)
    first.accept(tokenizer.encode("a")[0])
    assert allowed_ids(first) != before
    assert allowed_ids(compiler.compile(wanted(regex="abab"))) == before


def test_long_outputs_of_one_grammar_do_not_use_up_each_others_limits(
    compiler: GrammarCompiler, tokenizer: Tokenizer
) -> None:
    ids = [*tokenizer.encode(json.dumps("many words " * 900)), EOS]
    for _ in range(2):  # each takes more than half of the states that it may have
        matcher = compiler.compile(wanted(json={"type": "string", "maxLength": 10_000}))
        for token_id in ids:
            matcher.allowed(())
            matcher.accept(token_id)
        assert not matcher.error


def test_the_tokenizer_is_read_once_and_by_another_thread(definition: TokenizerDefinition) -> None:
    calls: list[int] = []

    def read() -> TokenizerDefinition:
        calls.append(1)
        return definition

    compiler = GrammarCompiler(read, vocab_size=VOCAB_SIZE)
    assert not calls
    futures: list[Future[Any]] = [compiler.start(wanted(choice=[str(number)])) for number in range(4)]
    assert all(future.result(PATIENCE_S).error == "" for future in futures)
    assert len(calls) == 1
    compiler.close()


HOSTILE: dict[str, dict[str, Any]] = {
    "broken regex": {"regex": "(["},
    "lookahead": {"regex": "(?=a)b"},
    "back reference": {"regex": r"(a)\1"},
    "huge repetition": {"regex": "(((a{1000}){1000}){1000}){1000}"},
    "many states": {"regex": "(a|b|ab)*" + "(x|xy|y)?" * 20_000},
    "repetitions of terminals": {"grammar": "start: A\nA: B{100}\nB: C{100}\nC: /a{100}/"},
    "a pattern inside a grammar": {"grammar": 'start: %json {"type": "string", "pattern": "(a{1000}){1000}"}'},
    "a pattern for keys": {"json": {"type": "object", "patternProperties": {"(a{1000}){1000}": True}}},
    "no lark": {"grammar": "this is no grammar"},
    "lark without a start": {"grammar": "x: /a/"},
    "a rule that never ends": {"grammar": "start: start"},
    "a missing rule": {"grammar": "start: nothing"},
    "an unknown type": {"json": {"type": "robot"}},
    "a list as schema": {"json": "[1]"},
    "no JSON": {"json": "{"},
    "a reference to itself": {"json": {"$ref": "#"}},
    "a circle of references": {
        "json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    },
    "all of itself": {"json": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}},
    "a reference into the network": {"json": {"$ref": "http://127.0.0.1:1/schema.json"}},
    "a reference to a file": {"json": {"$ref": "file:///etc/passwd"}},
    "a reference to nothing": {"json": {"$ref": "#/$defs/nothing"}},
    "nothing": {"json": {"not": {}}},
    "an empty enum": {"json": {"enum": []}},
    "a bad pattern": {"json": {"type": "string", "pattern": "("}},
    "a pattern with lookahead": {"json": {"type": "string", "pattern": "^(?!a)b$"}},
    "an exploding pattern": {"json": {"type": "string", "pattern": "((((a{1,500}){1,500}){1,500}){1,500})*"}},
    "opposite bounds": {"json": {"type": "integer", "minimum": 5, "maximum": 4}},
    "too many values": {"json": '{"enum": [' + "1," * 30_000 + "1]}"},
    "too deep": {"json": '{"items":' * 400 + "{}" + "}" * 400},
    "options of the library": {"json": {"type": "object", "x-guidance": {"lenient": True}}},
    "a number of more than 64 bits": {"json": {"type": "integer", "maximum": 2**64}},
    "a negative number of more than 64 bits": {"json": {"type": "integer", "minimum": -(2**63) - 1}},
    "a length of 20 digits, as a text": {"json": '{"type": "string", "minLength": 18446744073709551616}'},
    "an escaped lone surrogate": {"json": r'{"enum": ["\ud800"]}'},
    "an escaped lone surrogate in a key": {"json": r'{"properties": {"\ud800": {}}}'},
    "an escaped lone surrogate inside a grammar": {"grammar": r'start: %json {"enum": ["\ud800"]}'},
    "an unknown format": {"json": {"type": "string", "format": "palindrome"}},
}


@pytest.mark.parametrize(
    "kind",
    [
        {"json": {"enum": ["\ud800"]}},
        {"json": '{"enum": ["\ud800"]}'},
        {"regex": "\ud800"},
        {"choice": ["yes", "\ud800"]},
        {"grammar": 'start: "\ud800"'},
    ],
    ids=ascii,
)
def test_a_lone_surrogate_is_in_no_grammar(kind: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="holds a lone surrogate, which is no character") as caught:
        wanted(**kind)
    assert caught.value.field == "structured_outputs"


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_followed_is_refused_soon(compiler: GrammarCompiler, name: str) -> None:
    began = time.monotonic()
    for _ in range(2):  # also when it is known
        with pytest.raises(InvalidArgument) as caught:
            compiler.compile(wanted(**HOSTILE[name]))
        assert caught.value.field == "structured_outputs"
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 400
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize(
    "kind",
    [
        {"regex": "(a|b)*a(a|b){12}"},
        {"regex": "(a?){200}a{200}"},
        {"regex": "a{5000}"},
        {"json": {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}},
        {"choice": [f"choice number {number}" for number in range(1024)]},
        {"json": {"enum": [f"value {number}" for number in range(2000)]}},
        {"json": {"anyOf": [{"const": f"value {number}"} for number in range(500)]}},
        {"json": {"type": "string", "minLength": 2000, "maxLength": 3000}},
        {
            "json": {
                "type": "object",
                "properties": {f"p{number}": {"type": "integer"} for number in range(300)},
                "additionalProperties": False,
            }
        },
    ],
    ids=lambda kind: str(kind)[:40],
)
def test_what_is_large_is_refused_or_followed_soon(compiler: GrammarCompiler, kind: Any) -> None:
    began = time.monotonic()
    try:
        matcher = compiler.compile(wanted(**kind))
    except InvalidArgument:
        pass
    else:
        generator = random.Random(0)
        for _ in range(20):
            mask = matcher.allowed(())
            choices = [i for i in range(VOCAB_SIZE) if mask[i >> 3] >> (i & 7) & 1]
            if not choices:
                assert matcher.error
                break
            matcher.accept(generator.choice(choices))
    assert time.monotonic() - began < PATIENCE_S


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_ids": []}, "no end-of-sequence token"),
        ({"serialized": "{}"}, "no grammars can be made for this model's tokenizer"),
    ],
)
def test_a_model_without_what_grammars_need_is_refused(
    definition: TokenizerDefinition, changes: dict[str, Any], message: str
) -> None:
    fields = {name: getattr(definition, name) for name in TokenizerDefinition.__dataclass_fields__}
    make: Callable[[], TokenizerDefinition] = lambda: TokenizerDefinition(**{**fields, **changes})  # noqa: E731
    with pytest.raises(Unsupported, match=message):
        GrammarCompiler(make, vocab_size=VOCAB_SIZE).compile(wanted(regex="a"))


def test_a_vocabulary_larger_than_the_tokenizers_is_masked_whole(definition: TokenizerDefinition) -> None:
    matcher = GrammarCompiler(lambda: definition, vocab_size=VOCAB_SIZE + 70).compile(wanted(regex=".*"))
    mask = matcher.allowed(())
    assert len(mask) == 4 * -(-(VOCAB_SIZE + 70) // 32)
    assert not any(mask[VOCAB_SIZE // 8 :])
