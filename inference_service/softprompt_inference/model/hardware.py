"""What the machine offers: devices, number formats, free memory."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from softprompt_api.errors import InvalidArgument

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})

CPU_KV_CACHE_SHARE = 0.25
CPU_KV_CACHE_LIMIT_BYTES = 2 * 2**30
CUDA_KV_CACHE_SHARE = 0.9


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, else the CPU. Raises InvalidArgument."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise InvalidArgument(f"device is {name!r}; it must be auto, cpu, cuda or cuda:N", field="device")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InvalidArgument(f"device is {name!r}, but there are {count} GPUs here", field="device")
        device = torch.device("cuda", device.index or 0)
    return device


def choose_dtype(name: str, own: torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is the model's own, but on a CPU a 16-bit model becomes bfloat16 where the
    processor computes in it, else float32. Raises InvalidArgument."""
    if name != "auto":
        if name not in DTYPES:
            raise InvalidArgument(f"dtype is {name!r}; it must be auto, {', '.join(DTYPES)}", field="dtype")
        return DTYPES[name]
    if own not in (torch.bfloat16, torch.float16):
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return own


def cpu_has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    flags = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))), "")
    return not _CPU_BFLOAT16_FLAGS.isdisjoint(flags.split())


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """What this process may take of a GPU.

    Attributes:
        free_bytes: before it took anything.
        total_bytes: of the share it was given.
    """

    free_bytes: int
    total_bytes: int


def read_gpu_budget(device: torch.device, utilization: float) -> GpuBudget:
    """The budget of a process that has taken nothing yet.

    Args:
        utilization: its share of the GPU's whole memory, whatever others take.

    Raises InvalidArgument when so much is not free.
    """
    free_bytes, whole_bytes = torch.cuda.mem_get_info(device)
    total_bytes = int(whole_bytes * utilization)
    if total_bytes > free_bytes:
        raise InvalidArgument(
            f"gpu_memory_utilization is {utilization:g}, which is {total_bytes / 2**30:.1f} GiB of {device}, but "
            f"only {free_bytes / 2**30:.1f} of its {whole_bytes / 2**30:.1f} GiB are free; lower it below "
            f"{free_bytes / whole_bytes:.2f}, or end what else runs there",
            field="gpu_memory_utilization",
        )
    return GpuBudget(free_bytes, total_bytes)


def plan_kv_cache_bytes(device: torch.device, budget: GpuBudget | None = None) -> int:
    """Memory for KV pages, from what is free now, or from what is left of a GPU's budget."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free_bytes, _ = torch.cuda.mem_get_info(device)
        if budget is None:
            return int(free_bytes * CUDA_KV_CACHE_SHARE)
        return budget.total_bytes - (budget.free_bytes - free_bytes)
    return min(int(available_memory_bytes() * CPU_KV_CACHE_SHARE), CPU_KV_CACHE_LIMIT_BYTES)


def available_memory_bytes() -> int:
    """Host memory this process may still take: the machine's, or its container's if that is less."""
    available = CPU_KV_CACHE_LIMIT_BYTES
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024
    except OSError:
        return available
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            used_bytes = int((group / "memory.current").read_text())
            # Files that were read give way: the model's, where it has just been downloaded or converted.
            if cached := re.search(r"^inactive_file (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE):
                used_bytes -= int(cached[1])
            available = min(available, max(0, int(limit) - used_bytes))
    except OSError:
        pass  # no cgroup v2: the machine's own figure stands
    return available
