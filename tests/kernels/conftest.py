"""Kernels run in Triton's interpreter on a machine without a GPU, else on the GPU."""

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from softprompt_inference.model.source import native_kernels_dir
from softprompt_kernels import native
from softprompt_kernels.lora_tiles import LoraTiles, cut_tiles


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a kernel runs: "cpu" is Triton's interpreter, which tests/conftest.py switches on."""
    triton = pytest.importorskip("triton")
    name: str = request.param
    if name == "cpu":
        if not triton.knobs.runtime.interpret:
            pytest.skip("Triton compiles for the GPU of this machine")
        request.getfixturevalue("builtins_found_once")
    return name


@pytest.fixture(scope="session")
def builtins_found_once() -> Iterator[None]:
    """Triton's interpreter exchanges the language's builtins whenever a function of a kernel is called.

    It would look for them among all members each time, which takes longer than what most functions do.
    """
    from triton.language import core
    from triton.runtime import interpreter

    @functools.cache
    def names(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if core.is_builtin(member)]

    def exchange(package: object, *others: object) -> None:
        if not core.is_builtin(getattr(package, names(package)[0])):
            return  # for a function that calls this one
        for name in names(package):
            interpreter._patch_attr(package, name, getattr(package, name), *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_builtin", exchange)
        yield


@pytest.fixture(scope="session")
def compiled_kernels() -> object:
    """The native kernels as a library, compiled once for all tests and the systems that they start."""
    try:
        native.load(native_kernels_dir())
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


@pytest.fixture(scope="session")
def popular_slots() -> Callable[[str, int], list[int]]:
    """`popular_slots(popularity, num_tokens)`: slots 0 … 4 of a batch's tokens, and −1 for some."""

    def make(popularity: str, num_tokens: int) -> list[int]:
        generator = random.Random(num_tokens)
        match popularity:
            case "identical":
                return [3] * num_tokens
            case "distinct":
                return [(token % 6) - 1 for token in range(num_tokens)]
            case "uniform":
                return [generator.randrange(-1, 5) for _ in range(num_tokens)]
            case "zipf":
                weights = [1 / (rank + 1) for rank in range(6)]
                return generator.choices([2, -1, 4, 0, 1, 3], weights, k=num_tokens)
            case "skewed":
                return [4 if token % 50 == 7 else 1 for token in range(num_tokens)]
            case "none":
                return [-1] * num_tokens
        raise AssertionError(popularity)

    return make


@pytest.fixture(scope="session")
def make_tiles() -> Callable[..., LoraTiles]:
    """`make_tiles(slots, max_tokens, device)`, with two empty tiles at the end, as static buffers have."""

    def make(slots: Sequence[int], max_tokens: int, device: str) -> LoraTiles:
        order, tiles = cut_tiles(slots, max_tokens)
        return LoraTiles(
            order=torch.tensor(order, dtype=torch.int64, device=device),
            tiles=torch.tensor([*tiles, (0, 0, 0), (0, 0, 0)], dtype=torch.int32, device=device),
            max_tokens=max_tokens,
        )

    return make
