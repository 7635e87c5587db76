"""Chunks written from templates are the chunks that their styles spell, and OpenAI's models read them."""

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import Completion
from openai.types.chat import ChatCompletionChunk
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_gateway.openai.chat import ChatRequest, ChatStyle
from softprompt_gateway.openai.chunks import Chunks
from softprompt_gateway.openai.completions import CompletionRequest, CompletionStyle
from softprompt_gateway.openai.style import Style
from softprompt_gateway.session import Delta

IDENTITY = {"id": "x-1", "created": 1, "model": "m"}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
COMPLETION: dict[str, Any] = {"model": "m", "prompt": "hi", "n": 3}


def styles() -> list[tuple[Style, type[Any]]]:
    return [
        (ChatStyle(ChatRequest.checked(CHAT)), ChatCompletionChunk),
        (CompletionStyle(CompletionRequest.checked(COMPLETION), [""]), Completion),
    ]


def chunks_of(style: Style, *, joins_text: bool = True) -> Chunks:
    head = b"data: " + orjson.dumps({**IDENTITY, "object": style.chunk})[:-1] + b',"choices":['
    return Chunks(style, head=head, tail=b"]}\n\n", joins_text=joins_text)


def events(written: bytes) -> list[dict[str, Any]]:
    assert written.endswith(b"\n\n")
    return [orjson.loads(block.removeprefix(b"data: ")) for block in written.split(b"\n\n")[:-1]]


# A protobuf holds no lone surrogates.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@given(text=TEXTS, index=st.integers(0, 2))
@pytest.mark.parametrize("number", [0, 1])
def test_a_chunk_from_a_template_is_the_styles_own(number: int, text: str, index: int) -> None:
    style, model = styles()[number]
    chunks = chunks_of(style)
    chunks.add(index, Delta(text=text))
    [event] = events(chunks.take())
    assert event == {**IDENTITY, "object": style.chunk, "choices": [style.delta(index, Delta(text=text))]}
    # Their clients take null for the reason of an unfinished completion too, which their model does not say.
    event["choices"][0]["finish_reason"] = "stop"
    [choice] = model.model_validate(event).choices
    assert (choice.delta.content if number == 0 else choice.text) == text


def test_deltas_of_a_choice_that_follow_each_other_are_one_chunk() -> None:
    style, _ = styles()[1]
    chunks = chunks_of(style)
    for index, text in ((0, "a"), (0, "b"), (1, "c"), (0, "d"), (0, ""), (0, "e")):
        chunks.add(index, Delta(text=text))
    assert [(event["choices"][0]["index"], event["choices"][0]["text"]) for event in events(chunks.take())] == [
        (0, "ab"),
        (1, "c"),
        (0, "de"),
    ]


def test_text_comes_before_the_end_of_its_choice() -> None:
    style, _ = styles()[1]
    chunks = chunks_of(style)
    chunks.add(0, Delta(text="a"))
    chunks.add(0, pb.Finished(index=0, reason=pb.FINISH_REASON_LENGTH))
    first, last = (event["choices"][0] for event in events(chunks.take()))
    assert (first["text"], first["finish_reason"]) == ("a", None)
    assert (last["text"], last["finish_reason"]) == ("", "length")


def test_where_tokens_count_each_delta_is_a_chunk() -> None:
    request = CompletionRequest.checked(COMPLETION | {"return_token_ids": True})
    chunks = chunks_of(CompletionStyle(request, [""]), joins_text=False)
    chunks.add(0, Delta(text="a", token_ids=[1]))
    chunks.add(0, Delta(text="", token_ids=[2, 3]))
    assert [event["choices"][0]["token_ids"] for event in events(chunks.take())] == [[1], [2, 3]]


def test_nothing_is_written_twice_and_nothing_from_nothing() -> None:
    style, _ = styles()[0]
    chunks = chunks_of(style)
    assert chunks.take() == b""
    chunks.add(0, Delta(text=""))
    assert chunks.take() == b""
    chunks.add(0, Delta(text="a"))
    assert chunks.take() != b""
    assert chunks.take() == b""
