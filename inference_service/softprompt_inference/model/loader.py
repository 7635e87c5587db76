"""From a local Hugging Face folder to a model that is ready to serve, or a refusal that names the reason.

Nothing that comes with the model is executed (safetensors only, no remote code), and no weight is left at random.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from softprompt_api.errors import InvalidArgument, Unsupported
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model import hardware
from softprompt_inference.model.attention import ATTENTION, LayerSpec
from softprompt_inference.model.lora.context import LoraContext
from softprompt_inference.model.lora.linears import Linear, find_linears
from softprompt_inference.model.probe import (
    NO_INTERFACE,
    PROBE_TOKENS,
    check_against_eager,
    eager_reference,
    find_layers,
    refused,
    run_once,
)
from softprompt_inference.model.swaps.apply import apply_swaps

# Used for models that name no limit of their own, such as those without learned positions.
DEFAULT_MAX_MODEL_LEN = 4096
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_SUPPORTED = (
    "causal language models whose every layer has full or sliding-window attention through transformers' "
    "attention interface, for example Llama, Mistral, Qwen3, Gemma 2, Phi-3, GPT-2, GPT-NeoX and OPT"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model whose attention has been learned and checked.

    Attributes:
        layers: its attention layers, in the order in which they are called.
        lora: what its linears look at in a step with a LoRA.
        linears: those that a LoRA may change, by their names in the model as it was loaded.
        max_positions: longest sequence it computes rightly.
        keeps_logits: it can compute the logits of chosen rows only.
        weights_bytes: of all weights as they were loaded, shared ones once.
    """

    model: PreTrainedModel
    embedding: nn.Module
    layers: tuple[LayerSpec, ...]
    lora: LoraContext
    linears: list[Linear]
    architecture: str
    device: torch.device
    dtype: torch.dtype
    hidden_size: int
    vocab_size: int
    max_positions: int
    keeps_logits: bool
    weights_bytes: int

    @property
    def no_key_values(self) -> str:
        """Why it cannot take keys and values from adapters; "": it can."""
        if any(layer.sliding_window is not None for layer in self.layers):
            return f"{self.architecture} has sliding-window layers"
        if len({(layer.num_kv_heads, layer.head_dim) for layer in self.layers}) > 1:
            return f"the layers of {self.architecture} have keys of several shapes"
        return ""

    def logits(self, embeddings: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Run the model once.

        embeddings  [T, hidden]
        positions   [T] int64       absolute
        rows        [n] int64       tokens whose logits are wanted
        returns     [n, vocabulary]
        """
        chosen: dict[str, Any] = {"logits_to_keep": rows} if self.keeps_logits else {}
        logits: Tensor = self.model(
            inputs_embeds=embeddings[None], position_ids=positions[None], use_cache=False, **chosen
        ).logits[0]
        return logits if self.keeps_logits else logits[rows]


def load_model(config: EngineConfig, report: Callable[[str], None]) -> LoadedModel:
    """Load, learn and check the model at `config.model_path`.

    Raises:
        Unsupported: the architecture cannot be served rightly; the text says why and what can be.
        InvalidArgument: the folder, device or dtype is not usable.
    """
    device = hardware.choose_device(config.device)
    model_config = _read_config(config.model_path)
    dtype = hardware.choose_dtype(config.dtype, model_config.dtype, device)
    max_positions = _max_positions(model_config)
    if config.max_model_len is not None and config.max_model_len > max_positions:
        raise InvalidArgument(
            f"max_model_len is {config.max_model_len}, but this model computes at most {max_positions} positions "
            "rightly",
            field="max_model_len",
        )
    report(f"loading weights ({_dtype_name(dtype)} on {device})")
    model = _load_weights(config.model_path, model_config, dtype).to(device)
    embedding = model.get_input_embeddings()
    vocab_size, hidden_size = embedding.weight.shape
    report("checking the model's attention")
    try:
        layers = find_layers(model)
        parameters = inspect.signature(model.forward).parameters
        keeps_logits = "logits_to_keep" in parameters
        of_one = {"logits_to_keep": torch.tensor([0], device=device)} if keeps_logits else {}
        if "position_ids" not in parameters:
            raise Unsupported("its forward takes no position_ids")
        loaded = LoadedModel(
            model=model,
            embedding=embedding,
            layers=layers,
            lora=LoraContext(),
            linears=find_linears(
                model, model.get_output_embeddings(), lambda: run_once(model, **of_one), num_tokens=PROBE_TOKENS
            ),
            architecture=type(model).__name__,
            device=device,
            dtype=dtype,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            max_positions=max_positions,
            keeps_logits=keeps_logits,
            weights_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        )
        reference = eager_reference(loaded)
        report("preparing weights")
        if device.type == "cpu":
            _leave_file(model)
        with refused("its forward fails once its weights are prepared"):
            apply_swaps(model, loaded.lora, lambda: run_once(model), max_positions=max_positions)
            check_against_eager(loaded, reference)
    except Unsupported as error:
        raise _unsupported(type(model).__name__, error.message) from error
    return loaded


def _leave_file(model: nn.Module) -> None:
    """Copy the weights that stay as they are. Those of linears will be packed, and then nothing holds the file."""
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.clone()


def _read_config(model_path: str) -> PreTrainedConfig:
    if not (Path(model_path) / "config.json").is_file():
        raise InvalidArgument("the model folder has no config.json", field="model")
    try:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise _unsupported(_named_architecture(model_path), "transformers cannot read its config.json") from error
    name = (config.architectures or [config.model_type])[0]
    if config.is_encoder_decoder:
        raise _unsupported(name, "it is an encoder-decoder")
    if getattr(config, "quantization_config", None) is not None:
        raise _unsupported(name, "its weights are quantized")
    text_config = config.get_text_config()
    strange = set(getattr(text_config, "layer_types", None) or ()) - _LAYER_TYPES
    if strange:
        raise _unsupported(name, f"it has layers of type {', '.join(sorted(strange))}")
    if text_config.model_type == "llama4_text" and text_config.attn_temperature_tuning:
        raise _unsupported(name, "its attention is scaled by a token's place in the batch")
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise _unsupported(name, "transformers has no causal language model for it")
    return config


def _named_architecture(model_path: str) -> str:
    config, _ = PreTrainedConfig.get_config_dict(model_path, local_files_only=True)
    return str((config.get("architectures") or [config.get("model_type", "this model")])[0])


def _load_weights(model_path: str, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    if not any(Path(model_path).glob("*.safetensors")):
        raise InvalidArgument("the model folder has no *.safetensors file; no other format is read", field="model")
    # transformers draws its own progress bar to stderr; progress is reported by the caller.
    had_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    name = (config.architectures or [config.model_type])[0]
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            model_path,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except KeyError as error:
        # Such a model picks its attention from a table of its own.
        raise _unsupported(name, NO_INTERFACE) from error
    finally:
        if had_bar:
            transformers_logging.enable_progress_bar()
    absent = sorted(set(loading["missing_keys"]) | {str(key) for key in loading["mismatched_keys"]})
    if absent:
        raise InvalidArgument(
            f"the model folder lacks {len(absent)} weights or has them in the wrong shape, first {absent[0]}",
            field="model",
        )
    model.eval()
    return model


def _max_positions(config: PreTrainedConfig) -> int:
    """Longest sequence for which a token's computation does not depend on how long its sequence will become."""
    text_config = config.get_text_config()
    limit = getattr(text_config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
    for rope in _rope_parameters(text_config):
        # Both change all frequencies once any position passes the original length, for the whole batch.
        if rope.get("rope_type") in ("dynamic", "longrope"):
            limit = min(limit, rope.get("original_max_position_embeddings") or limit)
    return int(limit)


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return by_layer_type or [parameters]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _unsupported(architecture: str, reason: str) -> Unsupported:
    return Unsupported(f"{architecture} cannot be served: {reason}. Supported are {_SUPPORTED}.", field="model")
