from pathlib import Path

from softprompt_api.formats import AdapterVerifier, Lora, Rows, parse_config, read_adapter

from benchmarks.fresh import FreshAdapter, FreshAdapters
from benchmarks.model_files import read_linears, read_shape


def _read(adapter: FreshAdapter) -> Rows | Lora:
    """What the registry would take."""
    spec = parse_config(adapter.config_json)
    verifier = AdapterVerifier(spec, size_bytes=len(adapter.tensors))
    verifier.feed(adapter.tensors)
    verifier.finish()
    return read_adapter(spec, adapter.tensors)


def test_soft_prompts_are_what_they_say_and_each_is_another(tiny_model: Path) -> None:
    shape = read_shape(tiny_model)
    fresh = FreshAdapters(tiny_model, shape.vocab_size)
    made = [fresh.soft_prompt(number, 3) for number in range(5)]
    rows = _read(made[0])
    assert isinstance(rows, Rows)
    assert (rows.num_virtual_tokens, rows.row_size) == (3, shape.hidden_size)
    assert len({adapter.tensors for adapter in made}) == 5
    assert FreshAdapters(tiny_model, shape.vocab_size).soft_prompt(4, 3) == made[4]


def test_a_lora_changes_every_linear_of_the_layers(tiny_model: Path) -> None:
    linears = read_linears(tiny_model)
    assert linears["model.layers.1.self_attn.k_proj"] == (32, 64)
    assert len(linears) == 2 * 7
    lora = _read(FreshAdapters(tiny_model, read_shape(tiny_model).vocab_size).lora(1, 4))
    assert isinstance(lora, Lora)
    assert {(module.rank, module.scale) for module in lora.modules} == {(4, 1.0)}
    assert len(lora.modules) == len(linears)


def test_the_messages_of_a_registration_hold_the_whole_file(tiny_model: Path) -> None:
    fresh = FreshAdapters(tiny_model, read_shape(tiny_model).vocab_size)
    adapter = fresh.soft_prompt(1, 10_000)  # more than one chunk
    header, *chunks = adapter.messages("big")
    assert header.header.tensors_size_bytes == len(adapter.tensors)
    assert b"".join(message.chunk.data for message in chunks) == adapter.tensors
    assert len(chunks) == 2
