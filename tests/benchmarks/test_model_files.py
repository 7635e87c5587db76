from pathlib import Path

import numpy as np
from softprompt_api.formats import Rows, parse_config, read_adapter, read_folder

from benchmarks.adapters import AdapterMaker
from benchmarks.model_files import read_embedding_rows, read_shape


def test_the_shape_is_the_models(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    shape = read_shape(tiny_model)
    table = model.get_input_embeddings().weight
    assert (shape.vocab_size, shape.hidden_size) == tuple(table.shape)
    # A table that is only looked up costs no arithmetic.
    untied = 0 if model.config.tie_word_embeddings else table.numel()
    assert shape.num_parameters == sum(one.numel() for one in model.parameters()) - untied
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    assert shape.kv_bytes_per_token == 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    rows = read_embedding_rows(tiny_model, [7, 3])
    np.testing.assert_array_equal(rows, table[[7, 3]].detach().float().numpy())


def test_adapters_are_the_same_whenever_they_are_made_and_unlike_each_other(
    tiny_model: Path, tmp_path: Path
) -> None:
    shape = read_shape(tiny_model)
    rows = []
    for folder in ("one", "two"):
        for adapter in AdapterMaker(tiny_model, shape, tmp_path / folder).make(2, 3):
            files = read_folder(Path(adapter))
            spec = parse_config(files.config_json)
            read = read_adapter(spec, files.tensors_path.read_bytes())
            assert isinstance(read, Rows)
            assert (read.num_virtual_tokens, read.row_size) == (3, shape.hidden_size)
            rows.append(bytes(read.data))
    assert rows[0] == rows[2] != rows[1] == rows[3]
