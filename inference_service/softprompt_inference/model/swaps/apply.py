"""Which swaps there are, and in which order they are tried."""

import logging
from collections.abc import Callable

from torch import nn

from softprompt_inference.model.lora.context import LoraContext
from softprompt_inference.model.swaps import (
    activation,
    deferred_rotary,
    gated,
    layers,
    linears,
    norms,
    residuals,
    rotary,
    stacks,
    whole_model,
)
from softprompt_inference.model.swaps.verify import Swap, verify

_log = logging.getLogger(__name__)


def apply_swaps(model: nn.Module, lora: LoraContext, run: Callable[[], object], *, max_positions: int) -> None:
    """Replace what can be computed faster, in place; whatever does not verify stays as it was.

    Args:
        lora: of the steps to come.
        run: runs the model once on a few tokens.
        max_positions: longest sequence it will be given.
    """
    finders: tuple[tuple[str, Callable[[], list[Swap]]], ...] = (
        ("norms", lambda: norms.find(model)),
        ("rotary embeddings", lambda: rotary.find(model)),
        ("activations", lambda: activation.find(model)),
        ("gated MLPs", lambda: gated.find(model, lora)),
        ("linears", lambda: linears.find(model, run)),
        ("decoder layers", lambda: layers.find(model, lora)),
        ("rotary embeddings with attention", lambda: deferred_rotary.find(model, run)),
        ("residual sums", lambda: residuals.find(model, run)),
        ("stacks of decoder layers", lambda: stacks.find(model, run)),
        ("whole models", lambda: whole_model.find(model, run, max_positions=max_positions)),
    )
    for kind, find in finders:
        swaps = find()
        found, kept = len(swaps), 0
        # One at a time: a swap that is done lets go of the weights it replaced.
        while swaps:
            kept += verify(swaps.pop())
        if found:
            _log.info("%s: %d of %d replaced", kind, kept, found)
