"""Which base models the replicas serve, and which of them a request or an adapter is for."""

from collections.abc import Iterable, Iterator

from softprompt_api.errors import AdapterInvalid, BaseModelUnknown, InvalidArgument
from softprompt_api.inference.v1.inference_pb2 import GetModelResponse
from softprompt_api.names import shown, split_model
from softprompt_api.registry.v1.registry_pb2 import AdapterVersion, BaseModel

Fingerprint = tuple[str | int, ...]

# What tells models of one id apart, as far as adapters depend on it.
SHAPE = ("architecture", "hidden_size", "num_layers", "num_kv_heads", "head_dim", "vocab_size")


def fingerprint(model: BaseModel) -> Fingerprint:
    """What tells base models apart; replicas with the same one stand in for each other."""
    return (model.id, model.tokenizer_sha256, *(getattr(model, name) for name in SHAPE))


class Bases:
    """Base models, each once, in the order in which they were told.

    Args:
        told: what replicas say of themselves.
        is_whole: whether every replica has said something.
    """

    def __init__(self, told: Iterable[GetModelResponse] = (), *, is_whole: bool = False) -> None:
        different: dict[Fingerprint, GetModelResponse] = {}
        for served in told:
            different.setdefault(fingerprint(served.base_model), served)
        self._every = list(different.values())
        self._by_id: dict[str, GetModelResponse] = {}
        for served in self._every:
            self._by_id.setdefault(served.base_model.id, served)
        self._is_whole = is_whole

    def __bool__(self) -> bool:
        return bool(self._every)

    def __iter__(self) -> Iterator[GetModelResponse]:
        """What is listed: one for each id."""
        return iter(self._by_id.values())

    @property
    def are_several(self) -> bool:
        """Whether replicas differ in what they serve."""
        return len(self._every) > 1

    @property
    def ids(self) -> list[str]:
        """How requests name them."""
        return list(self._by_id)

    @property
    def sole_id(self) -> str:
        """The id of the base model that all replicas are known to serve; "" where there is none such."""
        return self.ids[0] if self._is_whole and len(self._by_id) == 1 else ""

    def only(self) -> GetModelResponse:
        """The base model where there is one; InvalidArgument where a request must name one of several."""
        if len(self._by_id) > 1:
            raise InvalidArgument(f"several base models are served; name one of {self._choices()}", field="model")
        return self._every[0]

    def split(self, model: str) -> tuple[GetModelResponse | None, list[str]]:
        """The base model that `model` names, if it names one, and the adapters that it puts together."""
        before_colon = [id_ for id_ in self._by_id if model.startswith(f"{id_}:")]
        named = model if model in self._by_id else max(before_colon, key=len, default=None)
        # Where none is named, there is none of them to take away.
        adapters = split_model(model, base_model_id=self.ids[0] if named is None else named)
        return None if named is None else self._by_id[named], adapters

    def of(self, version: AdapterVersion) -> GetModelResponse:
        """The base model that an adapter is for; BaseModelUnknown where none is served."""
        base = self.find(version)
        if base is None:
            raise BaseModelUnknown(
                f"the adapter {shown(version.name, 128)} is for the base model "
                f"{shown(version.base_model.id, 256)}, which no replica serves; served are {self._choices()}",
                field="model",
            )
        return base

    def find(self, version: AdapterVersion) -> GetModelResponse | None:
        """The base model that an adapter is for: of its id, and of its shape where several have that id.

        Where all replicas serve the same, its name may have changed since.
        """
        made_for = version.base_model
        same = [served for served in self._every if served.base_model.id == made_for.id]
        if not same and self._is_whole and len(self._every) == 1:
            same = self._every
        if len(same) > 1:
            return next((served for served in same if _fits(made_for, served.base_model)), same[0])
        return same[0] if same else None

    def _choices(self) -> str:
        return ", ".join(shown(id_, 256) for id_ in self._by_id)


def _fits(made_for: BaseModel, base: BaseModel) -> bool:
    """Whether a version was registered for this shape, as far as it tells."""
    return all(getattr(made_for, name) in (0, "", getattr(base, name)) for name in SHAPE)


def check_size(version: AdapterVersion, base: BaseModel) -> None:
    """Raise AdapterInvalid for more virtual tokens, or a higher rank, than replicas of the model take."""
    for what, size, limit in (
        ("virtual tokens", version.num_virtual_tokens, base.max_virtual_tokens),
        ("as its rank", version.rank, base.max_lora_rank),
    ):
        if limit and size > limit:
            raise AdapterInvalid(
                f"the adapter {shown(version.name, 128)} has {size} {what}; at most {limit} are served",
                field="model",
            )


def is_served(version: AdapterVersion, base: BaseModel) -> bool:
    """Whether replicas of the model take a version of this size."""
    try:
        check_size(version, base)
    except AdapterInvalid:
        return False
    return True
