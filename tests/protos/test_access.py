"""Scopes and keys as all services know them."""

import pytest
from softprompt_api.access import Scope, allows, key_sha256, new_key, scope_from, scope_to
from softprompt_api.registry.v1 import registry_pb2 as pb


def test_scopes_are_those_of_the_protocol():
    assert {scope_to(scope) for scope in Scope} == set(pb.KeyScope.values()) - {pb.KEY_SCOPE_UNSPECIFIED}
    assert [scope_from(scope_to(scope)) for scope in Scope] == list(Scope)


@pytest.mark.parametrize("value", [0, 99, -1])
def test_an_unknown_scope_is_none(value):
    assert scope_from(value) is None


@pytest.mark.parametrize(
    ("scope", "included"),
    [
        (Scope.INFER, {Scope.INFER}),
        (Scope.ADAPTERS_READ, {Scope.ADAPTERS_READ}),
        (Scope.ADAPTERS_WRITE, {Scope.ADAPTERS_READ, Scope.ADAPTERS_WRITE}),
        (Scope.ADMIN, set(Scope)),
    ],
)
def test_a_scope_allows_what_it_includes(scope, included):
    assert {wanted for wanted in Scope if allows([scope], wanted)} == included


def test_no_scope_allows_nothing():
    assert not any(allows([], wanted) for wanted in Scope)


def test_keys_are_long_random_and_told_apart():
    keys = {new_key() for _ in range(100)}
    assert len({key_sha256(key) for key in keys}) == 100
    assert all(len(key.removeprefix("sk-sp-")) == 43 and key.isascii() for key in keys)
