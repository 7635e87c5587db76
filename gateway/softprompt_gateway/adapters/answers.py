"""What the routes of `adapters.routes` and `adapters.resident` answer, for the OpenAPI document."""

from typing import Literal

from softprompt_gateway.documented import AnswerModel


class NormsAnswer(AnswerModel):
    """Lengths of many vectors."""

    low: float
    median: float
    high: float


class EffectAnswer(AnswerModel):
    """How much an adapter, or one of its tasks, changes the next token."""

    task: int | None
    mean_kl: float
    max_kl: float
    num_flips: int
    num_prompts: int


class ProbeAnswer(AnswerModel):
    """What was measured of a version."""

    base_model: str
    dtype: str
    probed_at: int | None
    effects: list[EffectAnswer]


class AdapterAnswer(AnswerModel):
    """One version of an adapter."""

    object: Literal["adapter"]
    id: int
    name: str
    version: int
    model: str
    digest: str
    kind: str
    num_virtual_tokens: int
    hidden_size: int
    num_tasks: int
    rank: int
    dtype: str
    size_bytes: int
    sha256: str
    base_model: str | None
    row_norms: NormsAnswer | None
    vocabulary_norms: NormsAnswer | None
    probe: ProbeAnswer | None
    warnings: list[str]
    created_at: int
    labels: dict[str, str]
    pinned: bool
    aliases: list[str]


class ShownAdapter(AdapterAnswer):
    """Answer of `GET /v1/adapters/{adapter}`."""

    config_json: str


class AdapterList(AnswerModel):
    """Answer of `GET /v1/adapters`."""

    object: Literal["list"]
    data: list[AdapterAnswer]
    next_page_token: str | None
    total_size: int


class VersionList(AnswerModel):
    """Answer of `GET /v1/adapters/{adapter}/versions`."""

    object: Literal["list"]
    data: list[AdapterAnswer]
    next_page_token: str | None


class AdapterDeleted(AnswerModel):
    """Answer of `DELETE /v1/adapters/{adapter}`."""

    object: Literal["adapter.deleted"]
    id: str
    deleted: Literal[True]
    deleted_versions: int


class AliasDeleted(AnswerModel):
    """Answer of `DELETE /v1/adapters/{adapter}/aliases/{alias}`."""

    object: Literal["alias.deleted"]
    id: str
    deleted: Literal[True]


class NearToken(AnswerModel):
    """A token of the vocabulary that a virtual token is near to."""

    token_id: int
    token: str
    cosine: float


class VirtualToken(AnswerModel):
    """A virtual token, and the nearest tokens of the vocabulary."""

    index: int
    norm: float
    tokens: list[NearToken]


class NearestTokens(AnswerModel):
    """Answer of `GET /v1/adapters/{adapter}/nearest-tokens`."""

    object: Literal["adapter.nearest_tokens"]
    model: str
    digest: str
    data: list[VirtualToken]


class ResidentAdapter(AnswerModel):
    """An adapter in the inference service's memory."""

    object: Literal["resident_adapter"]
    model: str
    replica: str
    digest: str
    tier: Literal["device", "host"]
    size_bytes: int
    num_virtual_tokens: int
    idle_s: float
    hits: int
    in_use: int
    pinned: bool


class ResidentList(AnswerModel):
    """Answer of `GET /v1/resident_adapters`."""

    object: Literal["list"]
    data: list[ResidentAdapter]
    total_size: int


ANSWER_MODELS = (
    AdapterAnswer,
    ShownAdapter,
    AdapterList,
    VersionList,
    AdapterDeleted,
    AliasDeleted,
    NearestTokens,
    ResidentList,
)
