"""The registry's rules, without a store or a wire: what may be registered, what is near, how pages are cut."""

import base64
import binascii
import difflib
import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from softprompt_api.errors import (
    AdapterInUse,
    AdapterInvalid,
    AdapterNotFound,
    BaseModelUnknown,
    InvalidArgument,
    Overloaded,
)
from softprompt_api.names import AdapterRef, check_full_name, shown
from softprompt_api.quality import MAX_PROBED_TASKS, Norms, Probe, norm_warning
from softprompt_api.tenants import DEFAULT_TENANT, local_name, tenant_of

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000
MAX_LABELS = 32
MAX_LABEL_KEY_CHARACTERS = 64
MAX_LABEL_VALUE_CHARACTERS = 256
MAX_IDEMPOTENCY_KEY_CHARACTERS = 128
MAX_BASE_MODEL_ID_CHARACTERS = 256
MAX_BASE_MODEL_TEXT_CHARACTERS = 256
SERVING_DTYPES = ("float32", "bfloat16", "float16")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PRINTABLE = re.compile(r"[\x21-\x7e][\x20-\x7e]*\Z")
_CHECK_CHARACTERS = 8
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseModel:
    """The fingerprint of a base model; fields as in the protocol."""

    id: str
    architecture: str
    hidden_size: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tokenizer_sha256: str
    max_virtual_tokens: int
    dtype: str
    no_key_values: str = ""
    max_lora_rank: int = 0
    vocabulary_norms: Norms | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A verified adapter that has no version yet."""

    name: str
    digest: str
    kind: str
    num_virtual_tokens: int
    hidden_size: int
    dtype: str
    size_bytes: int
    tensors_sha256: str
    config_json: str
    base_model: BaseModel
    labels: Mapping[str, str]
    num_tasks: int = 0
    rank: int = 0
    row_norms: Norms | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterVersion(Draft):
    """A published version: its content never changes.

    Attributes:
        pinned: whether it is kept from deletion; can change, as labels can.
        probe: what was measured of it last; None: nothing yet.
        aliases: what pointed to it when it was read, in order.
        revision: of its name, when it was read.
    """

    version: int
    id: int
    created_at: datetime
    pinned: bool = False
    probe: Probe | None = None
    aliases: tuple[str, ...] = ()
    revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """What a client says of an adapter before its tensors."""

    name: str
    config_json: str
    size_bytes: int
    sha256: str
    idempotency_key: str
    labels: Mapping[str, str]
    base_model_id: str

    @property
    def tenants_key(self) -> str:
        """The idempotency key, apart from other tenants' that may be the same; "" where there is none."""
        tenant = tenant_of(self.name)
        is_own = not self.idempotency_key or tenant == DEFAULT_TENANT
        return self.idempotency_key if is_own else f"{tenant}\n{self.idempotency_key}"

    def content(self) -> str:
        """sha256 (hex) over everything but the idempotency key, and the base model, which one attempt may name and
        another leave out."""
        parts = [self.name, self.config_json, self.size_bytes, self.sha256, dict(self.labels)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class EventType(StrEnum):
    """What a change did."""

    REGISTERED = "registered"
    VERSION_DELETED = "version_deleted"
    ADAPTER_DELETED = "adapter_deleted"
    ALIAS_SET = "alias_set"
    ALIAS_REMOVED = "alias_removed"
    UPDATED = "updated"
    KEY_CREATED = "key_created"
    KEY_REVOKED = "key_revoked"


def check_registration(registration: Registration, *, max_size_bytes: int) -> None:
    """Raise InvalidArgument or AdapterInvalid for a header that cannot become a version."""
    check_full_name(registration.name)
    if registration.size_bytes < 1:
        raise InvalidArgument(
            "tensors_size_bytes must be the size of the file, at least 1", field="tensors_size_bytes"
        )
    if registration.size_bytes > max_size_bytes:
        raise AdapterInvalid(
            f"the tensor file has {registration.size_bytes} bytes; at most {max_size_bytes} are accepted",
            field="tensors_size_bytes",
        )
    if not _SHA256.match(registration.sha256):
        raise InvalidArgument("tensors_sha256 must be 64 lower-case hex digits", field="tensors_sha256")
    key = registration.idempotency_key
    if key and (len(key) > MAX_IDEMPOTENCY_KEY_CHARACTERS or not _PRINTABLE.match(key)):
        raise InvalidArgument(
            f"idempotency_key must be 1 to {MAX_IDEMPOTENCY_KEY_CHARACTERS} printable ASCII characters",
            field="idempotency_key",
        )
    check_labels(registration.labels)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidArgument for too many labels, too long ones, and control characters in them."""
    if len(labels) > MAX_LABELS:
        raise InvalidArgument(f"there are {len(labels)} labels; at most {MAX_LABELS}", field="labels")
    for key, value in labels.items():
        if not 1 <= len(key) <= MAX_LABEL_KEY_CHARACTERS or len(value) > MAX_LABEL_VALUE_CHARACTERS:
            raise InvalidArgument(
                f"label {shown(key)}: keys have 1 to {MAX_LABEL_KEY_CHARACTERS} characters, "
                f"values at most {MAX_LABEL_VALUE_CHARACTERS}",
                field="labels",
            )
        if _CONTROL.search(key + value):  # they are shown in terminals
            raise InvalidArgument(f"label {shown(key)} has control characters", field="labels")


def check_base_model(model: BaseModel) -> None:
    """Raise InvalidArgument for a fingerprint that no adapter could be checked against."""
    if len(model.id) > MAX_BASE_MODEL_ID_CHARACTERS or not _PRINTABLE.match(model.id):
        raise InvalidArgument(
            f"base_model.id must be 1 to {MAX_BASE_MODEL_ID_CHARACTERS} printable ASCII characters",
            field="base_model.id",
        )
    if model.hidden_size < 1:
        raise InvalidArgument("base_model.hidden_size must be at least 1", field="base_model.hidden_size")
    for field in ("num_layers", "num_kv_heads", "head_dim", "vocab_size", "max_virtual_tokens", "max_lora_rank"):
        if getattr(model, field) < 0:
            raise InvalidArgument(f"base_model.{field} cannot be negative", field=f"base_model.{field}")
    for field in ("architecture", "tokenizer_sha256", "no_key_values"):
        if len(getattr(model, field)) > MAX_BASE_MODEL_TEXT_CHARACTERS:
            raise InvalidArgument(
                f"base_model.{field} has at most {MAX_BASE_MODEL_TEXT_CHARACTERS} characters",
                field=f"base_model.{field}",
            )
    if model.vocabulary_norms is not None and not _are_lengths(model.vocabulary_norms):
        raise InvalidArgument(
            "base_model.vocabulary_norms must be finite, rising and above 0", field="base_model.vocabulary_norms"
        )
    if model.dtype and model.dtype not in SERVING_DTYPES:
        raise InvalidArgument(
            f"base_model.dtype is {shown(model.dtype)}; known are {', '.join(SERVING_DTYPES)}",
            field="base_model.dtype",
        )


def _are_lengths(norms: Norms) -> bool:
    return 0 <= norms.low <= norms.median <= norms.high < math.inf and norms.high > 0


def check_probe(probe: Probe) -> None:
    """Raise InvalidArgument for numbers that no measurement gives."""
    if not 1 <= len(probe.effects) <= MAX_PROBED_TASKS:
        raise InvalidArgument(f"a probe has 1 to {MAX_PROBED_TASKS} effects", field="probe.effects")
    if len(probe.base_model_id) > MAX_BASE_MODEL_ID_CHARACTERS or probe.dtype not in SERVING_DTYPES:
        raise InvalidArgument("a probe names the model and the dtype that it was made with", field="probe")
    for effect in probe.effects:
        # Rounding may put a mean a little above the highest.
        are_divergences = 0 <= effect.mean_kl <= 1.001 * effect.max_kl < math.inf
        if (
            not are_divergences
            or (effect.task or 0) < 0
            or not 0 <= effect.num_flips <= effect.num_prompts
            or effect.num_prompts < 1
        ):
            raise InvalidArgument("the numbers of an effect contradict each other", field="probe.effects")


def choose_base_model(
    models: Sequence[BaseModel], wanted_id: str, announced_lately: Collection[str] = ()
) -> BaseModel:
    """The base model a registration is for: the named one, or the only one there is.

    Args:
        announced_lately: ids of those that are served; where there are any, the others are there by name alone.
    """
    known = _first([model.id for model in models])
    if not models:
        raise BaseModelUnknown(
            "the registry knows no base model to check the adapter against; start the inference service, which "
            "tells of its model, or call PutBaseModel",
            field="base_model_id",
        )
    if not wanted_id:
        served = [model for model in models if model.id in announced_lately] or models
        if len(served) > 1:
            choices = _first([model.id for model in served])
            raise InvalidArgument(f"several base models are known; choose one of {choices}", field="base_model_id")
        return served[0]
    for model in models:
        if model.id == wanted_id:
            return model
    raise BaseModelUnknown(f"no base model {shown(wanted_id)} is known; known are {known}", field="base_model_id")


def check_name_is_free_of_models(name: str, models: Iterable[BaseModel]) -> None:
    """Raise InvalidArgument when an adapter would be spelled like a base model."""
    for model in models:
        check_full_name(name, base_model_id=model.id)


def warnings_for(config_json: str, base: BaseModel, row_norms: Norms | None = None) -> tuple[str, ...]:
    """What a person should know of a registration that was accepted."""
    found = (_trained_on_another(config_json, base), norm_warning(row_norms, base.vocabulary_norms))
    return tuple(filter(None, found))


def _trained_on_another(config_json: str, base: BaseModel) -> str:
    trained_on = json.loads(config_json).get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on:
        return ""
    last_part = trained_on.rstrip("/").rpartition("/")[2]
    if last_part.lower() == base.id.rpartition("/")[2].lower():
        return ""
    return f"the config says it was trained on {shown(trained_on)}; it was checked against {shown(base.id)}"


def nearest_name(name: str, names: Iterable[str]) -> str:
    """The existing name a person most likely meant; "" when none is near."""
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return near[0] if near else ""


def pinned(name: str, numbers: Sequence[int]) -> AdapterInUse:
    """The error for deleting pinned versions."""
    spellings = _first([f"{local_name(name)}@{number}" for number in numbers])
    verb = "is" if len(numbers) == 1 else "are"
    return AdapterInUse(f"{spellings} {verb} pinned; lift the pin first", field="adapter")


def aliased(name: str, number: int, aliases: Sequence[str]) -> AdapterInUse:
    """The error for deleting a version that aliases point to."""
    which = f"the alias {aliases[0]} points" if len(aliases) == 1 else f"the aliases {_first(aliases)} point"
    return AdapterInUse(
        f"{which} to {local_name(name)}@{number}; move or remove first what points there", field="adapter"
    )


def _first(words: Sequence[str]) -> str:
    """The first of many words, and how many more there are: a status does not carry long messages."""
    more = f" and {len(words) - _MAX_NAMED} more" if len(words) > _MAX_NAMED else ""
    return ", ".join(words[:_MAX_NAMED]) + more


def not_found(
    ref: AdapterRef, *, latest: int | None = None, aliases: Iterable[str] = (), near: str = ""
) -> AdapterNotFound:
    """The error for a spelling that names no version.

    Args:
        latest: the name's latest version, when the name exists.
        aliases: the name's aliases.
        near: what the caller most likely meant, as its tenant calls it; "" when none is near.

    Names are told as their tenant calls them.
    """
    if ref.digest:
        return AdapterNotFound(f"no adapter has the digest {ref.digest}", field="adapter")
    name = local_name(ref.name)
    if latest is not None:
        lacks = f"alias {shown(ref.alias)}" if ref.alias else f"version {ref.version}"
        meant = nearest_name(ref.alias, aliases)
        return AdapterNotFound(
            f"{name} has no {lacks}; {name} alone stands for version {latest}",
            field="adapter",
            details={"did_you_mean": f"{name}@{meant}"} if meant else {},
        )
    if not near:
        return AdapterNotFound(f"there is no adapter {shown(name)}", field="adapter")
    message = f"there is no adapter {shown(name)}; did you mean {shown(near)}?"
    return AdapterNotFound(message, field="adapter", details={"did_you_mean": near})


def page_size(wanted: int) -> int:
    """The size of a page; InvalidArgument outside 0 … MAX_PAGE_SIZE."""
    if not 0 <= wanted <= MAX_PAGE_SIZE:
        raise InvalidArgument(f"page_size must be 1 to {MAX_PAGE_SIZE}, or 0 for the default", field="page_size")
    return wanted or DEFAULT_PAGE_SIZE


def page_token(query: str, after: str) -> str:
    """An opaque token for the page of `query` that begins after the item `after`."""
    return base64.urlsafe_b64encode(f"{_check(query, after)}{after}".encode()).decode()


def page_start(token: str, query: str) -> str:
    """The item a page begins after, "" for the first page; InvalidArgument for a token of anything else."""
    if not token:
        return ""
    try:
        text = base64.b64decode(token.encode("ascii"), altchars=b"-_", validate=True).decode("ascii")
    except (binascii.Error, ValueError):
        text = ""
    check, after = text[:_CHECK_CHARACTERS], text[_CHECK_CHARACTERS:]
    if not after or check != _check(query, after):
        raise foreign_token()
    return after


def foreign_token() -> InvalidArgument:
    """The error for a page token of another list, or of none."""
    return InvalidArgument("page_token is not from the page before of this list", field="page_token")


def _check(query: str, after: str) -> str:
    # Not a secret: it tells a token of another list, or a mangled one, from one of ours.
    return hashlib.sha256(f"{query}\n{after}".encode()).hexdigest()[:_CHECK_CHARACTERS]


def too_many_writers(name: str) -> Overloaded:
    """The error when a name kept changing under every attempt to publish."""
    return Overloaded(f"too many writers change {shown(local_name(name))} at this moment; try again")
