"""Each tenant's namespace, over gRPC with a real store."""

import pytest
from softprompt_api.errors import AdapterInUse, AdapterNotFound, AliasMoved, InvalidArgument
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_registry import catalog


@pytest.fixture
async def tweets(client, make_adapter):
    """ "tweets" of three tenants, with one version, two and three."""
    for number, name in enumerate(["tweets", "acme/tweets", "umbrella/tweets"]):
        for seed in range(number + 1):
            await client.register(name, make_adapter(10 * number + seed))


async def test_names_of_tenants_have_versions_and_aliases_of_their_own(client, tweets):
    assert [(await client.get(name)).version for name in ("tweets", "acme/tweets", "umbrella/tweets")] == [1, 2, 3]
    await client.set_alias("acme/tweets", "prod", 1)
    assert (await client.get("acme/tweets@prod")).name == "acme/tweets"
    with pytest.raises(AdapterNotFound):
        await client.get("umbrella/tweets@prod")
    await client.delete("acme/tweets")
    assert await client.versions("tweets") == [1]
    assert await client.versions("umbrella/tweets") == [3, 2, 1]


async def test_a_list_is_of_one_tenant_or_of_all(client, tweets, make_adapter):
    await client.register("acme.x", make_adapter(99))  # begins like a tenant's
    assert await client.names() == ["acme.x", "tweets"]
    assert await client.names(name_prefix="acme") == ["acme.x"]
    assert await client.names(name_prefix="acme/") == ["acme/tweets"]
    assert await client.names(name_prefix="acme/tw") == ["acme/tweets"]
    assert await client.names(name_prefix="acme/x") == []
    assert await client.names(all_tenants=True) == ["acme.x", "tweets", "acme/tweets", "umbrella/tweets"]
    for query in ({"name_prefix": "~"}, {"name_prefix": "~acme/"}, {"name_prefix": "a", "all_tenants": True}):
        with pytest.raises(InvalidArgument):
            await client.names(**query)


async def test_a_mistyped_name_is_compared_as_its_tenant_calls_it(client, make_adapter):
    await client.register("umbrella-corporation/abc", make_adapter())
    with pytest.raises(AdapterNotFound) as missing:
        await client.get("umbrella-corporation/abd")
    assert missing.value.details == {"did_you_mean": "abc"}


async def test_pages_go_through_a_tenants_names_alone(client, make_adapter):
    for seed, name in enumerate(["a", "acme/a", "acme/b", "acme/c", "b", "umbrella/a"]):
        await client.register(name, make_adapter(seed))
    for prefix, names in (("", ["a", "b"]), ("acme/", ["acme/a", "acme/b", "acme/c"])):
        listed, token = [], ""
        while True:
            query = pb.ListAdaptersRequest(name_prefix=prefix, page_size=1, page_token=token)
            page = await client.answer(client.stub.ListAdapters(query))
            listed += [adapter.name for adapter in page.adapters]
            assert page.total_size == len(names)
            token = page.next_page_token
            if not token:
                break
        assert listed == names
    await client.delete("acme/b")
    assert await client.names(name_prefix="acme/") == ["acme/a", "acme/c"]


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("after", ["0", "acme/", "acme/a", "umbrella", "zeta/a"])
async def test_a_forged_page_token_leads_to_no_other_tenants_names(client, make_adapter, after, descending):
    for seed, name in enumerate(["a", "acme/a", "umbrella/a", "zeta/a"]):
        await client.register(name, make_adapter(seed))
    positions = [("umbrella/", after), ("", "acme/"), ("", "zeta/a"), ("", "~z"), ("", "\x7f"), ("u", "~")]
    for prefix, position in positions:
        forged = catalog.page_token(f"adapters {prefix} [] {descending}", position)
        with pytest.raises(InvalidArgument) as refused:
            await client.names(name_prefix=prefix, page_token=forged, descending=descending)
        assert refused.value.field == "page_token"


async def test_a_digest_stands_for_its_owners_version(client, make_adapter):
    made = [await client.register(name, make_adapter(1)) for name in ("a", "acme/b")]
    digest = made[0].digest
    assert made[1].digest == digest
    assert (await client.get(digest)).name == "a"
    assert (await client.get(f"default/{digest}")).name == "a"
    assert (await client.get(f"acme/{digest}")).name == "acme/b"
    with pytest.raises(AdapterNotFound):
        await client.get(f"umbrella/{digest}")
    await client.delete("a")
    with pytest.raises(AdapterNotFound):
        await client.get(f"default/{digest}")
    assert (await client.get(digest)).name == "acme/b"


async def test_an_error_tells_names_as_the_tenant_knows_them_and_no_others(client, tweets):
    for spelling, message in (
        ("other/tweets", "there is no adapter 'tweets'"),
        ("acme/tweet", "there is no adapter 'tweet'; did you mean 'tweets'?"),
        ("acme/tweets@9", "tweets has no version 9; tweets alone stands for version 2"),
        ("acme/tweets@prod", "tweets has no alias 'prod'; tweets alone stands for version 2"),
    ):
        with pytest.raises(AdapterNotFound) as missing:
            await client.get(spelling)
        assert missing.value.message == message
        assert "/" not in repr(missing.value.details)
    await client.update("acme/tweets@1", "pinned", pinned=True)
    with pytest.raises(AdapterInUse, match=r"^tweets@1 is pinned"):
        await client.delete("acme/tweets", 1)
    with pytest.raises(AliasMoved, match="the alias prod of tweets does not exist"):
        await client.set_alias("acme/tweets", "prod", 1, expected=2)


@pytest.mark.parametrize("name", ["default/tweets", "A/tweets", "a/b/tweets", "/tweets", "acme/", "acme/latest"])
async def test_what_is_no_full_name_is_refused(client, make_adapter, name):
    with pytest.raises(InvalidArgument):
        await client.register(name, make_adapter())


async def test_an_idempotency_key_is_the_tenants_own(client, make_adapter):
    first, second = (make_adapter(seed).but(header={"idempotency_key": "k"}) for seed in (1, 2))
    assert (await client.register("tweets", first)).version == 1
    assert (await client.register("acme/tweets", second)).version == 1
    assert (await client.register("acme/tweets", second)).version == 1
