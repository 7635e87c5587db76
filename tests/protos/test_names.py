"""The grammar of model names, with every spelling."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import (
    AdapterRef,
    check_alias,
    check_full_name,
    check_name,
    choose_task,
    join_model,
    parse_adapter,
    parse_model,
    parse_requested,
    shown,
    split_model,
)

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DIGEST = "sha256:" + "0123456789abcdef" * 4


@pytest.mark.parametrize("name", ["a", "0", "tweet_adapter", "a.b-c_d", "v1.0", "a" * 128])
def test_names_of_small_letters_digits_and_marks_are_accepted(name):
    assert check_name(name) == name


BAD_NAMES = [
    "", "A", "Tweets", "-a", "_a", ".a", "..", "../x", "a/b", "a b", "a\n", "a\r\n", "a\x00", "%2e", "é", "🦄",
    "a:b", "a@b", "a+b", "a" * 129, "a" * 10_000, "٣", "\u202eabc", "ａ",
]  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_other_names_are_refused_and_never_echoed_raw(name):
    with pytest.raises(InvalidArgument) as refused:
        check_name(name, field="model")
    assert refused.value.field == "model"
    assert refused.value.message.isascii()
    assert refused.value.message.isprintable()
    assert len(refused.value.message) < 900


@pytest.mark.parametrize("name", ["latest", "base", "none", "default", "sha256"])
def test_reserved_words_are_no_names(name):
    with pytest.raises(InvalidArgument, match="reserved"):
        check_name(name)


def test_the_base_models_id_is_no_name_in_any_case():
    with pytest.raises(InvalidArgument, match="reserved"):
        check_name("gpt2", base_model_id="GPT2")


@pytest.mark.parametrize(
    ("spelling", "ref"),
    [
        ("tweets", AdapterRef(name="tweets")),
        ("tweets@latest", AdapterRef(name="tweets")),
        ("tweets@1", AdapterRef(name="tweets", version=1)),
        ("tweets@2147483647", AdapterRef(name="tweets", version=2**31 - 1)),
        ("7@7", AdapterRef(name="7", version=7)),
        ("tweets@007", AdapterRef(name="tweets", version=7)),
        ("tweets@prod", AdapterRef(name="tweets", alias="prod")),
        ("tweets@v1.0", AdapterRef(name="tweets", alias="v1.0")),
        ("tweets@1.2.3", AdapterRef(name="tweets", alias="1.2.3")),
        ("tweets@2024-05-01_a", AdapterRef(name="tweets", alias="2024-05-01_a")),
        ("tweets@1e5", AdapterRef(name="tweets", alias="1e5")),
        ("tweets@base", AdapterRef(name="tweets", alias="base")),
        ("tweets@" + "a" * 128, AdapterRef(name="tweets", alias="a" * 128)),
        ("acme/tweets", AdapterRef(name="acme/tweets")),
        ("acme/tweets@3", AdapterRef(name="acme/tweets", version=3)),
        ("acme/tweets@prod", AdapterRef(name="acme/tweets", alias="prod")),
        (f"acme/{DIGEST}", AdapterRef(digest=DIGEST, owner="acme")),
        (f"default/{DIGEST}", AdapterRef(digest=DIGEST, owner="default")),
        (DIGEST, AdapterRef(digest=DIGEST)),
    ],
)
def test_a_spelling_names_one_version(spelling, ref):
    assert parse_adapter(spelling) == ref
    assert parse_adapter(str(ref)) == ref


@pytest.mark.parametrize(
    "spelling",
    [
        "tweets@", "tweets@0", "tweets@-1", "tweets@+1", "tweets@1.0", "tweets@ 1", "tweets@1\n", "tweets@٣",
        "tweets@²", "tweets@2147483648", "tweets@" + "9" * 5000, "tweets@1@1", "tweets@prod!", "@1", "latest@1",
        "tweets@1.", "tweets@0.5", "tweets@00", "tweets@Prod", "tweets@-prod", "tweets@.", "tweets@prod\n",
        "tweets@prod@1", "tweets@" + "a" * 129, "tweets@é", "tweets@a b", "tweets@a/b", "@prod", "tweets@a+b",
        "sha256:", DIGEST[:-1], DIGEST + "0", DIGEST.upper(), DIGEST.replace("a", "A"), DIGEST + "\n",
        "sha512:" + "0" * 64,
        "default/tweets", "a/b/tweets", "/tweets", "acme/", "Acme/tweets", "acme/latest", f"/{DIGEST}",
        f"Acme/{DIGEST}", f"a/b/{DIGEST}", f"acme/{DIGEST}0",
    ],
)  # fmt: skip
def test_what_is_no_spelling_is_refused(spelling):
    with pytest.raises(InvalidArgument) as refused:
        parse_adapter(spelling)
    assert refused.value.field == "adapter"


def test_only_a_bare_name_and_latest_mean_whatever_is_latest():
    assert parse_adapter("tweets").is_latest
    assert parse_adapter("tweets@latest").is_latest
    assert not any(parse_adapter(spelling).is_latest for spelling in ("tweets@1", "tweets@prod", DIGEST))


@pytest.mark.parametrize("alias", ["latest", "prod", "v1", "1.2.3", "a" * 128, "default"])
def test_an_alias_is_spelled_as_a_name_is(alias):
    assert check_alias(alias) == alias


@pytest.mark.parametrize("alias", ["1", "007", "1.0", "1.", "9" * 128, *BAD_NAMES], ids=range(5 + len(BAD_NAMES)))
def test_a_number_or_what_is_no_name_is_no_alias(alias):
    with pytest.raises(InvalidArgument) as refused:
        check_alias(alias)
    assert refused.value.field == "alias"
    assert refused.value.message.isascii()


def test_a_base_models_id_in_small_letters_is_no_name_of_a_tenants_adapter():
    with pytest.raises(InvalidArgument, match="reserved"):
        check_full_name(BASE.lower(), base_model_id=BASE)
    assert check_full_name("acme/tweets", base_model_id=BASE) == "acme/tweets"


def test_a_model_is_the_base_or_an_adapter_of_it():
    assert parse_model(BASE, base_model_id=BASE) == ()
    for spelling in ("tweets", f"{BASE}:tweets"):
        assert parse_model(spelling, base_model_id=BASE) == (AdapterRef(name="tweets"),)
    assert parse_model(f"{BASE}:{DIGEST}", base_model_id=BASE) == (AdapterRef(digest=DIGEST),)
    assert parse_model(f"{BASE}:tweets@prod", base_model_id=BASE) == (AdapterRef(name="tweets", alias="prod"),)
    for spelling in (BASE.upper(), f"{BASE}:", f"{BASE}:{BASE}", "other/model:tweets", f"{BASE}:{BASE}:tweets"):
        with pytest.raises(InvalidArgument) as refused:
            parse_model(spelling, base_model_id=BASE)
        assert refused.value.field == "model"


PARTS = {
    "a": AdapterRef(name="a"),
    "a@latest": AdapterRef(name="a"),
    "b@3": AdapterRef(name="b", version=3),
    "c@prod:2": AdapterRef(name="c", alias="prod", task=2),
    "d:0": AdapterRef(name="d", task=0),
    DIGEST: AdapterRef(digest=DIGEST),
    f"{DIGEST}:7": AdapterRef(digest=DIGEST, task=7),
}


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(PARTS)), min_size=1, max_size=5))
def test_plus_puts_any_spellings_together_in_their_order(spellings):
    refs = tuple(PARTS[spelling] for spelling in spellings)
    model = join_model(spellings)
    assert model == "+".join(spellings)
    for spelled in (model, f"{BASE}:{model}", join_model(map(str, refs))):
        assert parse_model(spelled, base_model_id=BASE) == refs
    assert split_model(model, base_model_id=BASE) == spellings


@pytest.mark.parametrize(
    "spelling",
    [
        "+", "a+", "+a", "a++b", "a+ b", "a +b", "a%2Bb", f"a+{BASE}", f"a+{BASE}:b", f"{BASE}+a",
        f"{BASE}:a+{BASE}:b",         "a+B", "a+b@", "a+b:", "a+sha256:12", f"{DIGEST}+", "a+b\n", "a＋b",
    ],
)  # fmt: skip
def test_what_puts_nothing_together_is_refused(spelling):
    with pytest.raises(InvalidArgument) as refused:
        parse_model(spelling, base_model_id=BASE)
    assert refused.value.field == "model"
    assert refused.value.message.isascii()


def test_a_base_models_id_may_hold_a_plus():
    base = "org/a+b"
    assert parse_model(base, base_model_id=base) == ()
    assert parse_model(f"{base}:x+y", base_model_id=base) == (AdapterRef(name="x"), AdapterRef(name="y"))
    assert parse_model("a+b", base_model_id="a+b") == ()


@pytest.mark.parametrize(
    ("spelling", "ref"),
    [
        ("tweets", AdapterRef(name="tweets")),
        ("tweets:0", AdapterRef(name="tweets", task=0)),
        ("tweets@3:12", AdapterRef(name="tweets", version=3, task=12)),
        ("tweets@latest:1", AdapterRef(name="tweets", task=1)),
        (DIGEST, AdapterRef(digest=DIGEST)),
        (f"{DIGEST}:2", AdapterRef(digest=DIGEST, task=2)),
        ("acme/tweets:1", AdapterRef(name="acme/tweets", task=1)),
        (f"acme/{DIGEST}:2", AdapterRef(digest=DIGEST, owner="acme", task=2)),
    ],
)
def test_a_request_may_name_a_task(spelling, ref):
    assert parse_requested(spelling) == ref
    assert parse_requested(str(ref)) == ref
    assert parse_model(f"{BASE}:{spelling}", base_model_id=BASE) == (ref,)
    assert parse_adapter(str(ref.whole)) == ref.whole


@pytest.mark.parametrize(
    "spelling",
    [
        "tweets:", "tweets:-1", "tweets:+1", "tweets:01", "tweets:1.0", "tweets: 1", "tweets:1\n", "tweets:٣",
        ":0", "tweets:9999999999", "tweets:0:1", "tweets:first", f"{DIGEST}:", f"{DIGEST}:x", f"{DIGEST}:0:1",
        "sha256:0", "tweets@:0", "sha256::0",
    ],
)  # fmt: skip
def test_what_is_no_task_is_refused(spelling):
    with pytest.raises(InvalidArgument):
        parse_requested(spelling)


@pytest.mark.parametrize("spelling", ["tweets:0", f"{DIGEST}:0"])
def test_only_requests_name_tasks(spelling):
    with pytest.raises(InvalidArgument):
        parse_adapter(spelling)


@pytest.mark.parametrize(
    ("spelling", "num_tasks", "task"), [("a", 0, None), ("a", 1, 0), ("a:0", 1, 0), ("a:2", 3, 2), (DIGEST, 1, 0)]
)
def test_the_task_is_the_named_one_or_the_only_one(spelling, num_tasks, task):
    assert choose_task(parse_requested(spelling), num_tasks) == task


@pytest.mark.parametrize(
    ("spelling", "num_tasks", "message"),
    [
        ("a:0", 0, "a has no tasks; leave ':0' out"),
        ("a@2", 3, "a@2 has the tasks 0 to 2; name one of them, for example a@2:0"),
        ("a:3", 3, "a has the tasks 0 to 2, and no task 3"),
        ("a:1", 1, "a has the tasks 0 to 0, and no task 1"),
    ],
)
def test_a_task_that_is_not_there_or_not_named_is_refused(spelling, num_tasks, message):
    with pytest.raises(InvalidArgument) as refused:
        choose_task(parse_requested(spelling), num_tasks, field="model")
    assert (refused.value.message, refused.value.field) == (message, "model")


@given(st.text(max_size=300))
def test_no_text_raises_anything_but_invalid_argument(text):
    try:
        ref = parse_adapter(text)
    except InvalidArgument:
        return
    assert ref.name or ref.digest


@given(st.text(st.sampled_from("ab1@:+.-_/ ") | st.characters(), max_size=40))
def test_no_model_raises_anything_but_invalid_argument_and_every_other_is_spelled_as_it_was_understood(text):
    try:
        refs = parse_model(text, base_model_id=BASE)
    except InvalidArgument:
        return
    assert len(refs) == text.count("+") + 1
    assert parse_model(join_model(map(str, refs)), base_model_id=BASE) == refs


@given(st.text())
def test_shown_text_is_short_and_printable(text):
    assert shown(text).isprintable()
    assert len(shown(text)) <= 10 * 64 + 20
