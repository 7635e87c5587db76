"""What a config says of an adapter, once everything else in it was found harmless."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Shape = tuple[int, ...]


class AdapterKind(StrEnum):
    """How an adapter acts on the model, by PEFT's names."""

    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    CPT = "CPT"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """A parsed config.

    Attributes:
        kind: how the adapter acts on the model.
        num_virtual_tokens: rows of the adapter, at least 1.
        hidden_size: width of a row (PEFT's `token_dim`).
        canonical_config: JSON with sorted keys of only what changes the maths; part of the digest.
    """

    kind: AdapterKind
    num_virtual_tokens: int
    hidden_size: int
    canonical_config: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFormat:
    """One kind's files: everything the parser and the verifier must know of it.

    Attributes:
        kind: the kind.
        keys: the config keys it may have, each with a check that raises AdapterInvalid.
        spec: makes the spec of a config whose keys were all checked.
        tensors: names and shapes of exactly the tensors its file must hold.
    """

    kind: AdapterKind
    keys: Mapping[str, Callable[[str, Any], None]]
    spec: Callable[[Mapping[str, Any]], AdapterSpec]
    tensors: Callable[[AdapterSpec], Mapping[str, Shape]]
