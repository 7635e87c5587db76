"""How much a run measures."""

from dataclasses import dataclass

from benchmarks.workload import Lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Attributes beside the obvious ones.

    Attributes:
        check_requests, check_tokens: of the comparison in float32, before anything is timed.
        num_requests: of B1 and B2; `few_requests` of these where PEFT computes one adapter at a time, for both
            sides; `long_requests` of B3.
        batch_sizes: of padded batches, of which the fastest is kept.
        single_requests: sent one by one, for the time to the first token.
        streams: open at the same time over HTTP.
        cold_starts: adapters that are used for the first time, of each kind; `loads` of each while others stream.
        registered: soft prompts in the registry of B8; `asked` of them have traffic: `asked_requests` in a turn.
        resolves: names and digests that are looked up.
    """

    name: str
    num_repeats: int
    num_requests: int
    few_requests: int
    long_requests: int
    prompts: Lengths
    outputs: Lengths
    check_requests: int
    check_tokens: int
    adapter_counts: tuple[int, ...]
    virtual_tokens: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    single_requests: int
    streams: int
    num_starts: int
    cold_starts: int
    loads: int
    registered: int
    asked: int
    asked_requests: int
    resolves: int


FULL = Size(
    name="full",
    num_repeats=3,
    num_requests=64,
    few_requests=16,
    long_requests=32,
    prompts=Lengths(shortest=8, longest=64),
    outputs=Lengths(shortest=8, longest=128),
    check_requests=8,
    check_tokens=32,
    adapter_counts=(1, 10, 100, 1000),
    virtual_tokens=(20, 100, 512),
    batch_sizes=(16, 32, 64),
    single_requests=31,
    streams=32,
    num_starts=3,
    cold_starts=15,
    loads=30,
    registered=100_000,
    asked=10_000,
    asked_requests=192,
    resolves=2_000,
)
# One repeat of everything within ten minutes on two cores.
QUICK = Size(
    name="quick",
    num_repeats=1,
    num_requests=16,
    few_requests=6,
    long_requests=12,
    prompts=Lengths(shortest=8, longest=64),
    outputs=Lengths(shortest=8, longest=48),
    check_requests=3,
    check_tokens=16,
    adapter_counts=(1, 10, 100),
    virtual_tokens=(20, 100, 512),
    batch_sizes=(12,),
    single_requests=5,
    streams=16,
    num_starts=1,
    cold_starts=7,
    loads=15,
    registered=2_000,
    asked=200,
    asked_requests=64,
    resolves=500,
)
# Runs every line and measures nothing worth knowing.
TINY = Size(
    name="tiny",
    num_repeats=2,
    num_requests=3,
    few_requests=2,
    long_requests=3,
    prompts=Lengths(shortest=4, longest=8),
    outputs=Lengths(shortest=6, longest=8),
    check_requests=2,
    check_tokens=4,
    adapter_counts=(1, 3),
    virtual_tokens=(4, 20),
    batch_sizes=(2, 3),
    single_requests=2,
    streams=3,
    num_starts=1,
    cold_starts=2,
    loads=2,
    registered=30,
    asked=6,
    asked_requests=6,
    resolves=10,
)
SIZES = {size.name: size for size in (FULL, QUICK, TINY)}
