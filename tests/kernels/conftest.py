"""Kernels run on a GPU where there is one, else in Triton's interpreter."""

import os

import pytest
import torch

# Read by Triton when a kernel is defined, that is when its module is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    """Where kernels run in this test session."""
    pytest.importorskip("triton")
    return "cuda" if torch.cuda.is_available() else "cpu"
