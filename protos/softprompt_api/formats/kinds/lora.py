"""PEFT LORA: for each of some linear layers, two matrices of low rank whose scaled product is added to its weight.

A module's rank and scale follow from the config: `r` and `lora_alpha`, or what the first key of `rank_pattern` and
`alpha_pattern` says that matches the module's name, by PEFT's rule (`get_pattern_key`). Which modules there are is
told by the tensors; where the config lists others, the file is refused.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from softprompt_api.errors import AdapterInvalid
from softprompt_api.formats import checks
from softprompt_api.formats.common_keys import GENERAL_KEYS
from softprompt_api.formats.content import Content, Lora, LoraModule
from softprompt_api.formats.patterns import Patterns, pattern_map, values_of
from softprompt_api.formats.safetensors_header import Shape, TensorInfo, tensor_invalid
from softprompt_api.formats.spec import (
    AdapterFormat,
    AdapterSpec,
    ModelShape,
    RawTensor,
    Role,
    canonical_json,
)
from softprompt_api.formats.targets import Targets, targets_of
from softprompt_api.formats.values import FLOAT_DTYPES

_TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>[\w.]{1,256})\.lora_(?P<matrix>[AB])\.weight", re.ASCII)
_HEADS = frozenset({"lm_head", "embed_out"})


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec(AdapterSpec):
    """Ranks and scales of modules by their names, which end as those of tensors do: `….self_attn.q_proj`."""

    r: int
    alpha: float
    use_rslora: bool
    rank_pattern: Patterns
    alpha_pattern: Patterns
    targets: Targets = field(compare=False)

    def check_fits(self, model: ModelShape) -> None:
        """See AdapterSpec; which modules a model has is known where it is loaded."""

    def ranks(self, modules: Iterable[str]) -> dict[str, int]:
        """The rank of each module's matrices."""
        return {module: int(rank) for module, rank in values_of(self.rank_pattern, modules, self.r).items()}

    def scales(self, modules: Collection[str]) -> dict[str, float]:
        """What the product of each module's matrices is multiplied by."""
        ranks, alphas = self.ranks(modules), values_of(self.alpha_pattern, modules, self.alpha)
        return {
            module: alphas[module] / (math.sqrt(ranks[module]) if self.use_rslora else ranks[module])
            for module in modules
        }

    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:
        """See AdapterSpec."""
        expected: dict[str, Shape] = {}
        modules = _modules(found)
        self.targets.check(modules)
        for module, rank in self.ranks(modules).items():
            a, b = _names(module)
            # Of a matrix that is missing, its name is all that counts.
            _, in_features = found[a].shape if a in found else (0, 0)
            out_features, _ = found[b].shape if b in found else (0, 0)
            expected |= {a: (rank, in_features), b: (out_features, rank)}
        return expected

    def read(self, tensors: Mapping[str, RawTensor], *, task: int | None, dtype: str) -> Content:  # noqa: ARG002
        """See AdapterSpec."""
        # They were checked: each module has both, and nothing else is there.
        matches = map(_TENSOR_NAME.fullmatch, tensors)
        names = sorted({match["module"] for match in matches if match})
        return Lora(
            modules=tuple(
                _module(name, scale, *(tensors[tensor] for tensor in _names(name)))
                for name, scale in self.scales(names).items()
            )
        )

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:
        """See AdapterSpec."""
        return {
            "r": self.r,
            "lora_alpha": self.alpha,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "target_modules": _modules(found),
            "bias": "none",
        }

    def max_values(self) -> int | None:
        """See AdapterSpec."""
        return None

    def max_rank(self, found: Mapping[str, TensorInfo]) -> int:
        """See AdapterSpec; their shapes tell it, which were compared with the config."""
        return max(info.shape[0] for name, info in found.items() if name.endswith(".lora_A.weight"))


def _modules(found: Mapping[str, TensorInfo]) -> list[str]:
    """The modules that have matrices, in order of their names; AdapterInvalid where a tensor is no such matrix."""
    modules: set[str] = set()
    for name, info in found.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None:
            raise tensor_invalid(
                name,
                "is not supported in a LORA adapter, which has base_model.model.*.lora_A.weight and "
                "*.lora_B.weight of linear layers alone",
            )
        module = match["module"]
        if module.rpartition(".")[2] in _HEADS:
            raise tensor_invalid(name, "belongs to the model's head; supported: linear layers below it")
        if len(info.shape) != 2 or 0 in info.shape:
            raise tensor_invalid(name, f"has shape {list(info.shape)}; a LORA matrix has two sizes from 1")
        a, b = (found.get(other) for other in _names(module))
        if a is not None and b is not None and a.dtype != b.dtype:
            raise tensor_invalid(name, f"is one of a pair with dtypes {a.dtype} and {b.dtype}; both must have one")
        modules.add(module)
    if not modules:
        raise AdapterInvalid(
            "the file has no tensors, and a LORA adapter has two for each module", field="tensors"
        )
    return sorted(modules)


def _names(module: str) -> tuple[str, str]:
    return (f"base_model.model.{module}.lora_A.weight", f"base_model.model.{module}.lora_B.weight")


def _module(name: str, scale: float, a: RawTensor, b: RawTensor) -> LoraModule:
    rank, in_features = a.info.shape
    return LoraModule(
        name=name,
        rank=rank,
        scale=scale,
        in_features=in_features,
        out_features=b.info.shape[0],
        a=a.data,
        b=b.data,
        dtype=FLOAT_DTYPES[a.info.dtype],
    )


def _check_init(key: str, value: Any) -> None:
    # PEFT reads 'Gaussian' as 'gaussian', and no other so.
    is_gaussian = isinstance(value, str) and value.lower() == "gaussian"
    if not is_gaussian and value not in (None, True, False, "eva", "orthogonal", "mica"):
        checks.unsupported(
            key,
            value,
            "true, false, 'gaussian', 'eva', 'orthogonal', 'mica', or converted by "
            "save_pretrained(path_initial_model_for_weight_conversion=...)",
            because="which changes the model's own weights",
        )


def _off(feature: str) -> checks.Check:
    return checks.unused(f"but {feature} not supported; train plain LoRA")


def _spec(config: Mapping[str, Any]) -> AdapterSpec:
    checks.require(config, "r")
    checks.factor("lora_alpha", config.get("lora_alpha"))
    values: dict[str, Any] = {
        "r": config["r"],
        "alpha": _same_for_equal(config["lora_alpha"]),
        "use_rslora": bool(config.get("use_rslora")),
        # In the config's order: the first pattern that matches counts.
        "rank_pattern": tuple((config.get("rank_pattern") or {}).items()),
        "alpha_pattern": tuple(
            (pattern, _same_for_equal(alpha)) for pattern, alpha in (config.get("alpha_pattern") or {}).items()
        ),
    }
    kind = "LORA"
    canonical = canonical_json(kind=kind, **values)
    return LoraSpec(kind=kind, canonical_config=canonical, targets=targets_of(config), **values)


def _same_for_equal(alpha: float) -> float:
    """8 for 8.0: what computes the same has one digest."""
    return int(alpha) if alpha == int(alpha) else alpha


_KEYS: Mapping[str, checks.Check] = {
    **GENERAL_KEYS,
    "r": checks.size,
    "lora_alpha": checks.factor,
    "use_rslora": checks.flag,
    "rank_pattern": pattern_map(checks.size),
    "alpha_pattern": pattern_map(checks.factor),
    "bias": checks.one_of("none"),
    "init_lora_weights": _check_init,
    # Which modules were trained is told by the tensors, and must be what is meant here; how does not matter now.
    "target_modules": checks.names,
    "exclude_modules": checks.names,
    "layers_pattern": checks.names,
    "layers_to_transform": checks.integers_or_one,
    "lora_dropout": checks.number,
    "fan_in_fan_out": checks.flag,
    "ensure_weight_tying": checks.flag,
    "qalora_group_size": checks.count,
    "eva_config": checks.record,
    "corda_config": checks.record,
    "lora_ga_config": checks.record,
    "use_dora": _off("DoRA is"),
    "alora_invocation_tokens": _off("activated LoRA is"),
    "lora_bias": _off("a bias is"),
    "target_parameters": _off("LoRA on parameters is"),
    "layer_replication": _off("replicated layers are"),
    "trainable_token_indices": _off("trained tokens are"),
    "use_qalora": _off("QALoRA is"),
    "use_bdlora": _off("BD-LoRA is"),
    "loftq_config": _off("LoftQ is"),
    "arrow_config": _off("Arrow is"),
    "kasa_config": _off("KaSA is"),
    "monteclora_config": _off("MonteCLoRA is"),
    "velora_config": _off("VeLoRA is"),
}

FORMAT = AdapterFormat(kind="LORA", role=Role.LORA, keys=MappingProxyType(_KEYS), spec=_spec)
