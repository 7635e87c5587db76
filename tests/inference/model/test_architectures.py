"""Any causal LM behind transformers' attention interface is served rightly, by no code of its own."""

from typing import Any

import pytest

# Windows of 24 end inside the text; Gemma 2 alternates them, caps its scores and scales its embedding; GPT-OSS has
# attention sinks and experts; HunYuan's experts ask for the dtype of a linear's weights.
ARCHITECTURES = [
    "llama",
    "mistral",
    "qwen3",
    "gemma2",
    "gpt2",
    "phi3",
    "opt",
    "gpt_neox",
    "gpt_oss",
    "hunyuan_moe",
]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_and_base_in_one_batch_equal_peft(lab: Any, name: str) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, "prompt_tuning", 5), lab.adapter(path, "prompt_tuning", 20), None]
    requests = lab.requests([*adapters, *adapters], length=14, max_tokens=20)
    outputs = lab.serve(lab.engine(path, max_step_tokens=11), requests)
    lab.compare(path, requests, outputs).assert_equal()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_gpu_computes_the_same_in_float32(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = lab.requests([lab.adapter(path, "prompt_tuning", 20), None] * 3, length=14, max_tokens=20)
    outputs = lab.serve(lab.engine(path, device="cuda", max_step_tokens=64), requests)
    lab.compare(path, requests, outputs).assert_equal()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_change_what_the_oracle_says(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = lab.requests([lab.adapter(path, "prompt_tuning", 20), None])
    with_adapter, without = (lab.oracle(path).answer(request) for request in requests)
    assert with_adapter.token_ids != without.token_ids
