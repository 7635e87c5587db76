"""Our worker and PEFT's, in this process, on the tiny model."""

from pathlib import Path

import pytest

from benchmarks.adapters import AdapterMaker
from benchmarks.model_files import read_shape
from benchmarks.workers import ours
from benchmarks.workers.peft import Peft
from benchmarks.workload import Lengths, Request, make_requests

# PEFT says so of every prompt; each is computed as it is in the oracle.
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return AdapterMaker(tiny_model, read_shape(tiny_model), tmp_path_factory.mktemp("adapters")).make(2, 5)


@pytest.fixture(scope="module")
def peft(tiny_model: Path, adapters: list[str]) -> Peft:
    peft = Peft(model=str(tiny_model), device="cpu", dtype="float32")
    peft.load(adapters)
    return peft


@pytest.fixture(scope="module")
def requests(tiny_model: Path, adapters: list[str]) -> list[Request]:
    return make_requests(
        "ours and PEFT's",
        seed=1,
        repeat=0,
        count=6,
        prompts=Lengths(shortest=2, longest=20),
        outputs=Lengths(shortest=1, longest=8),
        vocab_size=read_shape(tiny_model).vocab_size,
        adapters=[None, *adapters],
    )


@pytest.fixture(scope="module")
def expected(peft: Peft, requests: list[Request]) -> list[list[int]]:
    """Ids that PEFT gives each alone."""
    return peft.run(requests, batch_size=1).token_ids


@pytest.mark.parametrize("share", [True, False])
def test_ours_gives_the_ids_of_peft(
    tiny_model: Path, adapters: list[str], requests: list[Request], expected: list[list[int]], share: bool
) -> None:
    common = {"model": str(tiny_model), "device": "cpu", "dtype": "float32", "num_threads": None}
    worker = ours.make(**common, kv_cache_bytes=2**24, share=share, max_model_len=128)
    worker.load(adapters)
    for _ in range(2):
        outcome = worker.run(requests)
        assert outcome.token_ids == expected
    assert [len(ids) for ids in outcome.token_ids] == [request.num_tokens for request in requests]
    for times in outcome.token_times_s:
        assert times == sorted(times)
        assert times[-1] <= outcome.seconds


def test_a_padded_batch_gives_as_many_tokens_as_asked(peft: Peft, requests: list[Request]) -> None:
    ids = peft.run(requests, batch_size=4).token_ids
    assert [len(one) for one in ids] == [request.num_tokens for request in requests]
