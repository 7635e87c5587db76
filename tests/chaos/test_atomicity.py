"""A registration happens once or not at all, wherever its link is cut, and asking again finishes it."""

import random
from typing import Any

import grpc
import pytest
from softprompt_api.errors import AdapterNotFound

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("cuts", [16, pytest.param(1000, marks=pytest.mark.chaos)])
async def test_a_registration_whose_link_was_cut_anywhere_is_made_once_by_asking_again(
    make_store: Any,
    serve: Any,
    connect: Any,
    look_into: Any,
    tcp_link: Any,
    adapter: Any,
    eventually: Any,
    cuts: int,
) -> None:
    rng = random.Random(cuts)
    store = make_store()
    server = await serve(store.url)
    client, look = connect(f"127.0.0.1:{server.port}"), look_into(store)
    await client.put_base_model()
    files = adapter(1, num_virtual_tokens=50_000)  # 1.6 MB
    made_unseen = 0
    for number in range(cuts):
        name, key = f"a{number}", f"key{number}"
        # Half of them on the way there, half of them on the way back: done, and the answer lost.
        up = rng.randrange(10, len(files.tensors)) if number % 2 else None
        down = None if number % 2 else rng.randrange(10, 400)
        async with tcp_link(server.port, cut_up_at=up, cut_down_at=down) as (port, _):
            cut = connect(f"127.0.0.1:{port}")
            with pytest.raises(grpc.RpcError):
                await cut.stub.RegisterAdapter(files.requests(name, idempotency_key=key), timeout=20)
        try:
            before = (await client.get(name)).version
        except AdapterNotFound:
            before = 0
        made_unseen += before
        made = await client.register(name, files, idempotency_key=key)
        assert made.version == 1
        assert list(await client.versions(name)) == [1]
        assert await client.register(name, files, idempotency_key=key) == made
    assert await client.read(made.digest) == files.tensors
    assert made_unseen, "no answer was lost after its registration; the test proves only half"

    async def is_clean() -> bool:
        return not await look.keys("*:u:*")

    await eventually(is_clean)
    blob = await look.hget(f"sp:{{blob:{made.tensors_sha256}}}:m", "num_versions")
    assert int(blob) == cuts
