"""What a config says of an adapter, once everything else in it was found harmless."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats.content import Content
from softprompt_api.formats.safetensors_header import Shape, TensorInfo

DEFAULT_MAX_LORA_RANK = 64


class Role(Enum):
    """What an adapter does for a request."""

    EMBEDDINGS = "embeddings"
    KEY_VALUES = "key values"
    LORA = "lora"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What a base model demands of its adapters. What is 0 or "" is not known, and not checked.

    Attributes:
        hidden_size, num_layers, num_kv_heads, head_dim: the model's.
        max_virtual_tokens: most virtual tokens of one adapter.
        max_lora_rank: highest rank of a LoRA.
        dtype: "float32", "float16" or "bfloat16": what the model computes in.
        no_key_values: why it cannot take keys and values from an adapter.
    """

    hidden_size: int = 0
    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    max_virtual_tokens: int = 0
    max_lora_rank: int = DEFAULT_MAX_LORA_RANK
    dtype: str = ""
    no_key_values: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec(ABC):
    """A parsed config; each family of kinds has a class of its own.

    Attributes:
        kind: how the adapter acts on the model, by PEFT's name.
        canonical_config: JSON with sorted keys of only what changes the maths; part of the digest.
        num_virtual_tokens: positions it puts before the prompt; 0 for kinds that put none.
        hidden_size: the model's, where rows have it (PEFT's `token_dim`); 0 for kinds without such rows.
        num_tasks: tasks to choose from; 0 for kinds without tasks.
    """

    kind: str
    canonical_config: str
    num_virtual_tokens: int = 0
    hidden_size: int = 0
    num_tasks: int = 0

    @abstractmethod
    def check_fits(self, model: ModelShape) -> None:
        """Raise AdapterInvalid, naming the field, where the config does not go with the model."""

    @abstractmethod
    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:
        """Names and shapes of exactly the tensors that its file must hold.

        Args:
            found: the tensors that it holds, for kinds whose config does not say which.
        """

    @abstractmethod
    def read(self, tensors: Mapping[str, "RawTensor"], *, task: int | None, dtype: str) -> Content:
        """What is served, from the tensors of a file that was verified.

        Args:
            task: one of `num_tasks`; None for kinds without tasks.
            dtype: as in ModelShape; what is computed here must be finite in it.
        """

    @abstractmethod
    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:
        """The config keys with which PEFT computes what this says, beside those that every kind has.

        Args:
            found: the tensors of its file.
        """

    def can_check_tasks(self) -> bool:
        """Whether `check_tasks` has something to check, in seconds and little memory."""
        return False

    def check_tasks(self, tensors: Mapping[str, "RawTensor"], *, dtype: str) -> None:  # noqa: ARG002
        """Raise AdapterInvalid for a task that `read` would refuse; arguments as there."""
        assert not self.can_check_tasks()

    def max_values(self) -> int | None:
        """Values that its tensors have together; None where the config does not say."""
        return sum(math.prod(shape) for shape in self.expected_tensors({}).values())

    def embeddings(self) -> str:
        """Name of the tensor whose rows are served in place of token embeddings; "" for kinds without one."""
        return ""

    def max_rank(self, found: Mapping[str, TensorInfo]) -> int:  # noqa: ARG002
        """The highest rank among its matrices; 0 for kinds without ranks to serve."""
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTensor:
    """One tensor of a file with its bytes, row-major and little endian: a part of the file's memory."""

    info: TensorInfo
    data: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFormat:
    """One kind's config.

    Attributes:
        kind: PEFT's name of it (`peft_type`).
        role: what its adapters do for a request.
        keys: the config keys it may have, each with a check that raises AdapterInvalid.
        spec: makes the spec of a config whose keys were all checked.
    """

    kind: str
    role: Role
    keys: Mapping[str, Callable[[str, Any], None]]
    spec: Callable[[Mapping[str, Any]], AdapterSpec]


def canonical_json(**values: object) -> str:
    """A canonical config: the same text for the same values."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def check_equal(what: str, found: int, demanded: int, *, field: str) -> None:
    """Raise AdapterInvalid where an adapter was made for another size; a demand of 0 is none."""
    if demanded and found != demanded:
        raise AdapterInvalid(
            f"the adapter was trained for {what} {found}, the base model has {demanded}", field=f"config.{field}"
        )


def check_virtual_tokens(num_virtual_tokens: int, model: ModelShape) -> None:
    """Raise AdapterInvalid for more virtual tokens than one adapter may have."""
    if model.max_virtual_tokens and num_virtual_tokens > model.max_virtual_tokens:
        raise AdapterInvalid(
            f"the adapter has {num_virtual_tokens} virtual tokens; at most {model.max_virtual_tokens} are "
            "allowed (max_prompt_adapter_token)",
            field="config.num_virtual_tokens",
        )
