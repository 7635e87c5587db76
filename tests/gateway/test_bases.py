"""Which base models there are, and which one a request or an adapter is for."""

import pytest
from softprompt_api.errors import BaseModelUnknown, InvalidArgument
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion, BaseModel
from softprompt_gateway.bases import Bases


def served(id_: str, **shape: int | str) -> GetModelResponse:
    return GetModelResponse(base_model=BaseModel(id=id_, **shape))


def version(id_: str, **shape: int | str) -> AdapterVersion:
    return AdapterVersion(name="a", version=1, base_model=BaseModel(id=id_, **shape))


def test_replicas_that_serve_the_same_are_one_base_model() -> None:
    bases = Bases([served("x", hidden_size=8), served("y"), served("x", hidden_size=8)])
    assert [one.base_model.id for one in bases] == bases.ids == ["x", "y"]
    assert bases.are_several
    assert not Bases([served("x"), served("x")]).are_several
    assert not Bases()


def test_there_is_a_sole_one_where_all_replicas_are_known_to_serve_it() -> None:
    assert Bases([served("x"), served("x")], is_whole=True).sole_id == "x"
    assert Bases([served("x"), served("y")], is_whole=True).sole_id == ""
    assert Bases([served("x")]).sole_id == Bases(is_whole=True).sole_id == ""


def test_a_model_is_a_base_or_adapters_with_their_base_before_them_or_without() -> None:
    bases = Bases([served("x"), served("x:y"), served("owner/z")])
    for model, base_id, named in (
        ("x", "x", []),
        ("x:y", "x:y", []),
        ("owner/z", "owner/z", []),
        ("owner/z:a+b", "owner/z", ["a", "b"]),
        ("x:a", "x", ["a"]),
        ("x:y:a:0", "x:y", ["a:0"]),
        ("a+b", None, ["a", "b"]),
        ("other:a", None, ["other:a"]),
        ("", None, [""]),
        (":a", None, [":a"]),
    ):
        base, adapters = bases.split(model)
        assert (base and base.base_model.id, adapters) == (base_id, named)


def test_an_adapter_is_for_the_base_model_of_its_id() -> None:
    bases = Bases([served("x"), served("y")])
    assert bases.of(version("y")).base_model.id == "y"


def test_of_base_models_with_one_id_it_is_for_the_one_of_its_shape() -> None:
    bases = Bases([served("x", hidden_size=8), served("x", hidden_size=16)])
    assert bases.of(version("x", hidden_size=16)).base_model.hidden_size == 16
    assert bases.of(version("x")).base_model.hidden_size == 8
    # The service itself says what does not fit.
    assert bases.of(version("x", hidden_size=32)).base_model.hidden_size == 8
    assert len(list(bases)) == 1


def test_an_adapter_without_its_base_model_is_refused_with_what_is_served() -> None:
    with pytest.raises(
        BaseModelUnknown, match=r"'a' is for the base model 'z', which no replica serves; .* 'x', 'y'"
    ):
        Bases([served("x"), served("y")], is_whole=True).of(version("z"))


def test_the_only_base_model_may_have_another_name_now_once_all_replicas_are_known() -> None:
    assert Bases([served("x")], is_whole=True).of(version("z")).base_model.id == "x"
    assert Bases([served("x")], is_whole=False).find(version("z")) is None


def test_one_of_several_base_models_must_be_named() -> None:
    assert Bases([served("x")]).only().base_model.id == "x"
    with pytest.raises(InvalidArgument, match="name one of 'x', 'y'") as refused:
        Bases([served("x"), served("y")]).only()
    assert refused.value.field == "model"
