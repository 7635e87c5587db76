"""The masks that a model asks transformers for, whose windows must be those of its attention.

A model is loaded with an attention that transformers has no masks for, so it gets none. Some models give a window
to the mask alone, and it would be lost; some to an attention of theirs that does not look at it, and ours would.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionMaskInterface

from softprompt_inference.model.attention import ATTENTION

# A query so far behind the first position that any window ends before it.
_FAR = 2**20
_LATER = 4


class MaskRecorder:
    """Is asked for masks, and makes none.

    Attributes:
        windows: of all that it was asked for: positions a query sees, itself among them; None: all.
        sees_later: whether one of them shows a query what comes behind it.
    """

    def __init__(self) -> None:
        self.windows: set[int | None] = set()
        self.sees_later = False

    def __call__(self, *_: Any, mask_function: Any, **__: Any) -> None:
        """transformers' mask interface."""
        keys = torch.arange(_FAR + 1 + _LATER)
        zero = torch.zeros((), dtype=torch.long)
        visible = torch.as_tensor(mask_function(zero, zero, zero + _FAR, keys)).expand_as(keys)
        self.windows.add(None if visible[0] else int(visible[: _FAR + 1].sum()))
        self.sees_later |= bool(visible[_FAR + 1 :].any())


@contextmanager
def recorded_masks() -> Iterator[MaskRecorder]:
    """Note the masks that models with our attention ask for meanwhile."""
    recorder = MaskRecorder()
    AttentionMaskInterface.register(ATTENTION, recorder)
    try:
        yield recorder
    finally:
        del AttentionMaskInterface._global_mapping[ATTENTION]
