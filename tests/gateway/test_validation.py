"""What all request models have in common."""

from collections.abc import Iterator

from softprompt_gateway.app import make_app
from softprompt_gateway.validation import RequestModel


def models(base: type[RequestModel] = RequestModel) -> Iterator[type[RequestModel]]:
    for model in base.__subclasses__():
        yield model
        yield from models(model)


def own_checks(model: type[RequestModel]) -> set[str]:
    decorators = model.__pydantic_decorators__
    return (decorators.field_validators.keys() | decorators.model_validators.keys()) & vars(model).keys()


def test_no_check_takes_the_place_of_an_inherited_one() -> None:
    # pydantic replaces a validator by one of the same name without a word, whatever fields either is for.
    checked = {
        (model, base): own_checks(model) & own_checks(base)
        for model in models()
        for base in model.__mro__[1:]
        if issubclass(base, RequestModel)
    }
    assert make_app is not None  # with it came every model
    assert any(own_checks(base) for _, base in checked)
    assert not {pair: names for pair, names in checked.items() if names}
