"""Where the tokens of a prompt stand in its text, and numbers that JSON has."""

import pytest
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_gateway.openai.logprobs import (
    EchoedText,
    OutputPlaces,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)


def placed(text: str, *tokens: bytes) -> list[int]:
    echoed = EchoedText(text)
    return [echoed.place(token) for token in tokens]


def test_tokens_stand_one_behind_the_other() -> None:
    assert placed("one two", b"one", b" two") == [0, 3]


def test_a_special_token_that_the_text_lacks_takes_no_room() -> None:
    assert placed("one", b"<s>", b"one") == [0, 0]
    assert placed("<s>one", b"<s>", b"one") == [0, 3]


def test_the_space_that_a_tokenizer_puts_before_the_first_word_is_not_in_the_text() -> None:
    assert placed("one two", b" one", b" two") == [0, 3]


def test_parts_of_a_character_stand_where_it_does() -> None:
    assert placed("a€b", b"a", b"\xe2", b"\x82\xac", b"b") == [0, 1, 1, 2]


def test_tokens_behind_part_of_a_character_stand_where_the_text_has_them() -> None:
    # A prompt of ids that begins within a character: its text has a replacement character there.
    tokens = (b"\x98\x80", "日".encode(), b" the", b"\xe2", b" city")
    assert placed(b"".join(tokens).decode(errors="replace"), *tokens) == [0, 2, 3, 7, 7]


def test_all_pieces_of_the_text_are_the_text() -> None:
    echoed = EchoedText("one two!")
    pieces = []
    for token in (b"<s>", b"one", b" two"):
        echoed.place(token)
        pieces.append(echoed.show(is_last=False))
    echoed.place(b"?")
    assert [*pieces, echoed.show(is_last=True)] == ["", "one", " two", "!"]


def token(logprob: float) -> pb.TokenLogprob:
    return pb.TokenLogprob(chosen=pb.LogprobEntry(token_id=7, token="x", logprob=logprob))


@pytest.mark.parametrize(("logprob", "expected"), [(float("-inf"), -9999.0), (-2.0, -2.0)])
def test_what_a_model_rules_out_is_a_number(logprob: float, expected: float) -> None:
    shape = completion_logprobs([token(logprob)], OutputPlaces(0, skips_special=True))
    assert shape["token_logprobs"] == [expected]
    assert chat_logprobs([token(logprob)])["content"][0]["logprob"] == expected
    [own] = prompt_logprobs([pb.PromptLogprobs(tokens=[token(logprob)])], num_top=0)
    assert own == {"7": {"logprob": expected, "rank": None, "decoded_token": "x"}}


def entry(token_bytes: bytes, *, is_special: bool = False) -> pb.LogprobEntry:
    text = token_bytes.decode(errors="replace")
    return pb.LogprobEntry(token_bytes=token_bytes, token=text, is_special=is_special, logprob=-len(token_bytes))


@pytest.mark.parametrize(("skips_special", "last"), [(True, 8), (False, 13)])
def test_offsets_of_an_output_are_characters_of_its_text(skips_special: bool, last: int) -> None:
    places = OutputPlaces(5, skips_special=skips_special)
    tokens = [b"a", "😀".encode()[:2], "😀".encode()[2:], "日".encode()]
    assert [places.place(entry(token)) for token in tokens] == [5, 6, 6, 7]
    assert places.place(entry(b"<end>", is_special=True)) == 8
    assert places.place(entry(b"b")) == last


def test_parts_of_characters_are_told_by_their_bytes_and_apart() -> None:
    halves = [entry(b"\xf0\x9f"), entry(b"\xe6")]
    told = pb.TokenLogprob(chosen=halves[0], top=halves)
    shape = completion_logprobs([told], OutputPlaces(0, skips_special=True))
    assert shape["tokens"] == [r"bytes:\xf0\x9f"]
    assert shape["top_logprobs"] == [{r"bytes:\xf0\x9f": -2.0, r"bytes:\xe6": -1.0}]
