import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from softprompt_api.errors import InvalidArgument, Unsupported
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.model import attention
from softprompt_inference.model.loader import LoadedModel, load_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM


def load(path: Path, **settings: str) -> LoadedModel:
    return load_model(EngineConfig(model_path=str(path), **{"device": "cpu", **settings}), lambda _: None)


def copy_with_config(path: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


TINY = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
# Of Gemmas whose layers look at each token's id once more.
PER_LAYER = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
WINDOW_ELSEWHERE = {"num_key_value_heads": 2, "intermediate_size": 64, "sliding_window": 30, "pad_token_id": 0}


def test_layers_and_sizes_are_learned(lab: Any) -> None:
    loaded = load(lab.model("gemma2"))
    assert loaded.architecture == "Gemma2ForCausalLM"
    assert [layer.sliding_window for layer in loaded.layers] == [24, None, 24, None]
    assert {(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in loaded.layers} == {(4, 2, 16)}
    assert (loaded.vocab_size, loaded.hidden_size, loaded.max_positions) == (256, 32, 256)
    assert loaded.keeps_logits


def test_shared_weights_are_counted_once(lab: Any) -> None:
    loaded = load(lab.model("gpt2"))
    stored = load_file(lab.model("gpt2") / "model.safetensors")
    assert loaded.weights_bytes == sum(tensor.numel() * 4 for tensor in stored.values())


def test_progress_is_reported(llama: Path) -> None:
    told: list[str] = []
    load_model(EngineConfig(model_path=str(llama), device="cpu"), told.append)
    assert told[0] == "loading weights (float32 on cpu)"


def test_the_dtype_may_be_chosen(llama: Path) -> None:
    loaded = load(llama, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4), "bypasses"),
        (transformers.FalconConfig(**TINY), "bypasses"),
        (transformers.GPTJConfig(vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=4), "bypasses"),
        (
            transformers.MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4),
            "mask and attention of its own",
        ),
        (transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2), "has layers of type"),
        (transformers.BertConfig(**TINY, intermediate_size=64), "later tokens"),
        (
            transformers.DeepseekV3Config(
                **TINY,
                intermediate_size=64,
                kv_lora_rank=16,
                q_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=16,
                v_head_dim=16,
                first_k_dense_replace=2,
            ),
            "keys have 24 dimensions and its values 16",
        ),
        (
            transformers.Gemma3nTextConfig(
                **TINY,
                **PER_LAYER,
                intermediate_size=[64] * 2,
                activation_sparsity_pattern=[0.0] * 2,
                laurel_rank=4,
                altup_num_inputs=2,
            ),
            "looks at token ids beside their embeddings",
        ),
        (
            transformers.Gemma4TextConfig(**TINY, **PER_LAYER, intermediate_size=64, global_head_dim=16),
            "rows that are no token's embedding",
        ),
        (
            transformers.PhimoeConfig(**TINY, **WINDOW_ELSEWHERE, num_local_experts=4),
            "attention of layer 0 gets window None, and its masks have 30",
        ),
        (
            transformers.OlmoeConfig(**TINY, **WINDOW_ELSEWHERE, num_experts=4, num_experts_per_tok=2),
            "attention of layer 0 gets window 30, and its masks have None",
        ),
        (
            transformers.Llama4TextConfig(
                **TINY, num_key_value_heads=2, intermediate_size=64, head_dim=8, layer_types=["full_attention"] * 2
            ),
            "place in the batch",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, transformers.PreTrainedConfig) else "",
)
@pytest.mark.filterwarnings("ignore")  # of making these models
def test_other_architectures_are_refused_by_name(
    config: transformers.PreTrainedConfig, reason: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some begin as 0, and would do nothing
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match=reason) as caught:
        load(tmp_path)
    assert caught.value.message.startswith(f"{type(model).__name__} cannot be served: ")
    assert "Supported are causal language models" in caught.value.message


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="T5ForConditionalGeneration cannot be served: it is an encoder-decoder"):
        load(tmp_path)


def test_quantized_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    path = copy_with_config(llama, tmp_path / "model", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Unsupported, match="quantized"):
        load(path)


def test_code_that_comes_with_a_model_is_never_run(llama: Path, tmp_path: Path) -> None:
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    path = copy_with_config(llama, tmp_path / "model", auto_map=names, model_type="evil", architectures=["Evil"])
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(Unsupported, match="Evil cannot be served: transformers cannot read its config"):
        load(path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"no config\.json"):
        load(tmp_path)


def test_pickled_weights_are_not_read(llama: Path, tmp_path: Path) -> None:
    path = copy_with_config(llama, tmp_path / "model")
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(InvalidArgument, match=r"no \*\.safetensors"):
        load(path)


def test_weights_that_are_missing_are_not_left_at_random(llama: Path, tmp_path: Path) -> None:
    path = copy_with_config(llama, tmp_path / "model")
    weights = load_file(path / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidArgument, match="lacks 1 weights"):
        load(path)


@pytest.mark.parametrize(("setting", "value"), [("device", "tpu"), ("device", "nonsense:x"), ("dtype", "int8")])
def test_settings_that_mean_nothing_are_refused(llama: Path, setting: str, value: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(llama, **{setting: value})
    assert caught.value.field == setting


def test_frequencies_that_change_with_length_are_never_reached(llama: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path = copy_with_config(llama, tmp_path / "model", rope_parameters=rope, max_position_embeddings=128)
    assert load(path).max_positions == 128

    long = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    lengths = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    path = copy_with_config(tiny_phi3(tmp_path), tmp_path / "long", rope_parameters=long, **lengths)
    assert load(path).max_positions == 64


def tiny_phi3(folder: Path) -> Path:
    path = folder / "phi3"
    config = transformers.Phi3Config(**TINY, intermediate_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


# The check against the model's own attention notices what the watching cannot see.


def test_a_wrong_scale_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.paged_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **{**options, "scale": options["scale"] * 0.9})

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(Unsupported, match="LlamaForCausalLM cannot be served: paged attention gives other logits"):
        load(llama)


def test_a_forgotten_window_is_refused(lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = copy_with_config(lab.model("mistral"), tmp_path / "model", sliding_window=8)
    right = attention.paged_attention

    def wrong(*arguments: Any, **options: Any) -> Any:
        return right(*arguments, **{**options, "sliding_window": None, "plan": None})

    monkeypatch.setattr(attention, "paged_attention", wrong)
    with pytest.raises(Unsupported, match="other logits"):
        load(path)


def test_a_window_that_does_not_reach_the_attention_is_refused(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = attention.CallRecorder.attend

    def forgetful(self: Any, module: Any, call: Any) -> Any:
        answer = record(self, module, call)
        self.calls[-1] = (module, attention.AttentionCall(**{**fields(call), "sliding_window": None}))
        return answer

    monkeypatch.setattr(attention.CallRecorder, "attend", forgetful)
    with pytest.raises(Unsupported, match="layer 0 is sliding_attention, but its attention gets window None"):
        load(lab.model("gemma2"))


def fields(call: attention.AttentionCall) -> dict[str, Any]:
    return {name: getattr(call, name) for name in call.__slots__}


def test_a_cpu_holds_packed_weights_and_no_longer_the_file(lab: Any, tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(lab.model("llama"), path)
    loaded = load(path, dtype="float32")
    assert not [line for line in Path("/proc/self/maps").read_text().splitlines() if f"{path}/" in line]
    assert loaded.model.get_input_embeddings().weight.isfinite().all()


def test_a_linear_that_sees_only_rows_with_logits_takes_no_lora(tmp_path: Path) -> None:
    """It stands between the last layer and the head; a step's LoRAs are laid out for all of its tokens."""
    config = transformers.ModernBertDecoderConfig(
        **{**TINY, "intermediate_size": 48, "max_position_embeddings": 256},
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
    )
    transformers.ModernBertDecoderForCausalLM(config).save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.keeps_logits
    names = [linear.name for linear in loaded.linears]
    assert "model.layers.0.attn.q_proj" in names
    assert not any("lm_head" in name for name in names)
