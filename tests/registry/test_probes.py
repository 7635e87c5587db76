"""What was measured of a version, and what was noticed of it, is kept with it; over gRPC, with a real store."""

import asyncio

import numpy as np
import pytest
from safetensors.numpy import save
from softprompt_api.errors import AdapterConflict, AdapterNotFound, InvalidArgument
from softprompt_api.registry.v1 import registry_pb2 as pb

EFFECT = {"mean_kl": 0.25, "max_kl": 0.5, "num_flips": 1, "num_prompts": 8}


def probe(**changes: object) -> pb.Probe:
    return pb.Probe(effects=[pb.Effect(**{**EFFECT, **changes})], base_model_id="org/Tiny", dtype="float32")


async def record(client, adapter: str, digest: str, measured: pb.Probe) -> pb.AdapterVersion:
    request = pb.RecordProbeRequest(adapter=adapter, digest=digest, probe=measured)
    return (await client.answer(client.stub.RecordProbe(request, timeout=20))).adapter


async def test_a_probe_is_kept_with_its_version_alone(client, make_adapter):
    first = await client.register("tweets", make_adapter(1))
    await client.register("tweets", make_adapter(2))
    assert not first.HasField("probe")
    recorded = await record(client, "tweets@1", first.digest, probe())
    assert list(recorded.probe.effects) == list(probe().effects)
    assert (recorded.probe.base_model_id, recorded.probe.dtype) == ("org/Tiny", "float32")
    assert recorded.probe.probed_at.seconds > 0
    assert await client.get("tweets@1") == recorded
    assert recorded.revision > first.revision
    assert not (await client.get("tweets@2")).HasField("probe")


async def test_a_later_probe_takes_the_place_of_an_earlier_one(client, make_adapter):
    made = await client.register("tweets", make_adapter())
    await record(client, "tweets", made.digest, probe())
    later = await record(client, "tweets@latest", made.digest, probe(num_flips=3))
    assert [effect.num_flips for effect in later.probe.effects] == [3]
    assert await client.get("tweets") == later


async def test_a_probe_stays_while_labels_pins_and_aliases_change(client, make_adapter):
    made = await client.register("tweets", make_adapter())
    recorded = await record(client, "tweets", made.digest, probe(task=2))
    await client.update("tweets", "labels.team", labels={"team": "x"})
    await client.set_alias("tweets", "prod", 1)
    found = await client.get("tweets@prod")
    assert found.probe == recorded.probe
    assert found.probe.effects[0].task == 2


async def test_probes_and_changes_at_the_same_time_lose_nothing(client, make_adapter):
    made = await client.register("tweets", make_adapter())
    await asyncio.gather(
        record(client, "tweets", made.digest, probe()),
        *(client.update("tweets", f"labels.k{i}", labels={f"k{i}": "v"}) for i in range(8)),
    )
    found = await client.get("tweets")
    assert len(found.labels) == 8
    assert found.HasField("probe")


async def test_watchers_hear_of_a_probe(client, make_adapter):
    made = await client.register("tweets", make_adapter())
    cursor = (await client.stub.ListAdapters(pb.ListAdaptersRequest())).cursor
    recorded = await record(client, "tweets", made.digest, probe())
    call = client.stub.WatchAdapters(pb.WatchAdaptersRequest(cursor=cursor), timeout=20)
    [_, event] = [await call.read() for _ in range(2)]  # a heartbeat first
    call.cancel()
    assert event.type == pb.ADAPTER_EVENT_TYPE_UPDATED
    assert event.adapter == recorded


async def test_what_was_measured_of_other_content_is_refused(client, make_adapter):
    await client.register("tweets", make_adapter(1))
    other = await client.register("sms", make_adapter(2))
    with pytest.raises(AdapterConflict) as refused:
        await record(client, "tweets", other.digest, probe())
    assert refused.value.field == "digest"
    assert not (await client.get("tweets")).HasField("probe")


@pytest.mark.parametrize("adapter", ["sms", "tweets@9", "tweets@prod"])
async def test_a_version_that_is_not_there_is_not_found(client, make_adapter, adapter):
    made = await client.register("tweets", make_adapter())
    with pytest.raises(AdapterNotFound):
        await record(client, adapter, made.digest, probe())


async def test_a_digest_alone_does_not_say_which_version(client, make_adapter):
    made = await client.register("tweets", make_adapter())
    with pytest.raises(InvalidArgument, match="say name@version"):
        await record(client, made.digest, made.digest, probe())


@pytest.mark.parametrize(
    "measured",
    [
        pb.Probe(base_model_id="org/Tiny", dtype="float32"),
        pb.Probe(effects=[pb.Effect(**EFFECT)] * 17, base_model_id="org/Tiny", dtype="float32"),
        pb.Probe(effects=[pb.Effect(**EFFECT)], base_model_id="org/Tiny", dtype="int4"),
        probe(mean_kl=-0.1),
        probe(mean_kl=float("nan")),
        probe(max_kl=float("inf")),
        probe(mean_kl=1.0),
        probe(num_flips=9),
        probe(num_flips=-1),
        probe(num_flips=0, num_prompts=0),
        probe(task=-1),
    ],
)
async def test_numbers_that_no_measurement_gives_are_refused(client, make_adapter, measured):
    made = await client.register("tweets", make_adapter())
    with pytest.raises(InvalidArgument) as refused:
        await record(client, "tweets", made.digest, measured)
    assert refused.value.field.startswith("probe")


async def test_rows_far_from_the_vocabulary_are_told_of_and_stay_told(client, make_adapter):
    [known] = (await client.stub.ListBaseModels(pb.ListBaseModelsRequest())).base_models
    known.vocabulary_norms.CopyFrom(pb.Norms(low=0.5, median=1.0, high=1.5))
    await client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=known))
    rows = np.random.default_rng(0).standard_normal((5, 32), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    near, far = (save({"prompt_embeddings": factor * rows}, metadata={"format": "pt"}) for factor in (1, 20))
    config = make_adapter().config
    quiet = await client.register("near", make_adapter().but(config=config, tensors=near))
    assert list(quiet.warnings) == []
    assert quiet.row_norms.median == pytest.approx(1.0)
    assert quiet.base_model.vocabulary_norms == known.vocabulary_norms
    told = await client.register("far", make_adapter().but(config=config, tensors=far))
    [warning] = told.warnings
    assert "norms of 20 to 20 (median 20)" in warning
    assert (await client.get("far")).warnings == told.warnings


@pytest.mark.parametrize("norms", [(0, 0, 0), (2, 1, 3), (1, 1, float("inf")), (-1, 1, 1), (float("nan"), 1, 2)])
async def test_norms_that_no_vocabulary_has_are_refused(client, norms):
    [known] = (await client.stub.ListBaseModels(pb.ListBaseModelsRequest())).base_models
    known.vocabulary_norms.CopyFrom(pb.Norms(low=norms[0], median=norms[1], high=norms[2]))
    with pytest.raises(InvalidArgument) as refused:
        await client.answer(client.stub.PutBaseModel(pb.PutBaseModelRequest(base_model=known)))
    assert refused.value.field == "base_model.vocabulary_norms"
