"""What the scheduler asks of the model runner for one step, and what comes back: ids and ints, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from softprompt_api.params import SamplingParams

from softprompt_inference.engine.messages import LoadAdapter, Logprobs, ModelInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Choose the token that follows a chunk.

    Attributes:
        params: how to choose.
        seed: the choice's own seed; with `index` it makes the draw the same in any batch.
        index: how many tokens the sequence has generated before.
        prompt_ids: the prompt's text ids, for penalties; virtual tokens never enter them.
        output_ids: the tokens generated so far; live, not to be kept.
        banned_ids: ids that may not be chosen now (ends before `min_tokens`).
    """

    params: SamplingParams
    seed: int
    index: int
    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    banned_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Consecutive positions of one sequence to compute.

    Attributes:
        token_ids: ids to compute; an id ≥ vocab_size is a virtual token.
        start: absolute position of the first; KV of all positions before it is in the pages.
        page_ids: pages of the sequence in order, covering start + len(token_ids) positions or more; live, not to
            be kept.
        sample: set when the last position's logits choose a token.
    """

    token_ids: Sequence[int]
    start: int
    page_ids: Sequence[int]
    sample: Sample | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """The first `num_positions` rows of page `source`, in all layers, to the same rows of page `target`."""

    source: int
    target: int
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step.

    Attributes:
        chunks: decodes (one token each) first, then pieces of prompts. No two chunks share a sequence.
        copies: to be done before the chunks are computed, in any order: no page is a source and a target, none is
            a target twice, and no chunk writes a row that is copied.
    """

    chunks: Sequence[Chunk]
    copies: Sequence[PageCopy] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """The token chosen for a chunk; `error` instead where its logits were not finite."""

    token_id: int
    logprobs: Logprobs | None = None
    error: str = ""


class Runner(Protocol):
    """What the engine needs of the model; the real one is `softprompt_inference.model.runner.ModelRunner`."""

    info: ModelInfo

    def run(self, plan: StepPlan) -> Sequence[Sampled]:
        """Copy, then compute; one Sampled per chunk that has a sample, in order."""

    def load_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        """Make ids first_id … first_id + num_virtual_tokens − 1 stand for the adapter's rows."""

    def drop_rows(self, first_id: int) -> None:
        """Forget the rows that were loaded at first_id."""
