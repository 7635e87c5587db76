"""Pages of a list: everything on them once, and none too large for a message."""

from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st
from softprompt_api.access import Scope
from softprompt_api.quality import Effect, Norms, Probe
from softprompt_registry.amendments import MAX_ALIASES
from softprompt_registry.api_keys import MAX_ADAPTERS, ApiKey
from softprompt_registry.catalog import MAX_LABELS, AdapterVersion, BaseModel
from softprompt_registry.convert import key_to, version_to
from softprompt_registry.pages import MAX_PAGE_BYTES, message_bytes, read_page

NOW = datetime(2026, 7, 1, tzinfo=UTC)
NORMS = Norms(low=0.1, median=0.2, high=0.3)
BASE = BaseModel(
    id="org/Tiny", architecture="LlamaForCausalLM", hidden_size=32, num_layers=2, num_kv_heads=2, head_dim=8,
    vocab_size=97, tokenizer_sha256="0" * 64, max_virtual_tokens=0, dtype="bfloat16", vocabulary_norms=NORMS,
)  # fmt: skip
VERSION = AdapterVersion(
    name="tweets", version=1, id=2**40, digest="sha256:" + "0" * 64, kind="LORA", num_virtual_tokens=0,
    hidden_size=0, dtype="F32", size_bytes=2**31, tensors_sha256="0" * 64, config_json="{}", base_model=BASE,
    labels={}, row_norms=NORMS, created_at=NOW,
)  # fmt: skip
KEY = ApiKey(tenant="acme", scopes=tuple(Scope), sha256="0" * 64, created_at=NOW, expires_at=NOW)


@given(character=st.characters(exclude_categories=["Cs"]))
def test_an_item_takes_no_more_in_a_message_than_it_is_counted(character):
    probe = Probe(
        base_model_id="org/Tiny", dtype="float32", probed_at=NOW,
        effects=(Effect(task=1, mean_kl=0.1, max_kl=0.2, num_flips=1, num_prompts=8),) * 64,
    )  # fmt: skip
    labels = {str(number) + 62 * character: 256 * character for number in range(MAX_LABELS)}
    for item in (
        VERSION,
        replace(VERSION, config_json=1000 * character),
        replace(VERSION, labels=labels),
        replace(VERSION, aliases=("a" * 128,) * MAX_ALIASES),
        replace(VERSION, warnings=(100 * character,) * 2, probe=probe),
        replace(VERSION, base_model=replace(BASE, architecture=1000 * character)),
    ):
        assert version_to(item).ByteSize() <= message_bytes(item)
    for key in (KEY, replace(KEY, adapters=("a" * 128,) * MAX_ADAPTERS, name=128 * character)):
        assert key_to(key).ByteSize() <= message_bytes(key)


@given(
    sizes=st.lists(st.sampled_from([None, 1, 200_000, 1_500_000]), max_size=60),
    page_size=st.sampled_from([1, 7, 16, 17, 1000]),
)
async def test_every_item_is_on_one_page_whatever_their_sizes(sizes, page_size):
    texts = [None if size is None else f"{number:02}" + size * "x" for number, size in enumerate(sizes)]

    async def fetch(after, limit):
        start = int(after) + 1 if after else 0
        return [(str(start + place), text) for place, text in enumerate(texts[start : start + limit])]

    listed, token = [], ""
    while True:
        page = await read_page(fetch, query="texts", size=page_size, token=token)
        listed += page.items
        assert len(page.items) <= page_size
        assert sum(map(len, page.items[:-1])) < MAX_PAGE_BYTES
        token = page.next_token
        if not token:
            break
        assert page.items
    assert listed == [text for text in texts if text is not None]


async def test_of_a_sparse_list_a_bounded_number_of_items_is_looked_at_for_a_page():
    fetched: list[int] = []

    async def fetch(after: str, limit: int):
        first = int(after or 0) + 1
        fetched.append(limit)
        return [(str(n), n if n % 1500 == 0 else None) for n in range(first, min(first + limit, 4001))]

    found, token = [], ""
    while True:
        fetched.clear()
        page = await read_page(fetch, query="q", size=1, token=token, is_sparse=True)
        assert sum(fetched) < 1300
        assert len(fetched) < 30
        found.append(list(page.items))
        token = page.next_token
        if not token:
            break
    assert [item for items in found for item in items] == [1500, 3000]
    assert [] in found
