"""/tokenize and /detokenize."""

from typing import Any

import pytest


async def test_a_text_becomes_ids(stack: Any) -> None:
    response = await stack.post("/tokenize", model=stack.base, prompt="abc")
    assert response.json() == {
        "count": 3,
        "max_model_len": 512,
        "tokens": [97, 98, 99],
        "token_strs": None,
        "virtual_tokens": 0,
    }


async def test_a_conversation_becomes_ids(stack: Any) -> None:
    response = await stack.post("/tokenize", messages=[{"role": "user", "content": "ab"}], return_token_strs=True)
    assert response.json()["tokens"] == [97, 98]
    assert response.json()["token_strs"] == ["a", "b"]


async def test_an_adapters_virtual_tokens_are_counted_apart(stack: Any) -> None:
    await stack.registry.add("loud", virtual_tokens=8)
    response = await stack.post("/tokenize", model="loud", prompt="abc")
    assert (response.json()["count"], response.json()["virtual_tokens"]) == (3, 8)


async def test_ids_become_text(stack: Any) -> None:
    response = await stack.post("/detokenize", model=stack.base, tokens=[97, 98])
    assert response.json() == {"prompt": "ab"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {}, 400, "prompt"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, 400, "prompt"),
        ("/tokenize", {"messages": []}, 400, "messages"),
        ("/tokenize", {"prompt": "a", "nonsense": 1}, 400, "nonsense"),
        ("/tokenize", {"prompt": "a", "model": "nothing"}, 404, "model"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, 400, None),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": ["1"]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [True]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [2**70]}, 400, "tokens.0"),
        ("/detokenize", {"tokens": [999]}, 400, "tokens"),
    ],
)
async def test_bad_requests_are_refused(stack: Any, path: str, body: Any, status: int, param: str | None) -> None:
    response = await stack.post(path, **body)
    assert response.status_code == status
    assert response.json()["error"]["param"] == (param or "add_special_tokens")
