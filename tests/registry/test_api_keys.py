"""What a key may say, and its record: whole, or found out."""

from datetime import UTC, datetime, timedelta

import pytest
from softprompt_api.access import Scope
from softprompt_api.errors import DataCorrupted, InvalidArgument
from softprompt_registry.api_keys import (
    MAX_ADAPTERS,
    KeyDraft,
    KeyLimits,
    decode_key,
    encode_key,
    id_digits,
    key_id,
    made_now,
)

SHA256 = "0123456789abcdef" * 4
DRAFT = KeyDraft(tenant="acme", scopes=(Scope.INFER,))
FULL = KeyDraft(
    tenant="acme",
    name="the shop's",
    scopes=(Scope.INFER, Scope.ADAPTERS_READ, Scope.INFER),
    adapters=("tweets", "sms", "tweets"),
    limits=KeyLimits(requests_per_minute=1, tokens_per_minute=2, parallel_requests=3),
    expires_at=datetime.now(UTC) + timedelta(days=1),
)


def stored(draft: KeyDraft) -> dict[bytes, bytes]:
    """The record as the store gives it back."""
    key = made_now(draft, sha256=SHA256)
    return {name.encode(): value.encode() for name, value in encode_key(key).items()}


@pytest.mark.parametrize("draft", [DRAFT, FULL])
def test_a_record_is_read_as_it_was_written(draft):
    key = decode_key(stored(draft), sha256=SHA256)
    assert (key.tenant, key.name, key.limits, key.expires_at) == (
        draft.tenant,
        draft.name,
        draft.limits,
        draft.expires_at,
    )
    assert key.id == "key-0123456789ab"


def test_scopes_and_adapters_are_kept_once():
    key = made_now(FULL, sha256=SHA256)
    assert key.scopes == (Scope.INFER, Scope.ADAPTERS_READ)
    assert key.adapters == ("tweets", "sms")


@pytest.mark.parametrize("damage", ["record", "check", "other key", "no record", "no JSON"])
def test_a_damaged_record_is_found_out(damage):
    fields, sha256 = stored(FULL), SHA256
    match damage:
        case "record":
            fields[b"record"] = fields[b"record"].replace(b"infer", b"admin")
        case "check":
            fields[b"check"] = b"0" * 64
        case "other key":
            sha256 = "f" * 64
        case "no record":
            del fields[b"record"]
        case "no JSON":
            fields[b"record"] = b"\xff"
    with pytest.raises(DataCorrupted, match="key-"):
        decode_key(fields, sha256=sha256)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"tenant": ""}, "tenant"),
        ({"tenant": "Acme"}, "tenant"),
        ({"tenant": "a/b"}, "tenant"),
        ({"tenant": "a" * 64}, "tenant"),
        ({"name": "x" * 129}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"scopes": ()}, "scopes"),
        ({"adapters": ("acme/tweets",)}, "adapters"),
        ({"adapters": ("",)}, "adapters"),
        ({"adapters": ("a",) * (MAX_ADAPTERS + 1)}, "adapters"),
        ({"limits": KeyLimits(tokens_per_minute=-1)}, "limits.tokens_per_minute"),
        ({"expires_at": datetime.now(UTC)}, "expires_at"),
    ],
)
def test_what_no_key_can_be_is_refused_by_its_field(changes, field):
    draft = KeyDraft(**{"tenant": "acme", "scopes": (Scope.INFER,), **changes})
    with pytest.raises(InvalidArgument) as refused:
        made_now(draft, sha256=SHA256)
    assert refused.value.field == field


def test_an_id_is_the_beginning_of_the_sha256():
    assert id_digits(key_id(SHA256)) == SHA256[:12]
    for wrong in ("", "key-", "key-" + "g" * 12, SHA256[:12], "key-" + "a" * 13, "key-" + "a" * 12 + "\n"):
        with pytest.raises(InvalidArgument):
            id_digits(wrong)
