import pytest

from benchmarks.floor import MachineLimits, decode_floor_s, job_floor_s
from benchmarks.model_files import ModelShape
from benchmarks.workload import Request

SHAPE = ModelShape(num_parameters=1000, hidden_size=8, vocab_size=10, kv_bytes_per_token=100)
SLOW_MEMORY = MachineLimits(device="cpu", copy_bytes_per_s=1000.0, matmul_flops_per_s=1e12)
SLOW_ARITHMETIC = MachineLimits(device="cpu", copy_bytes_per_s=1e12, matmul_flops_per_s=1000.0)


def test_a_decode_step_reads_weights_once_and_every_context() -> None:
    # 2,000 bytes of weights and 3 × 10 positions of 100 bytes.
    assert decode_floor_s(3, 10, SHAPE, SLOW_MEMORY) == pytest.approx(5.0)
    assert decode_floor_s(3, 10, SHAPE, SLOW_ARITHMETIC) == pytest.approx(6.0)


def test_in_float32_weights_are_read_as_they_are_on_disk_and_contexts_as_they_are_computed() -> None:
    limits = MachineLimits(device="cpu", copy_bytes_per_s=1000.0, matmul_flops_per_s=1e12, dtype="float32")
    assert decode_floor_s(3, 10, SHAPE, limits) == pytest.approx(8.0)
    requests = [Request(prompt_ids=[1], num_tokens=4)]
    assert job_floor_s(requests, SHAPE, limits) == pytest.approx(8.0 + 2 * 1.2)


def test_a_job_computes_every_token_but_no_virtual_one() -> None:
    requests = [Request(prompt_ids=[1, 2, 3], num_tokens=2), Request(prompt_ids=[1], num_tokens=4)]
    assert job_floor_s(requests, SHAPE, SLOW_ARITHMETIC, num_virtual_tokens=50) == pytest.approx(20.0)
    # Weights in 4 steps; 2 × (5 + 3) + 2 and 4 × (5 + 1) + 8 positions.
    assert job_floor_s(requests, SHAPE, SLOW_MEMORY, num_virtual_tokens=5) == pytest.approx(8.0 + 5.0)
