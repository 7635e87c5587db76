import pytest

from benchmarks.__main__ import CASES, parse
from benchmarks.bench import PEERS
from benchmarks.sizes import SIZES


def test_without_arguments_everything_is_measured_in_full() -> None:
    arguments = parse([])
    assert (arguments.only, arguments.peers, arguments.size) == (list(CASES), list(PEERS), "full")


def test_cases_and_peers_can_be_chosen() -> None:
    arguments = parse(["--quick", "--only", "B3,B9", "--peers", "none"])
    assert (arguments.only, arguments.peers, arguments.size) == (["B3", "B9"], [], "quick")


@pytest.mark.parametrize("argv", [["--only", "B99"], ["--peers", "nobody"], ["--quick", "--tiny"]])
def test_wrong_arguments_end_in_a_plain_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(argv)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("case", CASES)
def test_every_case_knows_how_long_it_is(case: str) -> None:
    for size in SIZES.values():
        assert 0 < CASES[case].expected_turns(size, 0) <= CASES[case].expected_turns(size, len(PEERS))
