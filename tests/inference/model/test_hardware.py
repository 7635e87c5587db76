from pathlib import Path

import pytest
import torch
from softprompt_api.errors import InvalidArgument
from softprompt_inference.model import hardware

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("own", "device", "has_bfloat16", "chosen"),
    [
        (torch.bfloat16, CPU, True, torch.bfloat16),
        (torch.float16, CPU, True, torch.bfloat16),
        (torch.bfloat16, CPU, False, torch.float32),
        (torch.float16, CPU, False, torch.float32),
        (torch.float32, CPU, True, torch.float32),
        (None, CPU, True, torch.float32),
        (torch.float16, GPU, False, torch.float16),
        (torch.bfloat16, GPU, False, torch.bfloat16),
        (torch.float32, GPU, False, torch.float32),
    ],
)
def test_the_dtype_is_the_models_own_where_the_hardware_has_it(
    own: torch.dtype | None,
    device: torch.device,
    has_bfloat16: bool,
    chosen: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "cpu_has_bfloat16", lambda: has_bfloat16)
    assert hardware.choose_dtype("auto", own, device) == chosen


def test_a_dtype_that_is_asked_for_is_taken() -> None:
    assert hardware.choose_dtype("float16", torch.float32, CPU) == torch.float16


def test_the_cpu_is_taken_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hardware.choose_device("auto") == CPU


def test_the_first_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert hardware.choose_device("auto") == GPU
    assert hardware.choose_device("cuda:1") == torch.device("cuda", 1)


def test_pages_take_a_quarter_of_the_free_memory_and_at_most_two_gigabytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2**30)
    assert hardware.plan_kv_cache_bytes(CPU) == 2**28
    monkeypatch.setattr(hardware, "available_memory_bytes", lambda: 2**40)
    assert hardware.plan_kv_cache_bytes(CPU) == 2**31


def test_a_share_of_the_gpu_is_for_weights_and_pages_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (70, 100))
    budget = hardware.read_gpu_budget(GPU, 0.6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 100))  # 20 were taken by weights
    assert hardware.plan_kv_cache_bytes(GPU, budget) == 60 - 20


def test_without_a_share_pages_take_nine_tenths_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (50, 100))
    assert hardware.plan_kv_cache_bytes(GPU) == 45


def test_a_share_that_is_not_free_is_refused_with_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * 2**30, 80 * 2**30))
    with pytest.raises(
        InvalidArgument, match=r"72.0 GiB of cuda:0, but only 30.0 of its 80.0 GiB.*0.38"
    ) as caught:
        hardware.read_gpu_budget(GPU, 0.9)
    assert caught.value.field == "gpu_memory_utilization"


@pytest.mark.parametrize(
    ("limit", "used", "stat", "available"),
    [
        ("4096\n", "1024\n", "anon 1000\n", 3072),
        # Most of it is a model's file that was read.
        ("4096\n", "4000\n", "anon 512\nfile 3488\ninactive_file 3400\nactive_file 88\n", 3496),
        ("4096\n", "5000\n", "inactive_file 100\n", 0),
        ("max\n", "4000\n", "inactive_file 0\n", None),
    ],
)
def test_a_containers_memory_is_its_limit_without_what_gives_way(
    limit: str, used: str, stat: str, available: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"memory.max": limit, "memory.current": used, "memory.stat": stat, "meminfo": "MemAvailable: 9 kB\n"}
    monkeypatch.setattr(Path, "read_text", lambda self: files[self.name])
    assert hardware.available_memory_bytes() == (9 * 1024 if available is None else available)


def test_this_machine_has_memory() -> None:
    assert hardware.available_memory_bytes() > 2**20
