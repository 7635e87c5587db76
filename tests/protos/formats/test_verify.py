"""Tensor files: real ones pass in any pieces, hostile ones are refused by name, in constant memory."""

import hashlib
import io
import json
import pickle
import re
import struct
import tracemalloc
import zipfile
from contextlib import suppress
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import save
from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import (
    AdapterVerifier,
    ModelShape,
    adapter_digest,
    parse_config,
    read_adapter,
    read_folder,
)

NUM_ROWS, HIDDEN = 5, 8
SPEC = parse_config(
    json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": NUM_ROWS, "token_dim": HIDDEN})
)
ROWS = np.arange(1, NUM_ROWS * HIDDEN + 1, dtype=np.float32).reshape(NUM_ROWS, HIDDEN)


def file_of(rows: np.ndarray = ROWS) -> bytes:
    return save({"prompt_embeddings": rows})


def raw_file(header: object, data: bytes = ROWS.tobytes()) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str = "F32", shape: object = (NUM_ROWS, HIDDEN), offsets: object = (0, ROWS.nbytes)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def verify(data: bytes, *, piece_bytes: int = 1000, **expected: object):
    """What is verified; whether norms are measured beside it changes nothing else."""
    shape = {field.name: expected.pop(field.name) for field in fields(ModelShape) if field.name in expected}

    def feed_all(*, with_norms: bool):
        options = {"size_bytes": len(data), **expected, "model": ModelShape(**shape), "with_norms": with_norms}
        verifier = AdapterVerifier(SPEC, **options)
        for start in range(0, len(data), piece_bytes):
            verifier.feed(data[start : start + piece_bytes])
        return verifier.finish()

    try:
        verified = feed_all(with_norms=False)
    except AdapterInvalid as error:
        with pytest.raises(AdapterInvalid, match=f"^{re.escape(error.message)}$"):
            feed_all(with_norms=True)
        raise
    assert verified == replace(feed_all(with_norms=True), row_norms=None)
    return verified


@pytest.mark.parametrize(
    "name", ["prompt tuning", "prompt tuning from text", "p-tuning, MLP", "p-tuning, LSTM", "CPT"]
)
def test_what_peft_saves_is_verified_and_read_back_exactly(peft_folders, name):
    files = read_folder(peft_folders[name])
    spec, data = parse_config(files.config_json), files.tensors_path.read_bytes()
    model = ModelShape(hidden_size=32, max_virtual_tokens=5, dtype="bfloat16")
    verifier = AdapterVerifier(spec, size_bytes=len(data), model=model)
    verifier.feed(data)
    verified = verifier.finish()
    assert verified.tensor_dtype == "F32"
    assert verified.sha256 == hashlib.sha256(data).hexdigest()
    assert verified.digest == adapter_digest(spec, verified.sha256)
    rows = read_adapter(spec, data)
    with safe_open(files.tensors_path, "np") as opened:
        assert list(opened.keys()) == ["prompt_embeddings"]
        assert rows.data == opened.get_tensor("prompt_embeddings").tobytes()
    assert (rows.dtype, rows.num_virtual_tokens, rows.row_size) == (
        "float32",
        spec.num_virtual_tokens,
        spec.hidden_size,
    )


@given(pieces=st.lists(st.integers(1, 400), min_size=1, max_size=300))
@settings(max_examples=50, deadline=None)
def test_the_pieces_do_not_matter(pieces):
    for data in (file_of(), file_of(ROWS.astype(np.float16))):
        verifier, position = AdapterVerifier(SPEC, size_bytes=len(data)), 0
        for size in pieces:
            verifier.feed(memoryview(data)[position : position + size])
            position += size
        verifier.feed(data[position:])
        assert verifier.finish() == verify(data)


def test_the_digest_names_config_and_tensors():
    other = parse_config(json.dumps({"peft_type": "CPT", "num_virtual_tokens": NUM_ROWS, "token_dim": HIDDEN}))
    digests = {adapter_digest(spec, sha) for spec in (SPEC, other) for sha in ("0" * 64, "1" * 64)}
    assert len(digests) == 4
    assert all(digest.startswith("sha256:") and len(digest) == 71 for digest in digests)


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16")]
)
def test_every_float_dtype_is_read(dtype, name):
    from safetensors.torch import save as save_torch

    data = save_torch({"prompt_embeddings": torch.from_numpy(ROWS).to(dtype)})
    assert verify(data, piece_bytes=3).size_bytes == len(data)
    rows = read_adapter(SPEC, data)
    assert rows.dtype == name
    read = torch.frombuffer(bytearray(rows.data), dtype=dtype).reshape(NUM_ROWS, HIDDEN)
    assert torch.equal(read.float(), torch.from_numpy(ROWS))


def zip_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"prompt_embeddings": torch.from_numpy(ROWS)}, buffer)
    return buffer.getvalue()


def legacy_torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"prompt_embeddings": torch.from_numpy(ROWS)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def npz_file() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", "y" * 100)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (zip_file(), "zip or torch"),
        (npz_file(), "zip or torch"),
        (legacy_torch_file(), "pickle or torch"),
        *((pickle.dumps({"a": list(range(100))}, protocol), "pickle or torch") for protocol in (2, 3, 4, 5)),
        (pickle.dumps(1, 4)[:6], "pickle or torch"),
        (b"GGUF" + bytes(100), "GGUF"),
        (b"\x93NUMPY" + bytes(100), "numpy"),
        (b"\x1f\x8b\x08\x00" + b"\x01" * 100, "gzip"),
        (b'{"prompt_embeddings": [1, 2, 3]}', "JSON"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs"),
    ],
    ids=range(14),
)
def test_other_files_are_called_by_their_name(data, what):
    with pytest.raises(AdapterInvalid, match=what) as refused:
        verify(data)
    assert refused.value.field == "tensors"


ROW_BYTES = HIDDEN * 4
HOSTILE = {
    "empty": (b"", "tensors"),
    "seven bytes": (bytes(7), "tensors"),
    "header length 0": (raw_file(b""), "tensors"),
    "header longer than the file": (struct.pack("<Q", 10_000) + bytes(100), "tensors"),
    "header length of 2**63": (struct.pack("<Q", 2**63) + bytes(100), "tensors"),
    "header above 1 MB": (raw_file(b"{" + b" " * 1_000_000 + b"}"), "tensors"),
    "header not JSON": (raw_file(b"{'a': 1}"), "tensors"),
    "header not UTF-8": (raw_file(b'{"\xff": 1}'), "tensors"),
    "header a list": (raw_file([]), "tensors"),
    "header with leading blank": (raw_file(b" " + json.dumps({"prompt_embeddings": entry()}).encode()), "tensors"),
    "header nested deeply": (raw_file(b'{"a":' * 100_000), "tensors"),
    "metadata a number": (raw_file({"__metadata__": {"a": 1}, "prompt_embeddings": entry()}), "tensors"),
    "duplicate tensor": (
        raw_file(b'{"prompt_embeddings":%b,"prompt_embeddings":%b}' % ((json.dumps(entry()).encode(),) * 2)),
        "tensors",
    ),
    "too many tensors": (
        raw_file({f"t{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(4097)}),
        "tensors",
    ),
    "no entry": (raw_file({"prompt_embeddings": None}), "tensors.prompt_embeddings"),
    "a key too many": (raw_file({"prompt_embeddings": {**entry(), "x": 1}}), "tensors.prompt_embeddings"),
    "unknown dtype": (raw_file({"prompt_embeddings": entry("F31")}), "tensors.prompt_embeddings"),
    "dtype a list": (raw_file({"prompt_embeddings": entry([])}), "tensors.prompt_embeddings"),
    "shape of floats": (raw_file({"prompt_embeddings": entry(shape=[5.0, 8])}), "tensors.prompt_embeddings"),
    "shape of bools": (raw_file({"prompt_embeddings": entry(shape=[True, 40])}), "tensors.prompt_embeddings"),
    "negative shape": (raw_file({"prompt_embeddings": entry(shape=[-5, -8])}), "tensors.prompt_embeddings"),
    "shape beyond 64 bits": (
        raw_file({"prompt_embeddings": entry(shape=[2**40] * 8)}),
        "tensors.prompt_embeddings",
    ),
    "a hundred dimensions": (raw_file({"prompt_embeddings": entry(shape=[1] * 100)}), "tensors.prompt_embeddings"),
    "offsets backwards": (raw_file({"prompt_embeddings": entry(offsets=[160, 0])}), "tensors.prompt_embeddings"),
    "three offsets": (raw_file({"prompt_embeddings": entry(offsets=[0, 160, 160])}), "tensors.prompt_embeddings"),
    "offsets that lie": (raw_file({"prompt_embeddings": entry(offsets=[0, 80])}), "tensors.prompt_embeddings"),
    "hole at the start": (
        raw_file({"prompt_embeddings": entry(offsets=[4, 164])}, bytes(4) + ROWS.tobytes()),
        "tensors.prompt_embeddings",
    ),
    "bytes behind the last tensor": (raw_file({"prompt_embeddings": entry()}, ROWS.tobytes() + b"x"), "tensors"),
    "tensor beyond the file": (raw_file({"prompt_embeddings": entry()}, ROWS.tobytes()[:-4]), "tensors"),
    "overlapping tensors": (
        raw_file({"prompt_embeddings": entry(), "z": entry(shape=[8], offsets=[128, 160])}),
        "tensors.z",
    ),
    "twice the same bytes": (
        raw_file({"prompt_embeddings": entry(), "z": entry()}),
        "tensors.z",
    ),
    "no tensor": (raw_file({}, b""), "tensors.prompt_embeddings"),
    "another tensor": (save({"prompt_embedding": ROWS}), "tensors.prompt_embedding"),
    "another tensor beside": (save({"prompt_embeddings": ROWS, "a": ROWS}), "tensors.a"),
    "multitask tensors": (
        save({"prompt_embeddings": ROWS, "prefix_task_rows": ROWS}),
        "tensors.prefix_task_rows",
    ),
    "a row too few": (file_of(ROWS[:4]), "tensors.prompt_embeddings"),
    "transposed": (file_of(np.ascontiguousarray(ROWS.T)), "tensors.prompt_embeddings"),
    "two submodules' rows": (file_of(np.concatenate([ROWS, ROWS])), "tensors.prompt_embeddings"),
    "flat": (file_of(ROWS.reshape(-1)), "tensors.prompt_embeddings"),
    **{
        f"dtype {dtype.__name__}": (file_of(ROWS.astype(dtype)), "tensors.prompt_embeddings")
        for dtype in (np.int8, np.uint8, np.int32, np.int64, np.float64, np.bool_)
    },
    "all zeros": (file_of(ROWS * 0), "tensors.prompt_embeddings"),
    "all minus zeros": (file_of(ROWS * -0.0), "tensors.prompt_embeddings"),
}


@pytest.mark.parametrize(("data", "field"), HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("piece_bytes", [1, 10**9])
def test_hostile_files_are_refused_naming_the_tensor(data, field, piece_bytes):
    if piece_bytes == 1 and len(data) > 50_000:
        piece_bytes = 1000
    with pytest.raises(AdapterInvalid) as refused:
        verify(data, piece_bytes=piece_bytes)
    assert refused.value.field == field
    assert len(refused.value.message) < 300


def with_value(value: float, dtype: type = np.float32) -> bytes:
    rows = ROWS.astype(dtype)
    rows[3, 2] = value
    return file_of(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("piece_bytes", [1, 7, 1000])
def test_a_value_that_is_no_number_is_refused_with_its_place(value, dtype, piece_bytes):
    with pytest.raises(AdapterInvalid, match="row 3, column 2"):
        verify(with_value(value, dtype), piece_bytes=piece_bytes)


@pytest.mark.parametrize(("dtype", "bits"), [(np.float32, 0x7F80_0001), (np.float16, 0x7C01)])
def test_a_signalling_nan_is_refused_as_any_other(dtype, bits):
    rows = ROWS.astype(dtype)
    rows.view(f"u{rows.itemsize}")[3, 2] = bits
    with pytest.raises(AdapterInvalid, match="has nan at row 3, column 2"):
        verify(file_of(rows))


@pytest.mark.parametrize(
    ("value", "serving_dtype"),
    [(65_504.0, "float16"), (3.3895e38, "bfloat16"), (3.4e38, "float32"), (-65_519.0, "float16"), (3.4e38, "")],
)
def test_large_values_that_the_serving_dtype_can_hold_pass(value, serving_dtype):
    verify(with_value(value), dtype=serving_dtype)


@pytest.mark.parametrize(
    ("value", "serving_dtype"), [(65_520.0, "float16"), (-1e6, "float16"), (3.397e38, "bfloat16")]
)
def test_values_that_the_serving_dtype_cannot_hold_are_refused(value, serving_dtype):
    with pytest.raises(AdapterInvalid, match=f"infinite in {serving_dtype}"):
        verify(with_value(value), dtype=serving_dtype)


@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_the_limits_are_those_of_torchs_own_cast(name, value):
    rows = np.full_like(ROWS, value)
    cast = torch.from_numpy(rows).to(getattr(torch, name))
    is_fine = bool(cast.isfinite().all() and cast.any())
    try:
        verify(file_of(rows), dtype=name)
    except AdapterInvalid:
        assert not is_fine
    else:
        assert is_fine


def test_what_vanishes_in_the_serving_dtype_is_refused():
    tiny = file_of(ROWS * np.float32(1e-12))
    verify(tiny, dtype="bfloat16")
    with pytest.raises(AdapterInvalid, match="all zeros in float16"):
        verify(tiny, dtype="float16")


@pytest.mark.parametrize(
    ("expected", "field"),
    [
        ({"hidden_size": 16}, "config.token_dim"),
        ({"max_virtual_tokens": 4}, "config.num_virtual_tokens"),
        ({"sha256": "0" * 64}, "tensors_sha256"),
        ({"size_bytes": len(file_of()) + 1}, "tensors"),
        ({"size_bytes": len(file_of()) - 1}, "tensors_size_bytes"),
    ],
)
def test_what_disagrees_with_what_was_announced_is_refused(expected, field):
    with pytest.raises(AdapterInvalid) as refused:
        verify(file_of(), **expected)
    assert refused.value.field == field


@pytest.mark.parametrize("length", [0, 7, 8, 50, len(file_of()) - 1])
def test_a_truncated_file_is_refused(length):
    data = file_of()
    with pytest.raises(AdapterInvalid) as refused:
        verify(data[:length], size_bytes=len(data))
    assert refused.value.field == "tensors_size_bytes"


def test_a_bad_header_is_refused_before_the_rest_arrives():
    data = raw_file({"prompt_embeddings": entry("I32")})
    verifier = AdapterVerifier(SPEC, size_bytes=len(data))
    with pytest.raises(AdapterInvalid):
        verifier.feed(data[: -ROWS.nbytes])


def test_a_large_file_is_verified_in_little_memory():
    rows = 400_000  # 49 MiB
    spec = parse_config(json.dumps({"peft_type": "CPT", "num_virtual_tokens": rows, "token_dim": 32}))
    header = json.dumps({"prompt_embeddings": entry(shape=[rows, 32], offsets=[0, rows * 128])}).encode()
    size = 8 + len(header) + rows * 128
    body = np.ones(2**18, dtype=np.float32).tobytes()
    verifier = AdapterVerifier(spec, size_bytes=size)
    tracemalloc.start()
    verifier.feed(struct.pack("<Q", len(header)) + header)
    left = rows * 128
    while left:
        verifier.feed(body[:left])
        left -= len(body[:left])
    verifier.finish()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8e6


@given(data=st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise_anything_else(data):
    for file in (data, raw_file(data)):
        try:
            verify(file, piece_bytes=17)
        except AdapterInvalid:
            continue
        raise AssertionError("random bytes are no adapter")


@given(position=st.integers(0, 7 + 80), value=st.integers(0, 255))
@settings(max_examples=300, deadline=None)
def test_a_changed_header_byte_raises_nothing_else(position, value):
    data = bytearray(file_of())
    data[position] = value
    with suppress(AdapterInvalid):
        verify(bytes(data))


def lora_file(values: dict[str, np.ndarray]) -> bytes:
    return save({f"base_model.model.layers.{name}.weight": matrix for name, matrix in values.items()})


@pytest.mark.parametrize("dtypes", [(np.float32,), (np.float16,), (np.float32, np.float16)], ids=str)
@pytest.mark.parametrize("piece_bytes", [7, 300, 10_000])
def test_one_bad_value_is_found_in_whichever_of_many_tensors_it_is(dtypes, piece_bytes):
    spec = parse_config(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}))
    shapes = {"A": (2, 6), "B": (10, 2)}
    values = {
        f"{layer}.q_proj.lora_{matrix}": np.ones(shape, dtypes[layer % len(dtypes)])
        for layer in range(6)
        for matrix, shape in shapes.items()
    }

    def feed(data: bytes):
        verifier = AdapterVerifier(spec, size_bytes=len(data))
        for start in range(0, len(data), piece_bytes):
            verifier.feed(data[start : start + piece_bytes])
        return verifier.finish()

    assert len(feed(lora_file(values)).tensors) == len(values)
    for name, matrix in values.items():
        for bad, message in ((np.nan, "has nan at row 1, column 1"), (np.inf, "has inf at row 1, column 1")):
            changed = matrix.copy()
            changed[1, 1] = bad
            with pytest.raises(AdapterInvalid, match=message) as refused:
                feed(lora_file({**values, name: changed}))
            assert refused.value.field == f"tensors.base_model.model.layers.{name}.weight"
        with pytest.raises(AdapterInvalid, match="all zeros") as refused:
            feed(lora_file({**values, name: matrix * 0}))
        assert refused.value.field == f"tensors.base_model.model.layers.{name}.weight"
