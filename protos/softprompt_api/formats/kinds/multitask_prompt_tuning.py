"""PEFT MULTITASK_PROMPT_TUNING: one prompt that all tasks share, times a matrix of low rank for each task."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from softprompt_api.formats import checks
from softprompt_api.formats.common_keys import INIT_KEYS, PROMPT_KEYS, peft_prompt_keys
from softprompt_api.formats.content import Content, Rows
from softprompt_api.formats.safetensors_header import Shape, TensorInfo
from softprompt_api.formats.spec import (
    AdapterFormat,
    AdapterSpec,
    ModelShape,
    RawTensor,
    Role,
    canonical_json,
    check_equal,
    check_virtual_tokens,
)
from softprompt_api.formats.values import as_float32, check_values

_SHARED, _COLS, _ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
# What all tasks together may have to be checked when they are registered: seconds at most, in 64 MiB.
_MAX_TASKS, _MAX_VALUES, _MAX_PRODUCTS = 4096, 2**24, 2**26
_SIZES = ("num_virtual_tokens", "token_dim", "num_tasks", "num_ranks")


@dataclass(frozen=True, slots=True, kw_only=True)
class MultitaskSpec(AdapterSpec):
    """The shared prompt, and for each task two matrices of `num_ranks` columns and rows."""

    num_ranks: int

    def check_fits(self, model: ModelShape) -> None:
        """See AdapterSpec."""
        check_equal("hidden size", self.hidden_size, model.hidden_size, field="token_dim")
        check_virtual_tokens(self.num_virtual_tokens, model)

    def expected_tensors(self, found: Mapping[str, TensorInfo]) -> Mapping[str, Shape]:  # noqa: ARG002
        """See AdapterSpec."""
        return {
            _SHARED: (self.num_virtual_tokens, self.hidden_size),
            _COLS: (self.num_tasks, self.num_virtual_tokens, self.num_ranks),
            _ROWS: (self.num_tasks, self.num_ranks, self.hidden_size),
        }

    def read(self, tensors: Mapping[str, RawTensor], *, task: int | None, dtype: str) -> Content:
        """The task's own prompt, in float32: shared * (cols[task] @ rows[task])."""
        assert task is not None
        return Rows(
            data=_prompt(_arrays(tensors), task, dtype).astype("<f4").tobytes(),
            dtype="float32",
            num_virtual_tokens=self.num_virtual_tokens,
            row_size=self.hidden_size,
        )

    def peft_keys(self, found: Mapping[str, TensorInfo]) -> Mapping[str, object]:  # noqa: ARG002
        """See AdapterSpec."""
        return {
            **peft_prompt_keys(self.num_virtual_tokens, self.hidden_size),
            "num_tasks": self.num_tasks,
            "num_ranks": self.num_ranks,
        }

    def can_check_tasks(self) -> bool:
        """See AdapterSpec."""
        num_products = self.num_tasks * self.num_virtual_tokens * self.hidden_size
        num_values = sum(math.prod(shape) for shape in self.expected_tensors({}).values())
        return self.num_tasks <= _MAX_TASKS and num_values <= _MAX_VALUES and num_products <= _MAX_PRODUCTS

    def check_tasks(self, tensors: Mapping[str, RawTensor], *, dtype: str) -> None:
        """See AdapterSpec: each tensor alone can be served, but not always their product."""
        arrays = _arrays(tensors)
        for task in range(self.num_tasks):
            _prompt(arrays, task, dtype)


def _arrays(tensors: Mapping[str, RawTensor]) -> list[np.ndarray]:
    """The shared prompt, columns and rows, in float32."""
    return [
        as_float32(tensors[name].data, tensors[name].info.dtype).reshape(tensors[name].info.shape)
        for name in (_SHARED, _COLS, _ROWS)
    ]


def _prompt(arrays: Sequence[np.ndarray], task: int, dtype: str) -> np.ndarray:
    shared, cols, rows = arrays
    with np.errstate(over="ignore", invalid="ignore"):  # the check below says where
        prompt: np.ndarray = shared * (cols[task] @ rows[task])
    check_values(prompt, f"prompt of task {task}", dtype)
    return prompt


def _spec(config: Mapping[str, Any]) -> AdapterSpec:
    checks.require(config, *_SIZES)
    num_virtual_tokens, hidden_size, num_tasks, num_ranks = (config[key] for key in _SIZES)
    kind = "MULTITASK_PROMPT_TUNING"
    return MultitaskSpec(
        kind=kind,
        num_virtual_tokens=num_virtual_tokens,
        hidden_size=hidden_size,
        num_tasks=num_tasks,
        num_ranks=num_ranks,
        canonical_config=canonical_json(
            kind=kind,
            num_virtual_tokens=num_virtual_tokens,
            hidden_size=hidden_size,
            num_tasks=num_tasks,
            num_ranks=num_ranks,
        ),
    )


FORMAT = AdapterFormat(
    kind="MULTITASK_PROMPT_TUNING",
    role=Role.EMBEDDINGS,
    keys=MappingProxyType(
        {
            **PROMPT_KEYS,
            **INIT_KEYS,
            "num_tasks": checks.size,
            "num_ranks": checks.size,
            "prompt_tuning_init_task": checks.count,
            # Kept as text; what it names was read when the prompt was trained.
            "prompt_tuning_init_state_dict_path": checks.text,
        }
    ),
    spec=_spec,
)
