"""Outputs of the engine become the text of one choice and its end."""

import pytest
from softprompt_api.errors import ContextLengthExceeded, InternalError, SoftpromptError, Unavailable
from softprompt_api.params import SamplingParams
from softprompt_inference.choice import Choice, Delta, Finished, PromptLogprobs
from softprompt_inference.engine.messages import Finish, Logprobs, Output
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import Tokenizer

EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(DEFAULT_MODEL))


def outputs(*token_ids: int, finish: Finish | None = None, stop_token_id: int | None = None) -> list[Output]:
    """Outputs of these tokens, the last with `finish`."""
    made = [Output(request_id="r", token_id=token_id) for token_id in token_ids[:-1]]
    return [*made, Output(request_id="r", token_id=token_ids[-1], finish=finish, stop_token_id=stop_token_id)]


def test_outputs_read_together_make_one_delta(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two three")
    choice = Choice(4, tokenizer.output_text(SamplingParams()))
    assert choice.read(outputs(*token_ids)) == [
        Delta(index=4, text="one two three", token_ids=token_ids, logprobs=[])
    ]
    assert (choice.num_tokens, choice.has_ended) == (len(token_ids), False)


def test_the_end_of_sequence_is_a_token_without_text(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams(skip_special_tokens=False)))
    delta, finished = choice.read(outputs(*tokenizer.encode("end"), EOS, finish=Finish.STOP))
    assert isinstance(delta, Delta)
    assert (delta.text, delta.token_ids[-1]) == ("end", EOS)
    assert finished == Finished(index=0, reason=Finish.STOP)
    assert choice.has_ended


def test_what_was_held_back_comes_with_the_end(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams(stop=["stop here"])))
    delta, finished = choice.read(outputs(*tokenizer.encode("then stop"), finish=Finish.LENGTH))
    assert isinstance(delta, Delta)
    assert delta.text == "then stop"
    assert finished == Finished(index=0, reason=Finish.LENGTH)


def test_tokens_after_a_stop_string_are_neither_shown_nor_counted(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams(stop=["."])))
    token_ids = tokenizer.encode("A. B. C")
    delta, finished = choice.read(outputs(*token_ids))
    assert isinstance(delta, Delta)
    assert (delta.text, delta.token_ids) == ("A", token_ids[:2])
    assert finished == Finished(index=0, reason=Finish.STOP, stop_string=".")
    assert choice.num_tokens == 2


def test_a_stop_string_completed_by_the_last_token_wins_over_length(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams(stop=["."])))
    _, finished = choice.read(outputs(*tokenizer.encode("A."), finish=Finish.LENGTH))
    assert finished == Finished(index=0, reason=Finish.STOP, stop_string=".")


def test_what_is_told_of_a_prompt_comes_with_its_tokens_and_before_any_text(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two three")
    likely = Logprobs(chosen=-1.0, top=[])
    choice = Choice(0, tokenizer.output_text(SamplingParams()), told_ids=token_ids)
    assert choice.tells_prompt
    first, second = (
        Output(request_id="r", prompt_logprobs=told) for told in ([None, likely], [likely] * (len(token_ids) - 2))
    )
    assert choice.read([first]) == [PromptLogprobs(token_ids=token_ids[:2], logprobs=[None, likely])]
    assert choice.tells_prompt
    told, delta = choice.read([second, *outputs(token_ids[0])])
    assert told == PromptLogprobs(token_ids=token_ids[2:], logprobs=[likely] * (len(token_ids) - 2))
    assert delta == Delta(index=0, text="one", token_ids=token_ids[:1], logprobs=[])
    assert not choice.tells_prompt


def test_a_choice_without_tokens_ends_all_the_same(tokenizer: Tokenizer) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams(max_tokens=0)))
    assert choice.read([Output(request_id="r", finish=Finish.LENGTH, cached_tokens=3)]) == [
        Finished(index=0, reason=Finish.LENGTH)
    ]
    assert (choice.num_tokens, choice.cached_tokens, choice.has_ended) == (0, 3, True)


def test_what_came_before_an_error_is_read_before_it_is_raised(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("one two")
    failed = Output(request_id="r", finish=Finish.ERROR, error_reason="UNAVAILABLE", error_message="gone")
    choice = Choice(0, tokenizer.output_text(SamplingParams()))
    assert choice.read([*outputs(*token_ids), failed]) == [
        Delta(index=0, text="one two", token_ids=token_ids, logprobs=[])
    ]
    with pytest.raises(Unavailable, match="gone"):
        choice.read([])


@pytest.mark.parametrize(
    ("reason", "error"), [("CONTEXT_LENGTH_EXCEEDED", ContextLengthExceeded), ("WHATEVER", InternalError)]
)
def test_an_error_is_raised_as_what_it_is(tokenizer: Tokenizer, reason: str, error: type[SoftpromptError]) -> None:
    choice = Choice(0, tokenizer.output_text(SamplingParams()))
    failed = Output(
        request_id="r", finish=Finish.ERROR, error_reason=reason, error_message="m", error_field="max_tokens"
    )
    with pytest.raises(error) as raised:
        choice.read([failed])
    assert (raised.value.message, raised.value.field) == ("m", "max_tokens")
