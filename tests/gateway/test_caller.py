"""What a caller's spellings stand for, and what their key allows."""

import pytest
from softprompt_api.access import Scope
from softprompt_api.errors import AdapterNotFound, InvalidArgument, PermissionDenied
from softprompt_api.names import parse_adapter
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion
from softprompt_gateway.caller import ANYBODY, Caller

DIGEST = "sha256:" + "a" * 64
ACME = Caller(tenant="acme", key_id="key-1", scopes=frozenset({Scope.INFER}))


@pytest.mark.parametrize(
    ("spelling", "default", "acme"),
    [
        ("tweets", "tweets", "acme/tweets"),
        ("tweets@3", "tweets@3", "acme/tweets@3"),
        ("tweets@prod", "tweets@prod", "acme/tweets@prod"),
        (DIGEST, f"default/{DIGEST}", f"acme/{DIGEST}"),
    ],
)
def test_a_spelling_stands_for_the_tenants_own(spelling: str, default: str, acme: str) -> None:
    assert str(ANYBODY.own(parse_adapter(spelling))) == default
    assert str(ACME.own(parse_adapter(spelling))) == acme


@pytest.mark.parametrize("spelling", ["umbrella/tweets", "acme/tweets", f"umbrella/{DIGEST}", f"default/{DIGEST}"])
def test_no_spelling_reaches_another_tenant(spelling: str) -> None:
    for caller in (ANYBODY, ACME):
        with pytest.raises(AdapterNotFound):
            caller.own(parse_adapter(spelling))


def test_a_new_name_is_plain_and_the_tenants() -> None:
    assert ACME.new_name("tweets") == "acme/tweets"
    assert ANYBODY.new_name("tweets") == "tweets"
    for name in ("umbrella/tweets", "Tweets", "latest"):
        with pytest.raises(InvalidArgument):
            ACME.new_name(name)


def test_a_key_for_some_adapters_may_use_no_other() -> None:
    caller = Caller(tenant="acme", key_id="key-1", adapters=frozenset({"tweets"}))
    assert str(caller.own(parse_adapter("tweets"))) == "acme/tweets"
    assert caller.may_use("acme/tweets")
    assert not caller.may_use("tweets")
    assert not caller.may_use("umbrella/tweets")
    with pytest.raises(PermissionDenied, match="may not use the adapter 'sms'"):
        caller.own(parse_adapter("sms"))
    with pytest.raises(PermissionDenied):
        caller.new_name("sms")
    with pytest.raises(PermissionDenied):
        caller.check_use("acme/sms")


def test_a_tenant_is_told_its_own_names() -> None:
    version = AdapterVersion(name="acme/tweets", version=3)
    assert ACME.told(version) == AdapterVersion(name="tweets", version=3)
    assert version.name == "acme/tweets"
    plain = AdapterVersion(name="tweets")
    assert ANYBODY.told(plain) is plain


def test_salts_of_tenants_and_within_one_are_apart() -> None:
    umbrella = Caller(tenant="umbrella")
    salts = [caller.salt(asked) for caller in (ANYBODY, ACME, umbrella) for asked in (None, "a", "acme/", "b")]
    assert len(set(salts)) == len(salts)
    assert ANYBODY.salt(None) == ""
    assert ACME.salt(None) == ACME.salt("")
