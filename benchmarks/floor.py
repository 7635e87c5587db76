"""How fast a machine could do a workload at best: what its memory and its arithmetic allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.model_files import ModelShape
from benchmarks.workload import Request

# Weights are read as they are on disk, keys and values as they are computed.
_BYTES_PER_PARAMETER = 2
# Over ModelShape.kv_bytes_per_token.
KV_GROWTH = {"bfloat16": 1, "float32": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """What was measured on this machine.

    Attributes:
        device: the GPU's name, or "cpu".
        copy_bytes_per_s: bytes read and written by a large copy.
        matmul_flops_per_s: of a large matrix product.
        dtype: of that product, and of everything that is compared.
    """

    device: str
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    dtype: str = "bfloat16"


def job_floor_s(
    requests: Sequence[Request], shape: ModelShape, limits: MachineLimits, *, num_virtual_tokens: int = 0
) -> float:
    """Least seconds for all requests in one batch, with virtual tokens that cost no computing.

    The larger of arithmetic (2 operations per parameter and token) and memory (all weights once per step, with as
    many steps as the longest output has tokens, and each sequence's keys and values once per token).
    """
    tokens = sum(len(request.prompt_ids) + request.num_tokens for request in requests)
    positions = sum(
        request.num_tokens * (num_virtual_tokens + len(request.prompt_ids)) + request.num_tokens**2 // 2
        for request in requests
    )
    steps = max(request.num_tokens for request in requests)
    arithmetic_s = 2 * shape.num_parameters * tokens / limits.matmul_flops_per_s
    weights_bytes = steps * shape.num_parameters * _BYTES_PER_PARAMETER
    kv_bytes = positions * shape.kv_bytes_per_token * KV_GROWTH[limits.dtype]
    memory_s = (weights_bytes + kv_bytes) / limits.copy_bytes_per_s
    return max(arithmetic_s, memory_s)


def decode_floor_s(batch: int, context: float, shape: ModelShape, limits: MachineLimits) -> float:
    """Least seconds for one decode step of `batch` sequences of `context` positions each."""
    weights_bytes = shape.num_parameters * _BYTES_PER_PARAMETER
    kv_bytes = batch * context * shape.kv_bytes_per_token * KV_GROWTH[limits.dtype]
    memory_s = (weights_bytes + kv_bytes) / limits.copy_bytes_per_s
    return max(memory_s, 2 * shape.num_parameters * batch / limits.matmul_flops_per_s)
