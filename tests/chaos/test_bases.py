"""Two models of different shape, each in a service of its own, behind one gateway and one registry."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from softprompt_api.errors import AdapterInvalid

pytestmark = pytest.mark.timeout(600)

_PROMPT = "The quick brown fox"
_TOKENS = 12


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of other sizes than the tiny one, with its tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other-llama")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    torch.manual_seed(21)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig.from_pretrained(tiny_model, head_dim=16, **sizes)).save_pretrained(folder)
    return folder


def solo(model: Path, adapter: Any, folder: Path) -> tuple[list[int], list[int]]:
    """The ids of a model, and of an adapter for it, computed in this process."""
    from softprompt import LLM, PromptAdapterRequest, SamplingParams

    folder.mkdir()
    (folder / "adapter_config.json").write_text(adapter.config_json)
    (folder / "adapter_model.safetensors").write_bytes(adapter.tensors)
    llm = LLM(model=str(model), dtype="float32", device="cpu", max_model_len=256, kv_cache_gb=0.02)
    params = SamplingParams(temperature=0, max_tokens=_TOKENS, ignore_eos=True)
    base, adapted = llm.generate(
        [_PROMPT] * 2,
        params,
        prompt_adapter_request=[None, PromptAdapterRequest("solo", 1, folder)],
        use_tqdm=False,
    )
    return list(base.outputs[0].token_ids), list(adapted.outputs[0].token_ids)


async def test_each_adapter_is_computed_by_the_model_that_it_is_for(
    make_store: Any,
    make_registry: Any,
    make_inference: Any,
    make_gateway: Any,
    connect: Any,
    adapter: Callable[..., Any],
    tiny_model: Path,
    other_model: Path,
    tmp_path: Path,
) -> None:
    one, two = adapter(1, hidden_size=64), adapter(2, hidden_size=32)
    registry = make_registry(make_store())
    tiny = make_inference(registry)
    other = make_inference(registry, model=other_model, served_model_name="other")
    gateway = make_gateway(registry, tiny, other)
    client = connect(registry.address)
    await client.register("one", one, base_model_id="tiny")
    await client.register("two", two, base_model_id="other")
    with pytest.raises(AdapterInvalid, match="hidden size 64, the base model has 32"):
        await client.register("three", one, base_model_id="other")

    expected = dict(zip(("tiny", "one"), solo(tiny_model, one, tmp_path / "one"), strict=True))
    expected |= zip(("other", "two"), solo(other_model, two, tmp_path / "two"), strict=True)
    assert len(set(map(tuple, expected.values()))) == 4
    body = {
        "prompt": _PROMPT,
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60) as http:

        async def complete(model: str, **fields: Any) -> httpx.Response:
            return await http.post("/v1/completions", json=body | {"model": model} | fields)

        for model, ids in (expected | {"tiny:one": expected["one"], "other:two@1": expected["two"]}).items():
            answer = await complete(model)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["token_ids"] == ids, model
        cards = {card["id"]: card["parent"] for card in (await http.get("/v1/models")).json()["data"]}
        assert cards == {"tiny": None, "other": None, "one": "tiny", "two": "other"}

        for model, fields, param in (
            ("tiny:two", {}, "model"),
            ("one+two", {}, "model"),
            ("tiny", {"adapters": ["two"]}, "adapters"),
        ):
            answer = await complete(model, **fields)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
            assert "'two' is for the base model 'other'" in answer.json()["error"]["message"]
