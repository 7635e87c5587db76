from pathlib import Path

import pytest

from benchmarks.__main__ import CASES, parse
from benchmarks.bench import ORACLE, PEERS, Bench
from benchmarks.progress import Progress
from benchmarks.results import Results
from benchmarks.sides import SideFailed
from benchmarks.sizes import SIZES


def test_without_arguments_everything_is_measured_in_full() -> None:
    arguments = parse([])
    assert (arguments.only, arguments.peers, arguments.size) == (list(CASES), list(PEERS), "full")


def test_cases_and_peers_can_be_chosen() -> None:
    arguments = parse(["--quick", "--only", "B3,B9", "--peers", "none"])
    assert (arguments.only, arguments.peers, arguments.size) == (["B3", "B9"], [], "quick")


@pytest.mark.parametrize(("has_bfloat16", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_all_sides_compute_in_what_the_processor_multiplies(
    has_bfloat16: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.__main__.cpu_has_bfloat16", lambda: has_bfloat16)
    assert parse([]).dtype == dtype
    assert parse(["--dtype", "float32"]).dtype == "float32"


def test_a_peer_that_is_not_asked_for_is_there_for_checks_alone(
    tmp_path: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.bench.read_shape", lambda _: None)
    monkeypatch.setattr("benchmarks.bench.AdapterMaker", lambda *_: None)
    bench = Bench(
        model=tmp_path, device="cpu", folder=tmp_path, peers=[], size=SIZES["tiny"], num_threads=1,
        results=results, progress=Progress({}), dtype=ORACLE,
    )  # fmt: skip
    monkeypatch.setattr(bench, "_start_side", lambda name, dtype: (name, dtype))
    with pytest.raises(SideFailed, match="not asked for"):
        bench.side("peft")
    assert bench.side("peft", ORACLE) == ("peft", ORACLE)
    with pytest.raises(SideFailed, match="not asked for"):
        bench.side("peft")
    assert bench.side("ours") == ("ours", ORACLE)


@pytest.mark.parametrize("argv", [["--only", "B99"], ["--peers", "nobody"], ["--quick", "--tiny"]])
def test_wrong_arguments_end_in_a_plain_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_every_case_knows_how_long_it_is(case: str) -> None:
    for size in SIZES.values():
        assert 0 < CASES[case].expected_turns(size, 0) <= CASES[case].expected_turns(size, len(PEERS))
