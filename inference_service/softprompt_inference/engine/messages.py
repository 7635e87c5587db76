"""What the front says to the engine and what the engine answers: plain data, no torch.

The same values travel in one process (`softprompt.LLM`) and, as msgpack, between two (the service).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from softprompt_api.params import SamplingParams
from softprompt_api.quality import Norms

from softprompt_inference.engine.files import MemoryFile

# Of the dtypes that rows, matrices and models have.
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPart:
    """Token ids of the vocabulary, in order."""

    token_ids: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftPromptPart:
    """All virtual tokens of one resident adapter."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest:
    """Generate one choice. Its adapters must be loaded before, and stay loaded until it has finished.

    Attributes:
        request_id: unique among the unfinished; made by the front. Choices of one request share it up to a "-".
        prompt: parts in order, usually a SoftPromptPart and a TextPart.
        params: `max_tokens` may be None (as many as fit), or 0 (it ends with its prompt); `n`, `stop` strings and
            `skip_special_tokens` are the front's business and ignored here.
        eos_token_ids: end the output unless `params.ignore_eos`.
        seed: the seed of this choice; the front draws one where the user gave none.
        salt: kept apart in the prefix cache from requests with another salt.
        tenant: requests of several tenants that wait start in turn.
        lora: digest of the LoRA that computes it, soft prompts included; "": none.
        all_logprobs: with `params.logprobs`, give those of the whole vocabulary too.
    """

    request_id: str
    prompt: list[TextPart | SoftPromptPart]
    params: SamplingParams
    eos_token_ids: list[int] = field(default_factory=list)
    seed: int = 0
    salt: str = ""
    tenant: str = ""
    lora: str = ""
    all_logprobs: bool = False

    @property
    def adapters(self) -> list[str]:
        """Digests of all that it needs: of its soft prompts in order, and of its LoRA."""
        soft_prompts = [part.digest for part in self.prompt if isinstance(part, SoftPromptPart)]
        return [*soft_prompts, self.lora] if self.lora else soft_prompts


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Forget a request and free its pages; unknown ids are ignored (it may just have finished)."""

    request_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAdapter:
    """Hold an adapter's rows, one for each virtual token, where steps can use them.

    Attributes:
        digest: the version's digest, and its task where it has several.
        rows: raw little-endian values, row by row.
        dtype: "float32", "float16" or "bfloat16".
        num_virtual_tokens, row_size: shape of the rows.
        are_key_values: row r is `[layers, 2, key heads, head dimension]`, for the KV pages at position r; or else,
            it is an embedding.
        file: that keys and values were read from; None: there is none.
    """

    digest: str
    rows: bytes | memoryview
    dtype: str
    num_virtual_tokens: int
    row_size: int
    are_key_values: bool = False
    file: MemoryFile | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraModule:
    """What a LoRA adds to one linear: y + b @ (a @ x) * scale.

    Attributes:
        name: dotted path of the linear in the transformers model, such as `model.layers.0.self_attn.q_proj`.
        a: [rank, in], raw little-endian values, row by row.
        b: [out, rank], likewise.
    """

    name: str
    rank: int
    scale: float
    a: bytes | memoryview
    b: bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadLora:
    """Put a LoRA on the device.

    Attributes:
        digest: the version's digest.
        dtype: of all its values: "float32", "float16" or "bfloat16".
        file: that all matrices were read from; None: there is none.
    """

    digest: str
    modules: list[LoraModule]
    dtype: str
    file: MemoryFile | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class DropAdapter:
    """Free an adapter's rows, or a LoRA; the front sends it only when no unfinished request uses them."""

    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FindNearest:
    """Find the vocabulary's tokens whose embeddings are nearest to an adapter's rows; the answer is a Nearest.

    It is computed piece by piece, one beside each step, so that nobody's tokens wait for it.

    Attributes:
        search_id: unique among the unfinished; made by the front.
        digest: of a resident adapter that stays loaded until the answer.
        top_k: tokens for each row, at least 1.
    """

    search_id: int
    digest: str
    top_k: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortSearch:
    """Forget a search; unknown ids are ignored (it may just have been answered)."""

    search_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Say something, if only the result of a step with nothing to do: an engine that lives always answers."""


Command = AddRequest | Abort | LoadAdapter | LoadLora | DropAdapter | FindNearest | AbortSearch | Ping


class Finish(StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """Log-probabilities of one token, from the model's unmodified logits.

    Attributes:
        chosen: the chosen token's, or that of the prompt's own.
        top: (token id, logprob) of the most likely tokens, most likely first.
        every: those of all ids in order, float32, little endian; empty unless the request asked for them.
    """

    chosen: float
    top: list[tuple[int, float]]
    every: bytes = b""


@dataclass(slots=True)  # frozen, or by keywords, it would take several times as long to make
class Output:
    """One step's result for one request: a token, log-probabilities of its prompt, or an end without a token.

    Attributes:
        token_id: None where it tells of the prompt, where `finish` is ERROR, and where no token was wanted.
        finish: set on the last output of a request.
        stop_token_id: the id of `params.stop_token_ids` that ended it.
        error_reason, error_message: set where `finish` is ERROR; reasons are those of `softprompt_api.errors`.
        error_field: the request field at fault, if one is.
        cached_tokens: set on the first token, or on the end without one: prompt positions taken from the prefix
            cache.
        prompt_logprobs: those of the next tokens of the prompt's text, before the first token; None for one that
            nothing computed stands before. Set where it tells of the prompt, and then nothing else is.
    """

    request_id: str
    token_id: int | None = None
    logprobs: Logprobs | None = None
    finish: Finish | None = None
    stop_token_id: int | None = None
    error_reason: str = ""
    error_message: str = ""
    error_field: str = ""
    cached_tokens: int | None = None
    prompt_logprobs: list[Logprobs | None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """The engine's load now, and its counters since the start."""

    running: int = 0
    waiting: int = 0
    used_pages: int = 0
    num_pages: int = 0
    resident_adapters: int = 0
    computed_prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class NearRow:
    """One row of an adapter: its norm, and (token id, cosine) of the nearest tokens, nearest first."""

    norm: float
    tokens: list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The answer to a FindNearest: a NearRow for each row, or an error as in Output."""

    search_id: int
    rows: list[NearRow] = field(default_factory=list)
    error_reason: str = ""
    error_message: str = ""
    error_field: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """One message per step.

    Attributes:
        failed_loads: digests of adapters whose load failed for a reason that may pass; to be loaded anew.
    """

    outputs: Sequence[Output]
    stats: Stats
    found: list[Nearest] = field(default_factory=list)
    failed_loads: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The loaded model, sent once when the engine is ready. Sizes in bytes; see BaseModel in the protos.

    Attributes:
        no_key_values: why it cannot take keys and values from adapters; "": it can.
        vocabulary_norms: 1st percentile, median and 99th of the norms of token embeddings; None: not measured.
    """

    architecture: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    dtype: str
    device: str
    max_model_len: int
    max_virtual_tokens: int
    weights_bytes: int
    kv_cache_bytes: int
    num_pages: int
    page_size: int
    no_key_values: str = ""
    vocabulary_norms: Norms | None = None

    @property
    def key_value_row_size(self) -> int:
        """Values of one position's keys and values, in all layers, that an adapter gives."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def key_value_row_bytes(self) -> int:
        """Memory that they take."""
        return self.key_value_row_size * ITEM_BYTES[self.dtype]
