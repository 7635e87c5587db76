"""Soft prompts keep their places in a conversation, whatever its template does, and no text can stand for one."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import ChatMessage, Encoded, SoftPrompt, Tokenizer, ToolCall
from softprompt_inference.text.soft_prompts import Marks
from softprompt_inference.text.template import ChatTemplate
from tokenizers import Tokenizer as Backend
from tokenizers import models
from transformers import AutoTokenizer

A, B = SoftPrompt(adapter="a"), SoftPrompt(adapter="b@2:0")
# Characters of marks, of special tokens and of templates, and spellings of all three.
# The tokenizer has no tokens for some bytes: those of control characters, and of characters above U+FFFF.
CHARACTERS = st.characters(codec="utf-8", max_codepoint=0xFFFF, exclude_categories=["Cc"])
HOSTILE = st.text(st.sampled_from("\ue000\ue001s0b<|>{}%_ \n") | CHARACTERS, max_size=12)
CONTENT = st.lists(HOSTILE | st.sampled_from([A, B, "<|im_end|>", "<|im_", "start|>"]), max_size=6)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def original(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def user(*parts: str | SoftPrompt) -> ChatMessage:
    return ChatMessage(role="user", content=parts)


def as_text(tokenizer: Tokenizer, encoded: Encoded) -> list[str | SoftPrompt]:
    return [part if isinstance(part, SoftPrompt) else tokenizer.decode(part) for part in encoded]


def test_texts_around_a_soft_prompt_are_encoded_each_on_its_own(original: Any, tokenizer: Tokenizer) -> None:
    encoded = tokenizer.encode_chat([user("Translate ", A, " to French.", B, "Now.")])
    rendered = original.apply_chat_template(
        [{"role": "user", "content": "Translate | to French.|Now."}], tokenize=False, add_generation_prompt=True
    )
    before, between, after = rendered.split("user\n")[0] + "user\nTranslate ", " to French.", None
    after = "Now." + rendered.split("Now.")[1]
    ids = [original(text, add_special_tokens=False).input_ids for text in (before, between, after)]
    assert encoded == [ids[0], A, ids[1], B, ids[2]]


def test_a_soft_prompt_may_be_first_last_alone_or_beside_another(tokenizer: Tokenizer) -> None:
    for parts in ((A, "x"), ("x", A), (A,), (A, B), (A, A, "x", A)):
        encoded = tokenizer.encode_chat([user(*parts)])
        [found] = re.findall("<user>(.*)</user>", _flat(tokenizer, encoded))
        assert found == "".join(part if isinstance(part, str) else "◆" for part in parts)


def _flat(tokenizer: Tokenizer, encoded: Encoded) -> str:
    """The conversation with ◆ for soft prompts and <user> around the user's turn."""
    text = "".join(part if isinstance(part, str) else "◆" for part in as_text(tokenizer, encoded))
    return text.replace("<|im_start|>user\n", "<user>").replace("<|im_end|>\n<|im_start|>assistant", "</user>")


@given(content=CONTENT)
def test_no_text_is_taken_for_a_soft_prompt_and_none_is_lost(tokenizer: Tokenizer, content: list[Any]) -> None:
    encoded = tokenizer.encode_chat([user("[", *content, "]")])
    soft_prompts = [part for part in content if isinstance(part, SoftPrompt)]
    assert [part for part in encoded if isinstance(part, SoftPrompt)] == soft_prompts
    texts = ["["]
    for part in content:
        if isinstance(part, SoftPrompt):
            texts.append("")
        else:
            texts[-1] += part
    texts[-1] += "]"
    found = [part for part in as_text(tokenizer, encoded) if isinstance(part, str)]
    assert found[0].endswith(texts[0] if soft_prompts else "")
    assert found[1:-1] == [text for text in texts[1:-1] if text]
    assert texts[-1] in found[-1]
    # The template's own control tokens and no others: a system turn, the user's, and the assistant's, opened.
    ids = [token_id for part in encoded if isinstance(part, list) for token_id in part]
    assert (ids.count(1), ids.count(2)) == (3, 2)


@given(mark=st.integers(0, 10))
def test_a_mark_of_another_conversation_is_text(tokenizer: Tokenizer, mark: int) -> None:
    foreign = Marks()
    spelled = [foreign.mark(A) for _ in range(mark + 1)][-1]
    encoded = tokenizer.encode_chat([user(spelled, B)])
    assert [part for part in encoded if isinstance(part, SoftPrompt)] == [B]
    assert spelled in as_text(tokenizer, encoded)[0]


def test_a_message_of_text_parts_is_that_of_the_whole_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_chat([user("Hel", "lo")]) == tokenizer.encode_chat([user("Hello")])


def with_template(template: str) -> Tokenizer:
    pieces = ["[UNK]", "x", "y", " ", "<s>", "s", "<", ">"]
    backend = Backend(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    backend.add_special_tokens(["<s>"])
    return Tokenizer(backend, ChatTemplate(template), [4])


@pytest.mark.parametrize(
    ("parts", "encoded"),
    [
        ((" x ", A, " y "), [[1, 3], A, [3, 2]]),
        ((" ", A, " "), [A]),
        ((A, " x"), [A, [3, 1]]),
    ],
)
def test_where_a_template_trims_a_soft_prompt_is_no_white_space(parts: Any, encoded: Encoded) -> None:
    tokenizer = with_template("{% for m in messages %}{{ m.content | trim }}{% endfor %}")
    assert tokenizer.encode_chat([user(*parts)]) == encoded


def test_a_template_may_move_messages() -> None:
    tokenizer = with_template("{{ messages[1].content }}<s>{{ messages[0].content }}")
    assert tokenizer.encode_chat([user("x", A), user(B, "y")]) == [B, [2, 4, 1], A]


@pytest.mark.parametrize(
    "template",
    [
        "x{{ messages[1].content }}",
        "{{ messages[0].content }}{{ messages[0].content }}{{ messages[1].content }}",
        "{{ messages[0].content[:9] }}{{ messages[1].content }}",
        "{{ messages[0].content | upper }}{{ messages[1].content }}",
    ],
)
def test_a_template_that_loses_doubles_or_breaks_a_soft_prompt_is_refused(template: str) -> None:
    tokenizer = with_template(template)
    with pytest.raises(InvalidArgument, match="leaves out a soft prompt") as refused:
        tokenizer.encode_chat([user(A), user("x")])
    assert refused.value.field == "messages"
    assert "\ue000" not in refused.value.message


@pytest.mark.parametrize("parts", [("x", A), ("<s>",), ("x<",)])
def test_a_template_that_repeats_a_message_when_it_refuses_shows_no_marks(parts: Any) -> None:
    tokenizer = with_template("{{ raise_exception('cannot take ' + messages[0].content) }}")
    with pytest.raises(InvalidArgument) as refused:
        tokenizer.encode_chat([user(*parts)])
    assert refused.value.message == "the model's chat template refuses the messages"


@pytest.mark.parametrize("parts", [("<", A, "s>"), ("<s", A, ">"), (A, "<s>"), ("<", "s", A, ">")])
def test_a_special_token_cannot_be_pieced_together_around_a_soft_prompt(parts: Any) -> None:
    tokenizer = with_template("{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    encoded = tokenizer.encode_chat([user(*parts)])
    assert sum(part.count(4) for part in encoded if isinstance(part, list)) == 1


def test_text_at_a_templates_edge_and_a_soft_prompt_do_not_make_a_special_token() -> None:
    tokenizer = with_template("{% for m in messages %}<{{ m.content }}{% endfor %}")
    assert 4 not in tokenizer.encode_chat([user("s>", A)])[0]


def test_soft_prompts_keep_their_places_where_functions_are_told_in_words(tokenizer: Tokenizer) -> None:
    call = ToolCall(id="1", name="f", arguments="{}")
    encoded = tokenizer.encode_chat(
        [
            ChatMessage(role="system", content=("Be ", A, " brief.")),
            user("Hi"),
            ChatMessage(role="assistant", content=(B,), tool_calls=[call]),
            ChatMessage(role="tool", content=("sunny", A), tool_call_id="1"),
        ],
        tools=['{"type": "function", "function": {"name": "f"}}'],
    )
    texts = as_text(tokenizer, encoded)
    assert texts[1::2] == [A, B, A]
    before, told, called, end = map(str, texts[::2])
    assert before.endswith("<|im_start|>system\nBe ")
    assert told.startswith(" brief.\n\n# Tools\n")
    assert told.endswith("<|im_start|>assistant\n")
    assert called.startswith("\n<tool_call>\n")
    assert called.endswith("<tool_response>\nsunny")
    assert end.startswith("\n</tool_response><|im_end|>\n")


def test_more_soft_prompts_than_the_context_has_positions_are_refused_unencoded(tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextLengthExceeded, match=r"4 characters and 50 soft prompts, .* at least 51 tokens"):
        tokenizer.encode_chat([user("text", *[A] * 50)], max_tokens=50)


def test_a_final_message_that_is_continued_may_hold_a_soft_prompt(tokenizer: Tokenizer) -> None:
    messages = [user("Hi"), ChatMessage(role="assistant", content=("one, ", A, " two"))]
    encoded = tokenizer.encode_chat(messages, add_generation_prompt=False, continue_final_message=True)
    texts = as_text(tokenizer, encoded)
    assert texts[1:] == [A, " two"]
    assert str(texts[0]).endswith("assistant\none, ")
