"""Kernels run in Triton's interpreter on a machine without a GPU, else on the GPU."""

import pytest
import torch


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel runs: "cpu" is Triton's interpreter, which tests/conftest.py switches on."""
    triton = pytest.importorskip("triton")
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    if name == "cpu" and not triton.knobs.runtime.interpret:
        pytest.skip("Triton compiles for the GPU of this machine")
    return name
