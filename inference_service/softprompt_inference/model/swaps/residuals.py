"""The residual sum that ends a decoder layer in one pass with the norm that reads it: the next one's, or the last.

On a GPU only: there each launch that is saved counts, and on CPUs `stacks` saves more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from softprompt_kernels.rmsnorm import add_rms_norm
from torch import Generator, Tensor, nn

from softprompt_inference.model.swaps.forward import run_hooked, swap_forward, together
from softprompt_inference.model.swaps.norms import Norm, fused_norm, layer_terms, recognise, run_layer
from softprompt_inference.model.swaps.verify import Swap


@torch.inference_mode()
def find(model: nn.Module, run: Callable[[], object], *, everywhere: bool = False) -> list[Swap]:
    """The layers of Llama's shape whose answer a norm reads, as they show in one run of the model.

    Args:
        everywhere: on a CPU too.
    """
    layers = {
        layer: norm
        for layer in model.modules()
        if (norm := fused_norm(layer)) is not None and (everywhere or norm.weight.device.type == "cuda")
    }
    swaps = []
    for layer, reader in _observe(model, list(layers), run):
        norm = recognise(reader)
        if norm is not None:
            swaps.append(_swap(layer, layers[layer], norm))
    return swaps


def _observe(
    model: nn.Module, layers: Sequence[nn.Module], run: Callable[[], object]
) -> list[tuple[nn.Module, nn.Module]]:
    """Each of the layers whose answer is what a norm is given, and that norm."""
    answers: list[tuple[nn.Module, Tensor]] = []
    pairs: list[tuple[nn.Module, nn.Module]] = []

    def answered(layer: nn.Module, _: Any, answer: Tensor) -> None:
        answers.append((layer, answer))

    def given(norm: nn.Module, args: Any) -> None:
        pairs.extend((layer, norm) for layer, answer in answers if args and args[0] is answer)

    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    hooks = [layer.register_forward_hook(answered) for layer in layers]
    hooks += [norm.register_forward_pre_hook(given) for norm in norms]
    run_hooked(run, hooks)
    return pairs


class _Handover:
    """A layer's forward that computes its reader's answer too, and the reader's, which then finds it computed."""

    def __init__(self, layer: nn.Module, within: Norm, reader: Norm) -> None:
        self._layer = layer
        self._within = within
        self._reader = reader
        self._read: Callable[[Tensor], Tensor] = reader.module.forward
        self._computed: tuple[Tensor, Tensor] | None = None

    def sum(self, hidden_states: Tensor, **others: Any) -> Tensor:
        """The layer's forward: [1, T, hidden]."""
        residual, added = layer_terms(self._layer, self._within, hidden_states, **others)
        norm = self._reader
        normed, total = add_rms_norm(added, residual, norm.weight, eps=norm.eps, unit_offset=norm.unit_offset)
        self._computed = total, normed
        return total

    def norm(self, hidden_states: Tensor) -> Tensor:
        """The reader's forward: [1, T, hidden]."""
        computed, self._computed = self._computed, None
        if computed is None or hidden_states is not computed[0]:
            return self._read(hidden_states)
        return computed[1]


def _swap(layer: nn.Module, within: Norm, reader: Norm) -> Swap:
    handover = _Handover(layer, within, reader)

    def run(generator: Generator) -> Tensor:
        total = run_layer(layer, layer.forward, within, generator)
        return torch.cat([total, reader.module(total)])

    parts = [
        swap_forward(layer, handover.sum, name="", run=run),
        swap_forward(reader.module, handover.norm, name="", run=run),
    ]
    return together(parts, name="a layer's residual sum with the next rmsnorm", run=run)
