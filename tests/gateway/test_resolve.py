"""When a request is computed alike with what its names stood for before."""

from typing import Any

from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion, BaseModel
from softprompt_gateway.caller import ANYBODY
from softprompt_gateway.resolve import Bound, Target


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
