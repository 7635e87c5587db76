"""Soft prompts and LoRAs over one base model: in one process with `LLM`, or through the services of a system.

    from softprompt import LLM, PromptAdapterRequest, SamplingParams

    llm = LLM(model="HuggingFaceTB/SmolLM2-135M-Instruct")
    adapter = PromptAdapterRequest("tweet_adapter", 1, "examples/adapters/tweet_adapter")
    outputs = llm.generate(["…"], SamplingParams(temperature=0), prompt_adapter_request=adapter)

Importing this package does not import torch; using `LLM` does.
"""

from typing import TYPE_CHECKING, Any

from softprompt_api.params import SamplingParams
from softprompt_api.structured import StructuredOutputsParams

from softprompt.errors import MissingExtra, SoftpromptError
from softprompt.outputs import CompletionOutput, Logprob, RequestOutput
from softprompt.requests import LoRARequest, PromptAdapterRequest

if TYPE_CHECKING:
    from softprompt.gateway import GatewayClient
    from softprompt.llm import LLM
    from softprompt.registry import AdapterInfo, RegistryClient

__all__ = [
    "LLM",
    "AdapterInfo",
    "CompletionOutput",
    "GatewayClient",
    "LoRARequest",
    "Logprob",
    "MissingExtra",
    "PromptAdapterRequest",
    "RegistryClient",
    "RequestOutput",
    "SamplingParams",
    "SoftpromptError",
    "StructuredOutputsParams",
]

# Imported when first used: the one needs torch, the others take a while to import.
_LAZY = {
    "LLM": "softprompt.llm",
    "AdapterInfo": "softprompt.registry",
    "GatewayClient": "softprompt.gateway",
    "RegistryClient": "softprompt.registry",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        if name != "LLM" or (error.name or "").startswith("softprompt"):
            raise
        raise MissingExtra(
            f"LLM needs {error.name}, which is not installed: pip install 'softprompt[inference]'"
        ) from error


def __dir__() -> list[str]:
    return __all__
