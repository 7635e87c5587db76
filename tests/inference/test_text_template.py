"""A chat template reads what a request sets, and nothing that the request or the model says elsewhere."""

import json
from typing import Any

import pytest
from softprompt_api.errors import InvalidArgument
from softprompt_inference.text import ChatMessage, Tokenizer
from softprompt_inference.text.template import MAX_VALUES_CHARACTERS, ChatTemplate
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import PreTrainedTokenizerFast

THINKING = ChatTemplate(
    "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{% if effort == 'high' %}!{% endif %}{{ note }}",
    {"bos_token": "<s>"},
)
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("values", "rendered"),
    [
        ({}, "<s>Hi"),
        ({"enable_thinking": True}, "<s>Hi"),
        ({"enable_thinking": False}, "<s>Hi<think></think>"),
        ({"effort": "high", "note": 7}, "<s>Hi!7"),
        ({"unheard_of": False, "note": None}, "<s>HiNone"),
    ],
)
def test_values_are_read_as_transformers_reads_them(values: dict[str, Any], rendered: str) -> None:
    parsed = THINKING.parse_values(json.dumps(values))
    assert THINKING.render(MESSAGES, add_generation_prompt=False, values=parsed) == rendered
    theirs = PreTrainedTokenizerFast(tokenizer_object=_backend(), bos_token="<s>", chat_template=THINKING._source)
    assert theirs.apply_chat_template(MESSAGES, tokenize=False, **values) == rendered


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[1]", "must be a JSON object"),
        ("{", "must be a JSON object"),
        ('{"a": ' * 200 + "1" + "}" * 200, "nested deeper"),
        ('{"note": "' + "x" * MAX_VALUES_CHARACTERS + '"}', "at most 16384"),
        ('{"note": "\\ud800"}', "lone surrogate"),
        ('{"enable_thinkng": true}', "sets 'enable_thinkng', which the model's chat template does not read"),
        ('{"messages": []}', "cannot set 'messages'"),
        ('{"continue_final_message": true}', "cannot set 'continue_final_message'"),
        ('{"bos_token": "x"}', "cannot set 'bos_token'"),
    ],
)
def test_what_a_template_would_not_read_is_refused(text: str, told: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        THINKING.parse_values(text)
    assert told in caught.value.message
    assert caught.value.field == "chat_template_kwargs"


def test_a_value_cannot_forge_control_tokens() -> None:
    backend = _backend()
    tokenizer = Tokenizer(backend, ChatTemplate("<s>{{ note }}{{ notes.x[0] }}"), [0])
    messages = [ChatMessage(role="user", content="x")]
    [ids] = tokenizer.encode_chat(messages, chat_template_kwargs='{"note": "<s>x<", "notes": {"x": ["s>"]}}')
    assert ids == [backend.token_to_id(piece) for piece in ("<s>", "<", "s", ">", "x", "<", "s", ">")]


def test_a_name_that_lies_within_a_special_tokens_spelling_is_a_name() -> None:
    backend = _backend()
    tokenizer = Tokenizer(backend, ChatTemplate("{{ s }}"), [0])
    [ids] = tokenizer.encode_chat([ChatMessage(role="user", content="x")], chat_template_kwargs='{"s": "x"}')
    assert ids == [backend.token_to_id("x")]


def _backend() -> Backend:
    pieces = ["<s>", "[UNK]", "x", "<", "s", ">"]
    backend = Backend(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.add_special_tokens(["<s>"])
    return backend
