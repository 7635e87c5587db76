"""Text to ids and ids to text: tokenizer, chat template, incremental detokenizer, stop strings."""

from softprompt_inference.text.chat import ChatMessage
from softprompt_inference.text.detokenizer import OutputText
from softprompt_inference.text.soft_prompts import Encoded, SoftPrompt
from softprompt_inference.text.tokenizer import Tokenizer
from softprompt_inference.text.tools import ToolCall

__all__ = ["ChatMessage", "Encoded", "OutputText", "SoftPrompt", "Tokenizer", "ToolCall"]
