"""Flags with several values."""

import pytest
from softprompt.cli.argv import repeat_flags


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("run M --prompt-adapters a=1", "run M --prompt-adapters a=1"),
        ("run M --prompt-adapters a=1 b=2", "run M --prompt-adapters a=1 --prompt-adapters b=2"),
        (
            "run --prompt-adapters=a=1 b=2 c=3",
            "run --prompt-adapters=a=1 --prompt-adapters b=2 --prompt-adapters c=3",
        ),
        ("run --prompt-adapters a=1 b=2 M", "run --prompt-adapters a=1 --prompt-adapters b=2 M"),
        ("run --prompt-adapters a=1 M b=2", "run --prompt-adapters a=1 M b=2"),
        ("run --prompt-adapters a=1 --port 1 b=2", "run --prompt-adapters a=1 --port 1 b=2"),
        ("run --lora-modules x=y z=w", "run --lora-modules x=y --lora-modules z=w"),
        ("run --prompt-adapters --port 1", "run --prompt-adapters --port 1"),
        ("run --prompt-adapters bad other=1", "run --prompt-adapters bad --prompt-adapters other=1"),
        ("run --prompt-adapters a=1 -- b=2", "run --prompt-adapters a=1 -- b=2"),
        ("bench --goodput ttft:200 tpot:50 x", "bench --goodput ttft:200 --goodput tpot:50 x"),
        ("adapter add tweet ./p=q", "adapter add tweet ./p=q"),
        ("", ""),
    ],
)
def test_several_values_become_a_repeated_flag(typed: str, meant: str) -> None:
    assert repeat_flags(typed.split()) == meant.split()
