"""Where replicas are."""

from collections.abc import Iterable

import pytest
from softprompt_gateway.discovery import Discovery, Places, look_up


def test_places_are_addresses_and_names() -> None:
    places = Places.parse("a:1,[::1]:2, unix:/run/x ,dns:///inference:2244")
    assert places.fixed == ("a:1", "[::1]:2", "unix:/run/x")
    assert places.names == (("inference", 2244),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be host:port"),
        ("a:1,,b:1", "must be host:port"),
        ("a:1,b:1,a:1", "names a place twice"),
        ("dns:///x", "must be dns:///name:port"),
        ("dns:///:1", "must be dns:///name:port"),
        ("dns:///x:0", "must be dns:///name:port"),
        ("dns:///x:65536", "must be dns:///name:port"),
        ("dns:///x:ab", "must be dns:///name:port"),
    ],
)
def test_what_is_no_place_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Places.parse(text)


async def test_a_name_is_looked_up() -> None:
    assert "127.0.0.1:5" in await look_up("localhost", 5)
    assert await look_up("::1", 5) == ["[::1]:5"]


async def test_a_name_has_the_addresses_of_its_last_look() -> None:
    answers: list[list[str] | OSError] = [["10.0.0.2:1", "10.0.0.1:1"], OSError("no DNS"), ["10.0.0.3:1"], []]

    async def ask(host: str, port: int) -> Iterable[str]:
        assert (host, port) == ("inference", 1)
        answer = answers.pop(0)
        if isinstance(answer, OSError):
            raise answer
        return answer

    discovery = Discovery(Places.parse("fixed:1,dns:///inference:1"), ask)
    assert discovery.may_change
    seen = []
    while answers:
        await discovery.refresh()
        seen.append(discovery.addresses)
    both = ["fixed:1", "10.0.0.1:1", "10.0.0.2:1"]
    assert seen == [both, both, ["fixed:1", "10.0.0.3:1"], ["fixed:1"]]


async def test_places_that_are_all_fixed_do_not_change() -> None:
    discovery = Discovery(Places.parse("b:1,a:1"))
    assert discovery.addresses == ["b:1", "a:1"]
    assert not discovery.may_change
