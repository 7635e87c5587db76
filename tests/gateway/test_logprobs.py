"""Where the tokens of a prompt stand in its text, and numbers that JSON has."""

import pytest
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_gateway.openai.logprobs import EchoedText, chat_logprobs, completion_logprobs, prompt_logprobs


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


def test_parts_of_a_character_stand_at_it_or_behind_its_beginning() -> None:
    assert placed("a€b", b"a", b"\xe2", b"\x82\xac", b"b") == [0, 1, 2, 2]


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
    shape, _ = completion_logprobs([token(logprob)], 0)
    assert shape["token_logprobs"] == [expected]
    assert chat_logprobs([token(logprob)])["content"][0]["logprob"] == expected
    [own] = prompt_logprobs([pb.PromptLogprobs(tokens=[token(logprob)])], num_top=0)
    assert own == {"7": {"logprob": expected, "rank": None, "decoded_token": "x"}}
