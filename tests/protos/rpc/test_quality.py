"""Norms and probes travel whole."""

from datetime import UTC, datetime

from softprompt_api.quality import Effect, Norms, Probe
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.rpc.quality import norms_from, norms_to, probe_of, probe_to, warnings_of

NORMS = Norms(low=0.5, median=1.0, high=2.0)
PROBE = Probe(
    effects=(
        Effect(task=0, mean_kl=0.25, max_kl=0.5, num_flips=1, num_prompts=8),
        Effect(task=1, mean_kl=0.0, max_kl=0.0, num_flips=0, num_prompts=8),
    ),
    base_model_id="org/Tiny",
    dtype="bfloat16",
    probed_at=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
)


def test_norms_come_back_from_their_message() -> None:
    assert norms_from(pb.BaseModel(vocabulary_norms=norms_to(NORMS))) == NORMS
    assert norms_from(pb.AdapterVersion(row_norms=norms_to(NORMS))) == NORMS


def test_a_probe_comes_back_from_its_message() -> None:
    assert probe_of(pb.AdapterVersion(probe=probe_to(PROBE))) == PROBE


def test_what_is_not_told_stays_so() -> None:
    assert norms_to(None) is None
    assert probe_to(None) is None
    assert norms_from(pb.BaseModel()) is None
    assert norms_from(pb.AdapterVersion()) is None
    assert probe_of(pb.AdapterVersion()) is None


def test_the_warnings_of_a_version_are_those_of_its_registration_and_of_its_probe() -> None:
    version = pb.AdapterVersion(warnings=["trained on another"], probe=probe_to(PROBE))
    first, second = warnings_of(version)
    assert first == "trained on another"
    assert second.startswith("task 1 changes next to nothing")
