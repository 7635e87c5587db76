"""Grammars to matchers, off everybody's loop: in threads, and within limits.

llguidance is imported when the first grammar comes: where only kernels are tested or measured, it may be absent.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_api.structured import FIELD, JSON_WHITESPACE, StructuredOutputsParams, parse_schema

from softprompt_inference.cores import run_anywhere
from softprompt_inference.engine.plan import Matcher
from softprompt_inference.grammar.ascii import ascii_classes
from softprompt_inference.grammar.limits import check_lark, check_patterns, check_regex, map_expressions
from softprompt_inference.grammar.matcher import GrammarMatcher, explain, one_line
from softprompt_inference.text.definition import TokenizerDefinition

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

# llguidance releases the interpreter while it works; more threads would only take processors from the model.
_THREADS = 2
_MAX_KEPT = 64


class GrammarCompiler:
    """Makes matchers for one model.

    Args:
        read_tokenizer: gives the tokenizer; called when it is first needed, by a thread of this class.
        vocab_size: how many logits the model gives.
    """

    def __init__(self, read_tokenizer: Callable[[], TokenizerDefinition], *, vocab_size: int) -> None:
        self._read_tokenizer = read_tokenizer
        self._vocab_size = vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, str], str] = OrderedDict()  # those that can be followed
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammar", initializer=run_anywhere)

    def start(self, wanted: StructuredOutputsParams) -> Future[Matcher]:
        """Begin to compile; see `compile`."""
        return self._executor.submit(self.compile, wanted)

    def close(self) -> None:
        """Take no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def compile(self, wanted: StructuredOutputsParams) -> GrammarMatcher:
        """A matcher at its beginning, of which the next token is known to exist.

        Raises:
            InvalidArgument: the grammar is none, allows nothing, or is too large.
            Unsupported: the model has no tokenizer that grammars can be made for.
        """
        # Each is made anew: copies of a matcher have the states of its lexer in common, and what some outputs add
        # to them counts against the limits of all.
        grammar = self._find(wanted.spelled)
        if grammar is not None:
            matcher = self._make(grammar)
        else:
            grammar, matcher = self.check(*wanted.spelled)
            self._keep(wanted.spelled, grammar)
        return GrammarMatcher(matcher, vocab_size=self._vocab_size)

    def check(self, kind: str, text: str) -> "tuple[str, LLMatcher]":
        """A grammar as llguidance spells it, and a matcher at its beginning; see `compile`."""
        grammar = to_grammar(kind, text)
        matcher = self._make(grammar)
        # Only the first mask shows whether anything can come at all, and whether a step can be afforded.
        first = matcher.deep_copy()
        mask = b"" if first.is_error() else first.compute_bitmask()
        if first.is_error() or not any(mask):
            reason = explain(first) if first.is_error() else "no text follows it"
            raise InvalidArgument(f"{kind} cannot be followed: {reason}", field=FIELD)
        return grammar, matcher

    def prepare(self) -> None:
        """Read the tokenizer now."""
        self._find_tokenizer()

    def _find(self, key: tuple[str, str]) -> str | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def _keep(self, key: tuple[str, str], grammar: str) -> None:
        with self._lock:
            self._kept[key] = grammar
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)

    def _make(self, grammar: str) -> "LLMatcher":
        from llguidance import LLMatcher

        return LLMatcher(self._find_tokenizer(), grammar, log_level=0, limits=_limits())

    def _find_tokenizer(self) -> "LLTokenizer":
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._make_tokenizer()
            return self._tokenizer

    def _make_tokenizer(self) -> "LLTokenizer":
        from llguidance import LLTokenizer

        definition = self._read_tokenizer()
        # Files may name some that the model has no logits for.
        eos_token_ids = [token_id for token_id in definition.eos_token_ids if token_id < self._vocab_size]
        if not eos_token_ids:
            raise Unsupported("the model names no end-of-sequence token, so no grammar can end", field=FIELD)
        try:
            return LLTokenizer(definition.serialized, n_vocab=self._vocab_size, eos_token=eos_token_ids)
        except ValueError as error:
            raise Unsupported(
                f"no grammars can be made for this model's tokenizer: {one_line(str(error))}", field=FIELD
            ) from error


def _limits() -> "LLParserLimits":
    """Some milliseconds for a step, and some MB: a grammar is a stranger's, and others wait for its steps.

    A text of a bounded length takes some seven states for each of its characters.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=200_000,
        step_lexer_fuel=20_000,
        step_max_items=20_000,
        max_items_in_row=2_000,
        max_lexer_states=100_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def to_grammar(kind: str, text: str) -> str:
    """What is wanted as llguidance spells it; InvalidArgument for a schema that is none."""
    from llguidance import LLMatcher

    match kind:
        case "regex":
            check_regex(text)
            return LLMatcher.grammar_from_regex(ascii_classes(text))
        case "grammar":
            check_lark(text)
            return LLMatcher.grammar_from_lark(map_expressions(text, ascii_classes))
        case "choice":
            choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(text))
            return LLMatcher.grammar_from_lark(f"start: {choices}")
        case _:
            return _json_grammar(text)


def _json_grammar(text: str) -> str:
    from llguidance import LLMatcher

    schema = parse_schema(text)
    if "x-guidance" in schema:
        raise InvalidArgument("x-guidance in a schema is not supported", field=FIELD)
    check_patterns(schema)
    try:
        return LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": JSON_WHITESPACE})
    except ValueError as error:
        raise InvalidArgument(
            f"json holds what cannot be followed, such as an integer of more than 64 bits: {one_line(str(error))}",
            field=FIELD,
        ) from error
