"""Tenants over the real registry and a real store: each route with two keys, and neither tenant sees the other."""

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

import numpy as np
import openai
import pytest
from safetensors.numpy import save
from softprompt_api.access import Scope, scope_to
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_api.registry.v1.registry_pb2_grpc import KeyServiceStub, RegistryServiceStub
from softprompt_api.rpc.channel import open_channel

HIDDEN = 8
BASE = "acme/tiny-1"
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": HIDDEN}


@pytest.fixture
def gateway_settings(registry_address: str) -> dict[str, Any]:
    return {"registry_address": registry_address, "require_keys": True}


class Keys:
    """The real registry's keys."""

    def __init__(self, address: str) -> None:
        self.channel = open_channel(address)
        self.stub = KeyServiceStub(self.channel)
        self.registry = RegistryServiceStub(self.channel)

    async def make(self, tenant: str, *scopes: Scope, **fields: Any) -> tuple[str, str]:
        """A key and its id."""
        request = reg.CreateKeyRequest(tenant=tenant, scopes=map(scope_to, scopes or [Scope.ADMIN]), **fields)
        made = await self.stub.CreateKey(request)
        return made.key, made.api_key.id


@pytest.fixture
async def keys(registry_address: str) -> AsyncIterator[Keys]:
    keys = Keys(registry_address)
    yield keys
    await keys.channel.close()


class Tenant:
    """One tenant's key at the gateway."""

    def __init__(self, stack: Any, key: str) -> None:
        self._http = stack.http
        self._headers = {"authorization": f"Bearer {key}"}

    async def call(self, method: str, path: str, **body: Any) -> Any:
        return await self._http.request(method, path, json=body or None, headers=self._headers)

    async def register(self, name: str, seed: int = 0, **fields: Any) -> Any:
        rows = np.random.default_rng(seed).standard_normal((5, HIDDEN), dtype=np.float32)
        tensors = base64.b64encode(save({"prompt_embeddings": rows}, metadata={"format": "pt"})).decode()
        return await self.call("POST", "/v1/adapters", name=name, config=CONFIG, tensors_base64=tensors, **fields)

    async def models(self) -> list[str]:
        return [card["id"] for card in (await self.call("GET", "/v1/models")).json()["data"]]

    async def complete(self, model: str, **body: Any) -> Any:
        return await self.call("POST", "/v1/completions", model=model, prompt="hi", max_tokens=100, **body)


@pytest.fixture
async def tenants(stack: Any, keys: Keys) -> tuple[Tenant, Tenant, Tenant]:
    """The default tenant, acme and umbrella."""
    made = [await keys.make(tenant) for tenant in ("default", "acme", "umbrella")]
    plain, acme, umbrella = (Tenant(stack, key) for key, _ in made)
    return plain, acme, umbrella


async def test_one_name_is_another_adapter_for_each_tenant(stack: Any, tenants: Any) -> None:
    for seed, tenant in enumerate(tenants):
        made = await tenant.register("tweets", seed)
        assert made.status_code == 201, made.text
        assert (made.json()["name"], made.json()["version"], made.json()["model"]) == ("tweets", 1, "tweets@1")
    digests = set()
    for tenant in tenants:
        assert await tenant.models() == [stack.base, "tweets"]
        answer = await tenant.complete("tweets")
        assert answer.headers["x-softprompt-adapter"] == "tweets@1"
        digests.add(answer.headers["x-softprompt-adapter-digest"])
        assert "/" not in (await tenant.call("GET", "/v1/adapters")).json()["data"][0]["model"]
    assert len(digests) == 3


# What no tenant may find out of another's adapter "secret": each with the status for what does not exist.
PARTS = [{"type": "soft_prompt", "name": "{name}"}, {"type": "text", "text": "hi"}]
PROBES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/completions", {"model": "{name}", "prompt": "hi"}),
    ("POST", "/v1/chat/completions", {"model": "{name}", "messages": [{"role": "user", "content": "hi"}]}),
    ("POST", "/v1/responses", {"model": "{name}", "input": "hi"}),
    ("GET", "/v1/responses/{name}", {}),
    ("DELETE", "/v1/responses/{name}", {}),
    ("POST", "/v1/completions", {"model": "{name}+{name}", "prompt": "hi"}),
    ("POST", "/v1/completions", {"model": "{name}@1", "prompt": "hi", "stream": True}),
    ("POST", "/v1/completions", {"model": "{name}:0", "prompt": "hi"}),
    ("POST", "/v1/completions", {"model": BASE, "adapters": ["{name}"], "prompt": "hi"}),
    ("POST", "/v1/completions", {"model": BASE, "prompt": PARTS}),
    ("POST", "/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": PARTS}]}),
    ("POST", "/tokenize", {"model": "{name}", "prompt": "hi"}),
    ("POST", "/detokenize", {"model": "{name}", "tokens": [104]}),
    ("GET", "/v1/models/{name}", {}),
    ("GET", "/v1/models/{name}@1", {}),
    ("GET", "/v1/models/{name}@prod", {}),
    ("GET", "/v1/adapters/{name}", {}),
    ("GET", "/v1/adapters/{name}@1", {}),
    ("GET", "/v1/adapters/{name}@prod", {}),
    ("GET", "/v1/adapters/{name}/versions", {}),
    ("POST", "/v1/adapters/{name}/probe", {}),
    ("POST", "/v1/adapters/{name}@1/probe", {}),
    ("GET", "/v1/adapters/{name}/nearest-tokens", {}),
    ("GET", "/v1/adapters/{name}@1/nearest-tokens", {}),
    ("PATCH", "/v1/adapters/{name}", {"pinned": True}),
    ("PUT", "/v1/adapters/{name}/aliases/prod", {"version": 1}),
    ("DELETE", "/v1/adapters/{name}/aliases/prod", {}),
    ("DELETE", "/v1/adapters/{name}@1", {}),
    ("DELETE", "/v1/adapters/{name}", {}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "{name}"}),
    ("POST", "/v1/unload_prompt_adapter", {"prompt_adapter_name": "{name}"}),
]


def _named(value: Any, name: str) -> Any:
    match value:
        case str():
            return value.replace("{name}", name)
        case list():
            return [_named(one, name) for one in value]
        case dict():
            return {key: _named(one, name) for key, one in value.items()}
        case _:
            return value


async def test_every_route_that_takes_a_name_is_probed(stack: Any) -> None:
    document = (await stack.http.get("/openapi.json")).json()
    named = {
        (method.upper(), path.replace("{id_}", "{name}").replace("{adapter}", "{name}").replace("{alias}", "prod"))
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
        if "{" in path or "requestBody" in operation
    }
    # What makes a name tells nothing of others': the first test here registers one name for each tenant.
    makes = {("POST", "/v1/adapters"), ("POST", "/v1/adapters/{name}")}
    makes |= {("POST", "/v1/load_lora_adapter"), ("POST", "/v1/load_prompt_adapter")}
    assert named - makes == {(method, path) for method, path, _ in PROBES if "@" not in path}


async def test_what_is_anothers_and_what_is_nobodys_are_answered_alike(tenants: Any) -> None:
    plain, acme, umbrella = tenants
    for tenant in (plain, acme):
        await tenant.register("secret")
        await tenant.call("PUT", "/v1/adapters/secret/aliases/prod", version=1)
    for method, path, body in PROBES:
        answers = []
        for name in ("secret", "nobody"):
            fields = {key: _named(value, name) for key, value in body.items()}
            answer = await umbrella.call(method, _named(path, name), **fields)
            answers.append((answer.status_code, answer.text.replace(name, "NAME")))
        assert answers[0] == answers[1], (method, path, body)
        assert answers[0][0] == 404, (method, path, body, answers[0])
    for tenant in (plain, acme):
        assert (await tenant.complete("secret@prod")).status_code == 200


async def test_a_digest_is_good_for_its_owners_alone(tenants: Any) -> None:
    plain, acme, umbrella = tenants
    digest = (await plain.register("tweets", 1)).json()["digest"]
    assert (await acme.register("mine", 1)).json()["digest"] == digest, "the same content"
    await umbrella.register("other", 2)
    for tenant, name in ((plain, "tweets@1"), (acme, "mine@1")):
        answer = await tenant.complete(digest)
        assert (answer.status_code, answer.headers.get("x-softprompt-adapter")) == (200, name)
    unknown = "sha256:" + "0" * 64
    refused, missing = await umbrella.complete(digest), await umbrella.complete(unknown)
    assert refused.status_code == missing.status_code == 404
    assert _bare(refused) == _bare(missing)
    shown = [await umbrella.call("GET", f"/v1/adapters/{spelling}") for spelling in (digest, unknown)]
    assert [one.status_code for one in shown] == [404, 404]
    assert _bare(shown[0]) == _bare(shown[1])


def _bare(answer: Any) -> str:
    """An answer without the digest that it repeats, which may be cut."""
    return re.sub("sha256:[0-9a-f]+", "DIGEST", answer.text)


@pytest.mark.parametrize("spelling", ["acme/tweets", "default/tweets", "~acme/tweets", "acme/tweets@1"])
async def test_no_spelling_of_a_model_reaches_another_tenant(tenants: Any, spelling: str) -> None:
    plain, acme, umbrella = tenants
    for tenant in (plain, acme):
        await tenant.register("tweets")
    for tenant in (plain, umbrella):
        assert (await tenant.complete(spelling)).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("prefix", ["acme/", "~", "~acme/", "acme", "a/", "\x7f"])
async def test_no_prefix_lists_another_tenants_names(tenants: Any, prefix: str) -> None:
    plain, acme, umbrella = tenants
    await acme.register("tweets")
    for tenant in (plain, umbrella):
        answer = await tenant.call("GET", f"/v1/adapters?prefix={quote(prefix)}")
        assert answer.status_code in (200, 400)
        assert answer.json().get("data", []) == []


async def test_lists_and_totals_are_of_the_tenant(tenants: Any) -> None:
    plain, acme, umbrella = tenants
    for tenant, names in ((plain, ["a", "z"]), (acme, ["b", "m", "y"])):
        for name in names:
            await tenant.register(name)
    for tenant, names in ((plain, ["a", "z"]), (acme, ["b", "m", "y"]), (umbrella, [])):
        listed, token = [], ""
        while token is not None:
            page = (await tenant.call("GET", f"/v1/adapters?page_size=1&page_token={token}")).json()
            listed += [adapter["name"] for adapter in page["data"]]
            token = page["next_page_token"]
            assert page["total_size"] == len(names)
        assert listed == names


async def test_what_is_in_memory_is_listed_for_the_tenant_alone(stack: Any, keys: Keys, tenants: Any) -> None:
    stack.inference.resident = ("tweets@1", "acme/sms@2", "acme/tweets@3:0", "umbrella/mail@1")
    narrow = Tenant(stack, (await keys.make("acme", adapters=["tweets"]))[0])
    wanted = (["tweets@1"], ["sms@2", "tweets@3:0"], ["mail@1"], ["tweets@3:0"])
    for tenant, models in zip((*tenants, narrow), wanted, strict=True):
        listed = (await tenant.call("GET", "/v1/resident_adapters")).json()
        assert [one["model"] for one in listed["data"]] == models
        assert listed["total_size"] == len(models)
    cut = (await tenants[1].call("GET", "/v1/resident_adapters?limit=1")).json()
    assert ([one["model"] for one in cut["data"]], cut["total_size"]) == (["sms@2"], 2)


async def test_an_idempotency_key_is_the_tenants_own(tenants: Any) -> None:
    plain, acme, _ = tenants
    first = await plain.register("tweets", 1, idempotency_key="k")
    other = await acme.register("tweets", 2, idempotency_key="k")
    assert (first.status_code, other.status_code) == (201, 201)
    assert (await acme.register("tweets", 2, idempotency_key="k")).json()["version"] == 1


async def test_a_key_for_one_adapter_uses_it_and_the_base_model_alone(
    stack: Any, keys: Keys, tenants: Any
) -> None:
    _, acme, _ = tenants
    for name in ("tweets", "sms"):
        await acme.register(name, seed=len(name))
    digest = (await acme.call("GET", "/v1/adapters/sms")).json()["digest"]
    narrow = Tenant(stack, (await keys.make("acme", adapters=["tweets"]))[0])
    assert await narrow.models() == [stack.base, "tweets"]
    listed = (await narrow.call("GET", "/v1/adapters")).json()["data"]
    assert [adapter["name"] for adapter in listed] == ["tweets"]
    assert (await narrow.complete("tweets")).status_code == 200
    assert (await narrow.complete(stack.base)).status_code == 200
    for model in ("sms", "sms@1", "never"):
        answer = await narrow.complete(model)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "permission_denied"), model
    answer = await narrow.complete(digest)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert (await narrow.register("other")).status_code == 403
    assert (await narrow.call("DELETE", "/v1/adapters/sms")).status_code == 403


async def test_a_key_uses_its_own_adapter_by_a_digest_that_an_older_name_has_too(
    stack: Any, keys: Keys, tenants: Any
) -> None:
    _, acme, _ = tenants
    for name in ("older", "tweets"):
        digest = (await acme.register(name)).json()["digest"]
    narrow = Tenant(stack, (await keys.make("acme", adapters=["tweets"]))[0])
    answer = await narrow.complete(digest)
    assert (answer.status_code, answer.headers["x-softprompt-adapter"]) == (200, "tweets@1"), answer.text
    assert (await narrow.call("GET", f"/v1/adapters/{digest}")).json()["name"] == "tweets"


async def test_the_kv_of_tenants_is_kept_apart(stack: Any, tenants: Any) -> None:
    plain, acme, umbrella = tenants
    for tenant in (plain, acme, umbrella):
        await tenant.complete(stack.base)
        await tenant.complete(stack.base, cache_salt="s")
    salts = [request.cache_salt for request in stack.inference.requests]
    assert len(salts) == len(set(salts)) == 6
    await acme.complete(stack.base)
    assert stack.inference.requests[-1].cache_salt == salts[2]
    assert stack.inference.requests[-1].tenant == "acme"


async def test_a_revoked_key_is_refused_by_every_gateway(
    stack: Any, keys: Keys, tenants: Any, running_stack: Any, registry_address: str
) -> None:
    key, id_ = await keys.make("acme")
    async with running_stack(registry_address=registry_address, require_keys=True) as other:
        gateways = [Tenant(one, key) for one in (stack, other)]
        for gateway in gateways:
            assert (await gateway.call("GET", "/v1/models")).status_code == 200
        await keys.stub.RevokeKey(reg.RevokeKeyRequest(id=id_))
        async with asyncio.timeout(1):
            for gateway in gateways:
                while (await gateway.call("GET", "/v1/models")).status_code != 401:
                    pass


async def test_a_key_works_while_the_store_is_away(stack: Any, store: Any, tenants: Any) -> None:
    _, acme, _ = tenants
    await acme.register("tweets")
    assert (await acme.complete("tweets")).status_code == 200
    await store.kill()
    assert (await acme.complete("tweets")).status_code == 200
    assert (await acme.register("more")).status_code == 503
    unknown = Tenant(stack, "sk-sp-unknown")
    assert (await unknown.call("GET", "/v1/models")).status_code == 503
    await store.start()
    async with asyncio.timeout(20):
        while (await unknown.call("GET", "/v1/models")).status_code != 401:
            pass


async def test_openais_own_client_sees_its_tenant(stack: Any, keys: Keys, tenants: Any) -> None:
    _, acme, umbrella = tenants
    await acme.register("tweets")
    await umbrella.register("sms")
    key, _ = await keys.make("acme", Scope.INFER)
    async with stack.sdk(api_key=key) as client:
        assert [model.id async for model in client.models.list()] == [stack.base, "tweets"]
        answer = await client.completions.create(model="tweets", prompt="hi", max_tokens=100)
        assert (answer.model, answer.choices[0].text) == ("tweets", "HI")
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("sms")


async def test_the_registry_shows_admins_all_tenants(keys: Keys, tenants: Any) -> None:
    for tenant in tenants:
        await tenant.register("tweets")
    everything = await keys.registry.ListAdapters(reg.ListAdaptersRequest(all_tenants=True))
    assert [version.name for version in everything.adapters] == ["tweets", "acme/tweets", "umbrella/tweets"]
    assert everything.total_size == 3
