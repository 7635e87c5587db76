"""The tree of errors: every leaf has a reason of its own."""

from softprompt_api import errors


def leaves(kind: type[errors.SoftpromptError] = errors.SoftpromptError) -> list[type[errors.SoftpromptError]]:
    """Every error but the base."""
    return [leaf for child in kind.__subclasses__() for leaf in (child, *leaves(child))]


def test_every_reason_is_unique_and_spelled_in_capitals():
    reasons = [leaf.reason for leaf in leaves()]
    assert len(set(reasons)) == len(reasons)
    assert all(reason.isupper() and reason.isascii() for reason in reasons)


def test_the_drawn_tree_names_every_error():
    assert errors.__doc__ is not None
    for leaf in leaves():
        assert leaf.__name__ in errors.__doc__


def test_an_error_keeps_message_field_and_details():
    error = errors.AdapterNotFound("no such adapter", field="model", details={"did_you_mean": "a"})
    assert str(error) == error.message == "no such adapter"
    assert (error.field, error.details) == ("model", {"did_you_mean": "a"})
