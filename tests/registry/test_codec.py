"""Records of versions: what was written comes back, and what was not is found out."""

from dataclasses import replace
from datetime import UTC, datetime

import pytest
from softprompt_api.errors import DataCorrupted
from softprompt_api.quality import Effect, Norms, Probe
from softprompt_registry.catalog import AdapterVersion, BaseModel
from softprompt_registry.codec import decode_version, encode_version

VERSION = AdapterVersion(
    name="tweets",
    version=3,
    id=7,
    digest="sha256:" + "0" * 64,
    kind="PROMPT_TUNING",
    num_virtual_tokens=5,
    hidden_size=8,
    dtype="F32",
    size_bytes=240,
    tensors_sha256="1" * 64,
    config_json='{"é": 1}',
    base_model=BaseModel(
        id="org/Tiny",
        architecture="LlamaForCausalLM",
        hidden_size=8,
        num_layers=2,
        num_kv_heads=2,
        head_dim=4,
        vocab_size=97,
        tokenizer_sha256="",
        max_virtual_tokens=0,
        dtype="float32",
        vocabulary_norms=Norms(low=1.0, median=1.5, high=2.0),
    ),
    labels={"team": "x"},
    row_norms=Norms(low=0.5, median=1.25, high=2.0),
    warnings=("trained on another", "é"),
    probe=Probe(
        effects=(Effect(task=1, mean_kl=0.25, max_kl=0.5, num_flips=1, num_prompts=8),),
        base_model_id="org/Tiny",
        dtype="float32",
        probed_at=datetime(2026, 2, 3, tzinfo=UTC),
    ),
    pinned=True,
    created_at=datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
)


def record(version: AdapterVersion = VERSION) -> dict[bytes, bytes]:
    """As the store gives it back."""
    return {key.encode(): value.encode() for key, value in encode_version(version).items()}


def test_a_version_comes_back_from_its_record():
    assert decode_version(record(), version_id=7) == VERSION
    unpinned = replace(VERSION, pinned=False, labels={}, probe=None, warnings=(), row_norms=None)
    assert decode_version(record(unpinned), version_id=7) == unpinned


def test_every_bit_of_a_record_counts():
    whole = record()
    for field, value in whole.items():
        for position in range(8 * len(value)):
            changed = bytearray(value)
            changed[position // 8] ^= 1 << position % 8
            with pytest.raises(DataCorrupted):
                decode_version({**whole, field: bytes(changed)}, version_id=7)


@pytest.mark.parametrize("field", sorted(record().keys() - {b"sha256"}))
def test_a_record_without_a_field_is_no_version(field):
    lacking = record()
    del lacking[field]
    with pytest.raises(DataCorrupted):
        decode_version(lacking, version_id=7)


def test_a_record_of_another_version_is_refused():
    with pytest.raises(DataCorrupted):
        decode_version(record(), version_id=8)


def test_a_record_from_before_records_had_a_sha256_is_read():
    bare = replace(VERSION, pinned=False, row_norms=None, warnings=(), probe=None)
    old = record(bare)
    for field in (b"sha256", b"pinned", b"row_norms", b"warnings", b"probe"):
        del old[field]
    assert decode_version(old, version_id=7) == bare
