"""Text comes out token by token, never changes, and is the same as if it had been decoded at once."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.params import SamplingParams
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.text import Tokenizer
from softprompt_inference.text.detokenizer import OutputText
from softprompt_inference.text.vocabulary import Vocabulary
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(DEFAULT_MODEL))


def stream(tokenizer: Tokenizer, token_ids: Sequence[int], **params: object) -> tuple[list[str], OutputText]:
    output = tokenizer.output_text(SamplingParams(**params))  # type: ignore[arg-type]
    pieces = []
    for token_id in token_ids:
        pieces.append(output.push(token_id))
        if output.stop_string is not None:
            return pieces, output
    return [*pieces, output.finish()], output


# Its vocabulary lacks some control characters.
@given(text=st.text(st.characters(codec="utf-8", exclude_categories=["C"]), max_size=60))
def test_streamed_text_is_the_text(tokenizer: Tokenizer, text: str) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode(text), skip_special_tokens=False)
    assert "".join(pieces) == text


@given(token_ids=st.lists(st.integers(17, 49151), max_size=40))
def test_streamed_text_equals_text_decoded_at_once_for_any_tokens(
    tokenizer: Tokenizer, token_ids: list[int]
) -> None:
    pieces, _ = stream(tokenizer, token_ids)
    assert "".join(pieces) == tokenizer.decode(token_ids)


def test_an_incomplete_character_is_held_back(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦙")
    assert len(token_ids) > 1
    pieces, _ = stream(tokenizer, token_ids)
    assert pieces[:-2] == [""] * (len(token_ids) - 1)
    assert "".join(pieces) == "🦙"


def test_an_incomplete_character_at_the_end_becomes_a_replacement_character(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode("ok 🦙")[:-1])
    assert "".join(pieces) == "ok \ufffd"


def test_special_tokens_are_left_out_unless_asked_for(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode(f"a{END}b")
    assert "".join(stream(tokenizer, token_ids)[0]) == "ab"
    assert "".join(stream(tokenizer, token_ids, skip_special_tokens=False)[0]) == f"a{END}b"


def test_the_token_that_ends_a_choice_is_not_shown(tokenizer: Tokenizer) -> None:
    output = tokenizer.output_text(SamplingParams(skip_special_tokens=False))
    assert output.push(tokenizer.encode(END)[0], ends_choice=True) == ""


def test_the_token_that_ends_a_choice_is_shown_when_stops_are_kept(tokenizer: Tokenizer) -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    assert tokenizer.output_text(params).push(tokenizer.encode(END)[0], ends_choice=True) == END


def test_a_stop_string_over_several_tokens_ends_the_text_before_it(tokenizer: Tokenizer) -> None:
    pieces, output = stream(tokenizer, tokenizer.encode("first line\n### Next one\nmore"), stop=["\n### Next"])
    assert output.stop_string == "\n### Next"
    assert "".join(pieces) == "first line"


def test_a_stop_string_can_be_kept(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode("one, two"), stop=[","], include_stop_str_in_output=True)
    assert "".join(pieces) == "one,"


def test_what_may_become_a_stop_string_is_held_and_comes_out_when_it_does_not(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("say [/ and more")
    pieces, output = stream(tokenizer, token_ids, stop=["[/assistant]"])
    held = ["[" in piece for piece in pieces]
    assert held.index(True) > [tokenizer.token_text(token_id).strip()[:1] for token_id in token_ids].index("[")
    assert "".join(pieces) == "say [/ and more"
    assert output.stop_string is None


def test_what_is_held_at_the_end_comes_out(tokenizer: Tokenizer) -> None:
    pieces, _ = stream(tokenizer, tokenizer.encode("end [/assis"), stop=["[/assistant]"])
    assert "".join(pieces) == "end [/assis"
    assert pieces[-1] != ""


def test_stop_strings_do_not_count_before_min_tokens(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a.b.c.d.")
    pieces, output = stream(tokenizer, token_ids, stop=["."], min_tokens=4)
    assert output.stop_string == "."
    assert "".join(pieces) == "a.b"


def test_a_stop_string_that_begins_before_min_tokens_may_end_after(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a.b.c.d.")
    pieces, output = stream(tokenizer, token_ids, stop=["b.c"], min_tokens=4)
    assert output.stop_string == "b.c"
    assert "".join(pieces) == "a."


def _sentencepiece_like() -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "!", "▁"]
    backend = Backend(
        models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def test_a_sentencepiece_tokenizer_keeps_the_space_between_prompt_and_output() -> None:
    backend = _sentencepiece_like()
    vocabulary = Vocabulary(backend, backend.to_str())
    output = OutputText(vocabulary, SamplingParams())
    assert output.push(backend.token_to_id("▁Hello")) == " Hello"
    assert output.push(backend.token_to_id("!")) == "!"
    pieces = [output.push(backend.token_to_id(f"<0x{byte:02X}>")) for byte in "é".encode()]
    assert pieces == ["", "é"]


def test_an_id_the_tokenizer_does_not_have_has_no_text() -> None:
    backend = _sentencepiece_like()
    assert Vocabulary(backend, backend.to_str()).token_bytes(100_000) == b""


def test_a_tokenizer_without_a_decoder_puts_spaces_between_tokens() -> None:
    backend = Backend(models.WordLevel({"[UNK]": 0, "hello": 1, "world": 2}, unk_token="[UNK]"))
    assert json.loads(backend.to_str())["decoder"] is None
    vocabulary = Vocabulary(backend, backend.to_str())
    assert vocabulary.token_bytes(1) + vocabulary.token_bytes(2) == b" hello world"
