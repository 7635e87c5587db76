"""The registry's rules."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.errors import BaseModelUnknown, InvalidArgument
from softprompt_api.names import AdapterRef
from softprompt_registry import catalog
from softprompt_registry.catalog import BaseModel, Registration

BASE = BaseModel(
    id="org/Tiny",
    architecture="LlamaForCausalLM",
    hidden_size=32,
    num_layers=2,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=97,
    tokenizer_sha256="",
    max_virtual_tokens=0,
    dtype="bfloat16",
)
REGISTRATION = Registration(
    name="tweets",
    config_json="{}",
    size_bytes=100,
    sha256="0" * 64,
    idempotency_key="",
    labels={},
    base_model_id="",
)


def test_an_unknown_adapter_is_not_found_with_a_reason():
    error = catalog.not_found(AdapterRef(name="twets"), near="tweets")
    assert error.reason == "ADAPTER_NOT_FOUND"
    assert error.details == {"did_you_mean": "tweets"}
    assert "did you mean" not in catalog.not_found(AdapterRef(name="twets")).message


def test_an_unknown_version_is_told_what_the_name_alone_stands_for():
    """Which may be any of its versions, after a rollback: none is said to be the last, or to have been meant."""
    error = catalog.not_found(AdapterRef(name="tweets", version=9), latest=3)
    assert "tweets alone stands for version 3" in error.message
    assert error.details == {}


def test_what_stands_in_the_way_of_a_deletion_is_told_in_few_words():
    assert str(catalog.pinned("acme/a", [1])) == "a@1 is pinned; lift the pin first"
    assert str(catalog.pinned("a", range(1, 9))).startswith("a@1, a@2, a@3, a@4, a@5, a@6, a@7, a@8 are pinned")
    assert "a@7, a@8 and 142 more are pinned" in str(catalog.pinned("a", range(1, 151)))
    aliases = [f"b{number}" for number in range(64)]
    assert "the alias b0 points to a@1" in str(catalog.aliased("a", 1, aliases[:1]))
    assert "b6, b7 and 56 more point to a@1" in str(catalog.aliased("a", 1, aliases))


def test_only_near_names_are_near():
    names = ["tweet_adapter", "sms_spam", "sql_adapter"]
    assert catalog.nearest_name("tweet-adapter", names) == "tweet_adapter"
    assert catalog.nearest_name("sql", names) == ""
    assert catalog.nearest_name("zzz", names) == ""
    assert catalog.nearest_name("x", []) == ""


@given(after=st.from_regex(r"[a-z0-9][a-z0-9._-]{0,127}", fullmatch=True), query=st.text(max_size=20))
def test_a_page_token_comes_back_for_its_own_list_alone(after, query):
    token = catalog.page_token(query, after)
    assert catalog.page_start(token, query) == after
    with pytest.raises(InvalidArgument):
        catalog.page_start(token, query + "x")


@given(token=st.text(min_size=1, max_size=60))
def test_no_text_is_a_page_token_by_chance(token):
    with pytest.raises(InvalidArgument) as refused:
        catalog.page_start(token, "adapters ")
    assert refused.value.field == "page_token"


def test_the_first_page_has_no_token():
    assert catalog.page_start("", "adapters ") == ""


def test_page_sizes_have_limits_and_a_default():
    assert [catalog.page_size(wanted) for wanted in (0, 1, 1000)] == [100, 1, 1000]
    for wanted in (-1, 1001):
        with pytest.raises(InvalidArgument):
            catalog.page_size(wanted)


def test_the_only_base_model_need_not_be_named():
    other = replace(BASE, id="org/Other")
    assert catalog.choose_base_model([BASE], "") == BASE
    assert catalog.choose_base_model([BASE, other], "org/Other") == other
    with pytest.raises(InvalidArgument, match="org/Tiny, org/Other"):
        catalog.choose_base_model([BASE, other], "")
    with pytest.raises(BaseModelUnknown, match="org/Tiny"):
        catalog.choose_base_model([BASE], "org/None")
    with pytest.raises(BaseModelUnknown, match="PutBaseModel"):
        catalog.choose_base_model([], "")


def test_a_base_model_that_is_served_no_longer_stands_in_the_way_of_one_that_is():
    old, other = replace(BASE, id="org/Old"), replace(BASE, id="org/Other")
    assert catalog.choose_base_model([old, BASE], "", {"org/Tiny"}) == BASE
    assert catalog.choose_base_model([old, BASE], "org/Old", {"org/Tiny"}) == old
    assert catalog.choose_base_model([old], "", {"org/Unreadable"}) == old
    with pytest.raises(InvalidArgument, match=r"choose one of org/Tiny, org/Other$"):
        catalog.choose_base_model([old, BASE, other], "", {"org/Tiny", "org/Other"})


def test_everything_but_the_key_and_the_base_model_is_content():
    content = REGISTRATION.content()
    assert replace(REGISTRATION, idempotency_key="k", base_model_id="org/Tiny").content() == content
    for change in (
        {"name": "sms"},
        {"config_json": "{ }"},
        {"size_bytes": 101},
        {"sha256": "1" * 64},
        {"labels": {"a": "b"}},
    ):
        assert replace(REGISTRATION, **change).content() != content


def test_a_registration_has_limits():
    catalog.check_registration(replace(REGISTRATION, idempotency_key="k" * 128), max_size_bytes=100)
    catalog.check_registration(replace(REGISTRATION, labels={"k" * 64: "v" * 256}), max_size_bytes=100)
    with pytest.raises(InvalidArgument) as refused:
        catalog.check_registration(REGISTRATION, max_size_bytes=99)
    assert refused.value.field == "tensors_size_bytes"


@pytest.mark.parametrize(
    ("config", "num_warnings"),
    [
        ("{}", 0),
        ('{"base_model_name_or_path": null}', 0),
        ('{"base_model_name_or_path": "org/Tiny"}', 0),
        ('{"base_model_name_or_path": "/models/tiny/"}', 0),
        ('{"base_model_name_or_path": "org/Other"}', 1),
    ],
)
def test_training_on_another_model_is_worth_a_warning(config, num_warnings):
    assert len(catalog.warnings_for(config, BASE)) == num_warnings
