"""Kernels run in Triton's interpreter on a machine without a GPU, else on the GPU."""

from collections.abc import Iterator

import pytest
import torch
from softprompt_kernels import native


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


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The native kernels as a library, compiled once."""
    try:
        native.load(tmp_path_factory.mktemp("kernels"))
    except native.CannotCompile as error:
        pytest.skip(str(error))
    library = native._library
    native.unload()
    return library


@pytest.fixture
def native_kernels(torch_only: None, compiled_kernels: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Native kernels are in use during the test."""
    monkeypatch.setattr(native, "_library", compiled_kernels)


@pytest.fixture(autouse=True)
def torch_only() -> Iterator[None]:
    """A test that wants native kernels says so; whatever ran before in this process, others do without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_library", None)
        yield
