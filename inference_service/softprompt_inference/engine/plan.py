"""What the scheduler asks of the model runner for one step, and what comes back: ids and ints, no torch."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from softprompt_api.params import SamplingParams
from softprompt_api.structured import StructuredOutputsParams

from softprompt_inference.engine.config import CPU_STEP_TOKENS
from softprompt_inference.engine.messages import LoadAdapter, LoadLora, Logprobs, ModelInfo, NearRow
from softprompt_inference.engine.seen import Seen

# A step has at most so many scores: each has logits as large as the vocabulary, and is told of in Python. On a CPU
# that is every token of a prompt.
MAX_SCORES = CPU_STEP_TOKENS


def looks_back(params: SamplingParams) -> bool:
    """Whether the choice of a token depends on the tokens before it by more than the model's logits: penalties."""
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


class Matcher(Protocol):
    """How far one output is in its grammar.

    Attributes:
        error: why it cannot go on; "" while it can.
    """

    error: str

    def allowed(self, banned_ids: Sequence[int]) -> bytes:
        """Whether each token may come next: bit i % 8 of byte i // 8, in whole words of 32 bits.

        Banned tokens may not, unless nothing else may. None may where there is an error.
        """

    def accept(self, token_id: int) -> None:
        """Go on by this token."""


@dataclass(slots=True)  # frozen, or by keywords, it would take several times as long to make
class Sample:
    """Choose the token that follows a chunk.

    Attributes:
        params: how to choose.
        seed: the choice's own seed; with `index` it makes the draw the same in any batch.
        index: how many tokens the sequence has generated before.
        banned_ids: ids that may not be chosen now (ends before `min_tokens`).
        all_logprobs: with `params.logprobs`, give those of the whole vocabulary too.
        matcher: knows the ids that may; None: all. Live: it is asked when the step is launched.
        seen: the tokens so far, virtual ones aside; None without penalties. Live, not to be kept; in a step that
            follows another nobody has it.
    """

    params: SamplingParams
    seed: int
    index: int
    banned_ids: Sequence[int] = ()
    all_logprobs: bool = False
    matcher: Matcher | None = None
    seen: Seen | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Tell how likely the prompt's own tokens are.

    Attributes:
        rows: places in the chunk whose logits tell it, in rising order; at least one.
        token_ids: the token behind each.
        num_top: how many of the likeliest tokens to tell beside each.
    """

    rows: Sequence[int]
    token_ids: Sequence[int]
    num_top: int


@dataclass(slots=True)  # frozen, or by keywords, it would take several times as long to make
class Chunk:
    """Consecutive positions of one sequence to compute.

    Attributes:
        token_ids: ids to compute; an id ≥ vocab_size is a virtual token.
        start: absolute position of the first; KV of all positions before it is in the pages.
        page_ids: pages of the sequence in order, covering start + len(token_ids) positions or more; live: the same
            list as long as the sequence runs, which only grows.
        sample: set when the last position's logits choose a token.
        lora: slot of the LoRA that computes them; −1: none.
        prefix_len: positions of the soft prompt that the sequence begins with.
        scores: set when some positions' logits tell of the prompt.
        in_prompt: whether they begin in the prompt.
    """

    token_ids: Sequence[int]
    start: int
    page_ids: Sequence[int]
    sample: Sample | None
    lora: int = -1
    prefix_len: int = 0
    scores: Scores | None = None
    in_prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PageCopy:
    """The first `num_positions` rows of page `source`, in all layers, to the same rows of page `target`."""

    source: int
    target: int
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PageWrite:
    """Keys and values that an adapter gives, for consecutive positions of one sequence.

    Attributes:
        first_id: virtual id of the adapter's first row; row r belongs to position r.
        start, stop: the positions start … stop − 1.
        page_ids: pages of the sequence in order; live, not to be kept.
    """

    first_id: int
    start: int
    stop: int
    page_ids: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """One step.

    Attributes:
        chunks: decodes (one token each) first, then pieces of prompts. No two chunks share a sequence.
        copies: to be done before the chunks are computed, in any order: no page is a source and a target, none is
            a target twice, and no chunk writes a row that is copied.
        writes: to be done before the chunks are computed; nothing else in the step writes or copies these rows.
        follows: for each chunk, which of the tokens sampled by the step launched just before this one it computes;
            the host does not know them yet, and the chunks' ids stand for nothing. Empty: the ids are known.
    """

    chunks: Sequence[Chunk]
    copies: Sequence[PageCopy] = ()
    writes: Sequence[PageWrite] = ()
    follows: Sequence[int] = ()


@dataclass(slots=True)  # frozen, or by keywords, it would take several times as long to make
class Sampled:
    """What came of a chunk that has a sample or scores; `error` instead where its logits were not finite.

    Attributes:
        token_id: the token chosen; None: it has no sample.
        scores: one for each of its scores.
    """

    token_id: int | None
    logprobs: Logprobs | None = None
    scores: Sequence[Logprobs] = ()
    error: str = ""


class Pending(Protocol):
    """A step that was launched."""

    def result(self) -> Sequence[Sampled]:
        """Wait for it: one Sampled per chunk that has a sample or scores, in order. To be called once."""


class Search(Protocol):
    """A search for the tokens of the vocabulary that are nearest to some rows, computed piece by piece."""

    def advance(self) -> list[NearRow] | None:
        """Compute the next piece; the answer once it is the last, and None before."""


class Runner(Protocol):
    """What the engine needs of the model; the real one is `softprompt_inference.model.runner.ModelRunner`.

    All calls take effect in their order, also where the device is still busy with former ones: a step finds pages,
    rows and LoRAs as the calls before it leave them, and no later call disturbs it.
    """

    info: ModelInfo

    def launch(self, plan: StepPlan) -> Pending:
        """Copy and write, then compute; the device may go on after the return."""

    def load_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        """Make ids first_id … first_id + num_virtual_tokens − 1 stand for an adapter's embeddings."""

    def load_key_values(self, first_id: int, adapter: LoadAdapter) -> Iterator[None]:
        """Make these ids stand for keys and values; they do at the end of the pieces, each of which is short."""

    def drop_rows(self, first_id: int) -> None:
        """Forget the rows that were loaded at first_id, or have begun to be."""

    def find_nearest(self, first_id: int, top_k: int) -> Search:
        """Begin to search for the tokens nearest to the embeddings that were loaded at first_id."""

    def load_lora(self, slot: int, lora: LoadLora) -> Iterator[None]:
        """Make an empty slot, 0 … max_loras − 1, stand for a LoRA; it does at the end of the pieces.

        Each piece is short. They raise AdapterInvalid where the model does not fit. A slot that did not come to
        that end is to be dropped.
        """

    def drop_lora(self, slot: int) -> None:
        """Empty the slot, however much of a LoRA is in it."""

    def compile(self, wanted: StructuredOutputsParams) -> Future[Matcher]:
        """Start to make a matcher at its beginning; it is made by another thread.

        Its errors: InvalidArgument for a grammar that is none or too large, Unsupported where the model has none.
        """
