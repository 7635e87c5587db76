"""Keys and tenants of a running system, from the command line to the engine's pages."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

# Long enough to fill pages.
PROMPT = "The quick brown fox jumps over the lazy dog and " * 8


@pytest.fixture(scope="module")
def system(start_system: Callable[..., Any], adapters: dict[str, Path]) -> Any:
    return start_system("--prompt-adapters", f"first={adapters['first']}")


def create(system: Any, *flags: str) -> dict[str, Any]:
    done = system.cli("key", "create", "--json", *flags)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def client(system: Any, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system.url}/v1", api_key=key, max_retries=0, timeout=120)


def status(system: Any, key: str) -> int:
    return httpx.get(f"{system.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code


def cached_tokens(system: Any, key: str, **body: Any) -> int:
    with client(system, key) as one:
        answer = one.completions.create(
            **{"model": "tiny", "prompt": PROMPT, "max_tokens": 2, "temperature": 0, **body}
        )
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0


def test_keys_and_tenants_of_a_running_system(system: Any, adapters: dict[str, Path]) -> None:
    assert status(system, "none") == 200, "on this machine nobody is asked before the first key"

    admin = create(system, "--scopes", "admin")
    assert (status(system, "none"), status(system, admin["key"])) == (401, 200)

    acme, umbrella = (create(system, "--scopes", "infer", "--tenant", tenant) for tenant in ("acme", "umbrella"))
    assert system.cli("adapter", "add", "acme/first", str(adapters["second"])).returncode == 0
    listed = json.loads(system.cli("adapter", "ls", "--json").stdout)
    assert [info["name"] for info in listed] == ["first", "acme/first"]
    models = {}
    for key in (admin, acme, umbrella):
        with client(system, key["key"]) as one:
            models[key["tenant"]] = [model.id for model in one.models.list()]
    assert models == {"default": ["tiny", "first"], "acme": ["tiny", "first"], "umbrella": ["tiny"]}

    texts = []
    for key in (admin, acme):
        with client(system, key["key"]) as one:
            answer = one.completions.create(model="first", prompt="Hello", max_tokens=12, temperature=0)
        texts.append(answer.choices[0].text)
    assert texts[0] != texts[1], "each has its own adapter of this name"

    # Whoever asks first computes; only the same tenant with the same salt finds it computed.
    assert cached_tokens(system, acme["key"]) == 0
    assert cached_tokens(system, acme["key"]) > 0
    assert cached_tokens(system, umbrella["key"]) == 0
    assert cached_tokens(system, acme["key"], extra_body={"cache_salt": "s"}) == 0
    assert cached_tokens(system, acme["key"], extra_body={"cache_salt": "s"}) > 0

    told = system.cli("key", "ls")
    assert {key["id"] for key in (admin, acme, umbrella)} <= set(told.stdout.split())
    assert not any(key["key"] in told.stdout for key in (admin, acme, umbrella))
    completed = system.cli("complete", "Hello", "--max-tokens", "4", "--api-key", acme["key"])
    assert completed.returncode == 0, completed.stderr
    refused = system.cli("complete", "Hello")
    assert (refused.returncode, "API key is needed" in refused.stderr) == (1, True)
    loaded = system.cli("bench", "--base-url", system.url, "--num-prompts", "1")
    assert (loaded.returncode, "give it with --api-key" in " ".join(loaded.stderr.split())) == (1, True)

    assert system.cli("key", "revoke", acme["id"]).returncode == 0
    revoked_s = time.monotonic()
    while status(system, acme["key"]) != 401:
        assert time.monotonic() - revoked_s < 1
    unknown = system.cli("key", "revoke", acme["id"])
    assert (unknown.returncode, unknown.stderr.count("\n")) == (1, 1)


def test_the_command_that_a_start_shows_has_a_key_where_one_is_asked_for(system: Any, shared_system: Any) -> None:
    key = '-H "Authorization: Bearer $SOFTPROMPT_API_KEY"'
    assert [key in each.text() for each in (system, shared_system)] == [False, True]


def test_beyond_this_machine_it_does_not_start_without_keys(start_system: Callable[..., Any]) -> None:
    system = start_system("--host", "0.0.0.0", wait=False)
    assert system.process.wait(240) == 1
    assert "softprompt key create --scopes admin" in " ".join(system.text().split())
