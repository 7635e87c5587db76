"""Tenants on a running system (P9): nobody learns from a cache what another has asked for.

What routes tell is in gateway/test_tenants.py: every route with two keys, over the real registry.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from softprompt.adapter_files import find_adapter
from softprompt.registry import RegistryClient
from softprompt_api.tenants import full_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# Long enough to fill pages.
PROMPT = "A secret that is long enough to fill more than one page of keys and values. " * 4


class Tenant:
    """A tenant's admin."""

    def __init__(self, system: Any, tenant: str) -> None:
        self._system = system
        self.http = httpx.Client(base_url=system.url, headers=system.make_key(tenant), timeout=60)

    def cached(self, model: str, **fields: Any) -> tuple[int, int]:
        """Tokens that a completion found computed: as the tenant is told, and as the engine counts them."""
        before = self._system.load().cached_prompt_tokens
        body = {"model": model, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, **fields}
        answer = self.http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        told = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        return told, self._system.load().cached_prompt_tokens - before


@pytest.fixture
def tenants(shared_system: Any) -> Iterator[dict[str, Tenant]]:
    with ExitStack() as stack:
        made = {name: Tenant(shared_system, name) for name in ("default", "acme", "umbrella")}
        for tenant in made.values():
            stack.enter_context(tenant.http)
        yield made


def test_what_one_tenant_has_computed_no_other_finds(
    shared_system: Any, tenants: dict[str, Tenant], make_adapter: Callable[..., Path]
) -> None:
    folders = {
        "soft": make_adapter(11, 40),
        "keys": make_adapter(12, 40, "prefix_tuning"),
        "lora": make_adapter(13, kind="lora"),
    }
    for name, folder in folders.items():
        digests = set()
        # Past the gateway, which would have them measured beside what is counted here.
        with RegistryClient(shared_system.registry) as registry:
            for tenant in tenants:
                info, _ = registry.ensure(full_name(tenant, name), find_adapter(str(folder)))
                digests.add(info.digest)
        assert len(digests) == 1, "the same content"
    for model in ("tiny", *folders, "soft+lora"):
        for tenant in tenants.values():
            assert tenant.cached(model) == (0, 0), model
        # Each finds its own, but not under another salt.
        for tenant in tenants.values():
            assert min(tenant.cached(model)) > 0, model
            assert tenant.cached(model, cache_salt="s") == (0, 0), model
    for tenant in tenants.values():
        for name in folders:
            assert tenant.http.delete(f"/v1/adapters/{name}").status_code == 200
