"""Grammars that outputs must follow: compiled for the model's tokenizer, and followed token by token."""

from softprompt_inference.grammar.compiler import GrammarCompiler
from softprompt_inference.grammar.matcher import GrammarMatcher

__all__ = ["GrammarCompiler", "GrammarMatcher"]
