"""`python -m benchmarks.limits DEVICE THREADS DTYPE`: measure this machine in a process of its own.

Prints one JSON object with the fields of MachineLimits.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict

from benchmarks.floor import MachineLimits

_SECONDS = 2.0
_COPY_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
_MATMUL_SIZE = {"cpu": 2048, "cuda": 8192}
_TIMEOUT_S = 300.0


def measure_limits(device: str, num_threads: int, dtype: str, env: Mapping[str, str]) -> MachineLimits:
    """Measure in a new process. Raises subprocess.CalledProcessError when it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.limits", device, str(num_threads), dtype],
        env=dict(env),
        stdout=subprocess.PIPE,
        timeout=_TIMEOUT_S,
        check=True,
    )
    return MachineLimits(**json.loads(done.stdout))


def _best_s(run: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """The shortest of several runs: a limit is what the machine can do when nothing disturbs it."""
    run()
    synchronize()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def _measure(device: str, num_threads: int, dtype: str) -> MachineLimits:
    import torch

    torch.set_num_threads(num_threads)
    kind = torch.device(device).type
    synchronize = torch.cuda.synchronize if kind == "cuda" else bool
    source = torch.ones(_COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_s = _best_s(lambda: target.copy_(source), synchronize)
    size = _MATMUL_SIZE[kind]
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    with torch.inference_mode():
        matmul_s = _best_s(lambda: a @ b, synchronize)
    return MachineLimits(
        device=torch.cuda.get_device_name(device) if kind == "cuda" else kind,
        copy_bytes_per_s=2 * source.numel() / copy_s,
        matmul_flops_per_s=2 * size**3 / matmul_s,
        dtype=dtype,
    )


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
    print(json.dumps(asdict(_measure(sys.argv[1], int(sys.argv[2]), sys.argv[3]))))
