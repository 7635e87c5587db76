"""What names are known to stand for, and when a request is computed alike with what they stood for before."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion, BaseModel
from softprompt_gateway.bases import Bases
from softprompt_gateway.caller import ANYBODY
from softprompt_gateway.catalog import Catalog
from softprompt_gateway.errors import ModelNotFound
from softprompt_gateway.resolve import Bound, Named, Resolver, Target


def target(*, hidden_size: int = 8, **fields: Any) -> Target:
    served = GetModelResponse(base_model=BaseModel(id="x", hidden_size=hidden_size))
    return Target(model="a", served=served, caller=ANYBODY, **fields)


def bound(number: int, task: int | None = None) -> Bound:
    return Bound(version=AdapterVersion(name="a", version=number, digest=f"sha256:{number}"), task=task)


def test_it_is_with_the_same_versions_in_the_same_places() -> None:
    one = target(front=[bound(1)], inside={"b": bound(2)})
    assert one.is_same(target(front=[bound(1)], inside={"b": bound(2)}))
    for other in (
        target(front=[bound(2)], inside={"b": bound(2)}),
        target(front=[bound(1, task=0)], inside={"b": bound(2)}),
        target(front=[bound(1), bound(2)]),
        target(front=[bound(1)], inside={"c": bound(2)}),
    ):
        assert not one.is_same(other)


def test_it_is_not_with_another_base_model_of_the_same_id() -> None:
    assert not target(front=[bound(1)]).is_same(target(front=[bound(1)], hidden_size=16))


def version(number: int) -> AdapterVersion:
    return AdapterVersion(
        name="a",
        version=number,
        digest=f"sha256:{number:064x}",
        kind="PROMPT_TUNING",
        revision=number,
        aliases=["latest"],
        base_model=BaseModel(id="x"),
    )


@pytest.fixture
def catalog() -> Catalog:
    """Knows `a@1`."""
    catalog = Catalog()
    catalog.learn(version(1))
    return catalog


@pytest.fixture
def resolver(catalog: Catalog) -> Resolver:
    """Knows the base model `x`, and can ask nobody."""
    bases = Bases([GetModelResponse(base_model=BaseModel(id="x"))], is_whole=True)
    inference = cast(Any, SimpleNamespace(known_bases=bases))
    return Resolver(cast(Any, None), inference, catalog, cast(Any, None))


def test_what_is_known_is_worked_out_anew_when_something_else_is_known(
    catalog: Catalog, resolver: Resolver
) -> None:
    named = Named(model="a", caller=ANYBODY)
    first = resolver.known(named)
    assert first is not None
    assert first.digest == version(1).digest
    assert resolver.known(replace(named)) is first
    catalog.learn(version(2))
    second = resolver.known(named)
    assert second is not None
    assert second.digest == version(2).digest
    catalog.forget("a")
    assert resolver.known(named) is None


def test_what_is_known_to_one_is_not_told_to_another(resolver: Resolver) -> None:
    named = Named(model="a", caller=ANYBODY)
    assert resolver.known(named) is not None
    for other in (replace(ANYBODY, adapters=frozenset({"b"})), replace(ANYBODY, tenant="other")):
        assert resolver.known(replace(named, caller=other)) is None


def test_nothing_is_kept_of_names_that_strangers_make_up(resolver: Resolver) -> None:
    for model in ("b", "a+b", "x:b", "a@7"):
        assert resolver.known(Named(model=model, caller=ANYBODY)) is None
    with pytest.raises(ModelNotFound):
        resolver.known(Named(model="A" * 10_000, caller=ANYBODY))
    assert resolver._found.cache_info().currsize == 0
