"""`python -m benchmarks.gpu_model SHAPE FOLDER DEVICE`: a Llama of random weights as a Hugging Face folder."""

import sys
from dataclasses import dataclass
from pathlib import Path

_VOCAB_SIZE = 128_256


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaShape:
    """Sizes as in the config of the model it is named after."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool
    rope_factor: float
    vocab_size: int = _VOCAB_SIZE


SHAPES = {
    # Llama-3.2-1B
    "1b": LlamaShape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        rope_factor=32.0,
    ),
    # Llama-3.1-8B
    "8b": LlamaShape(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
        rope_factor=8.0,
    ),
    "tiny": LlamaShape(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
        rope_factor=8.0,
        vocab_size=1024,
    ),
}


def write_model(shape: LlamaShape, folder: Path, device: str) -> None:
    """Draw the weights on the device and save them in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=131_072,
        tie_word_embeddings=shape.tie_word_embeddings,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": shape.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=0,
        eos_token_id=1,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)


if __name__ == "__main__":
    write_model(SHAPES[sys.argv[1]], Path(sys.argv[2]), sys.argv[3])
