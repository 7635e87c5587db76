"""`LLM` with several adapters for one prompt: in front of it, inside it, and with a LoRA."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from softprompt import LLM, LoRARequest, PromptAdapterRequest, RequestOutput, SamplingParams
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument
from softprompt_inference.text import Tokenizer
from transformers import AutoModelForCausalLM

PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
MakeAdapter = Callable[..., Path]
Part = list[int] | PromptAdapterRequest


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return LLM(str(tiny_model), dtype="float32", device="cpu", max_model_len=256, kv_cache_gb=0.02)


@pytest.fixture(scope="module")
def a(make_adapter: MakeAdapter) -> PromptAdapterRequest:
    return PromptAdapterRequest("a", 1, make_adapter(1, 5))


@pytest.fixture(scope="module")
def b(make_adapter: MakeAdapter) -> PromptAdapterRequest:
    return PromptAdapterRequest("b", 2, make_adapter(2, 16))


@pytest.fixture(scope="module")
def given(make_adapter: MakeAdapter) -> PromptAdapterRequest:
    return PromptAdapterRequest("given", 3, make_adapter(22, 20, "prefix_tuning"))


@pytest.fixture(scope="module")
def lora(make_adapter: MakeAdapter) -> LoRARequest:
    return LoRARequest("lora", 1, make_adapter(1, kind="lora", rank=4))


def by_hand(model: Path, parts: Sequence[Part], lora: LoRARequest | None = None) -> list[int]:
    """Greedy tokens of transformers, and of PEFT's LoRA, over rows put among the embeddings of the text."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if lora is not None:
            oracle = PeftModel.from_pretrained(oracle, lora.local_path)
        made: list[int] = []
        while len(made) < PARAMS.max_tokens:
            rows = [
                load_file(Path(part.local_path) / "adapter_model.safetensors")["prompt_embeddings"]
                if isinstance(part, PromptAdapterRequest)
                else oracle.get_input_embeddings()(torch.tensor(part))
                for part in [*parts, made]
                if part
            ]
            logits = oracle(inputs_embeds=torch.cat(rows)[None], use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
    return made


def ids(output: RequestOutput) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_every_composition_in_one_call_equals_what_is_computed_by_hand(
    llm: LLM, tiny_model: Path, a: PromptAdapterRequest, b: PromptAdapterRequest, lora: LoRARequest
) -> None:
    x, y, z = [464, 2068, 7586], [21831, 18045], [625]
    prompts: list[Any] = [x, x, x, x, {"parts": [x, a, y]}, {"parts": [x, a, y, b, z, a]}, {"parts": [x, b, y]}, x]
    fronts = [None, [a, b], (b, a), [a, b], None, b, [a, b], a]
    loras = [None, None, None, lora, None, None, lora, lora]
    outputs = llm.generate(prompts, PARAMS, prompt_adapter_request=fronts, lora_request=loras)
    for output, prompt, front, one in zip(outputs, prompts, fronts, loras, strict=True):
        before = [] if front is None else list(front) if isinstance(front, list | tuple) else [front]
        inside = prompt["parts"] if isinstance(prompt, dict) else [prompt]
        assert ids(output) == by_hand(tiny_model, [*before, *inside], one)
        text = [token_id for part in inside if isinstance(part, list) for token_id in part]
        assert (output.prompt, list(output.prompt_token_ids)) == (None, text)
        assert (output.prompt_adapter_request, output.lora_request) == (front, one)
    assert len({tuple(ids(output)) for output in outputs}) == len(outputs)


def test_texts_of_parts_are_encoded_each_on_its_own(
    llm: LLM, tiny_model: Path, a: PromptAdapterRequest, b: PromptAdapterRequest
) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    [output] = llm.generate({"parts": ["The quick ", "brown fox", a, " jumps", b]}, PARAMS)
    before, after = tokenizer.encode("The quick brown fox"), tokenizer.encode(" jumps", add_special_tokens=False)
    assert output.prompt == "The quick brown fox jumps"
    assert list(output.prompt_token_ids) == [*before, *after]
    assert ids(output) == by_hand(tiny_model, [before, a, after, b])


def test_messages_may_hold_soft_prompts(
    llm: LLM, tiny_model: Path, a: PromptAdapterRequest, b: PromptAdapterRequest
) -> None:
    tokenizer = Tokenizer.load(tiny_model)
    content = ["Say", {"type": "text", "text": "this: "}, a, "please"]
    [output] = llm.chat([{"role": "user", "content": content}], PARAMS, prompt_adapter_request=b)
    assert output.prompt is not None
    before, after = output.prompt.split("please")
    before, after = before, "please" + after
    assert before.endswith("user\nSay\nthis: ")
    parts = [tokenizer.encode(text, add_special_tokens=False) for text in (before, after)]
    assert ids(output) == by_hand(tiny_model, [b, parts[0], a, parts[1]])


def test_given_keys_and_values_come_first_and_go_with_all_others(
    llm: LLM, given: PromptAdapterRequest, a: PromptAdapterRequest, lora: LoRARequest
) -> None:
    prompts: list[Any] = ["Hello", "Hello", {"parts": ["Hel", a, "lo"]}, "Hello"]
    fronts = [[given], [given, a], [given, a], given]
    outputs = llm.generate(prompts, PARAMS, prompt_adapter_request=fronts, lora_request=[None, None, lora, lora])
    alone = [
        llm.generate(prompt, PARAMS, prompt_adapter_request=[front], lora_request=one)[0]
        for prompt, front, one in zip(prompts, fronts, [None, None, lora, lora], strict=True)
    ]
    assert [ids(output) for output in outputs] == [ids(output) for output in alone]
    assert len({tuple(ids(output)) for output in outputs}) == 4


@pytest.mark.parametrize(
    ("prompt", "front", "message", "field"),
    [
        (
            "x",
            ["a", "given"],
            r"prompts\[0\]: 'given' gives keys and values .* before 'a'",
            "prompt_adapter_request",
        ),
        ("x", ["given", "given"], "'given' and 'given' both give keys and values", "prompt_adapter_request"),
        ({"parts": ["x", "@given"]}, [], "'given' gives keys and values", "prompt"),
        ({"parts": ["x", 5]}, [], r"prompts\[0\]: part 1 must be a string", "prompts[0]"),
        ({"parts": "x"}, [], r"prompts\[0\] must be a string", "prompts[0]"),
        ("x", ["a", 5], "several in a list", "prompt_adapter_request"),
        ("x", ["a"] * 17, "17 adapters; at most 16", "prompt_adapter_request"),
    ],
)
def test_what_cannot_stand_where_it_is_named_is_refused_before_anything_runs(
    llm: LLM,
    a: PromptAdapterRequest,
    given: PromptAdapterRequest,
    prompt: Any,
    front: list[Any],
    message: str,
    field: str,
) -> None:
    requests = {"a": a, "given": given, "@given": given}
    if isinstance(prompt, dict) and isinstance(prompt["parts"], list):
        prompt = {"parts": [requests.get(part, part) for part in prompt["parts"]]}
    with pytest.raises(InvalidArgument, match=message) as refused:
        llm.generate([prompt], PARAMS, prompt_adapter_request=[[requests.get(name, name) for name in front]])
    assert refused.value.field == field


@pytest.mark.parametrize("given", [LoRARequest("lora", 1, "folder"), "a", {"a": 1}, 5])
def test_what_is_no_soft_prompt_is_refused_by_the_fields_name(llm: LLM, given: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be a PromptAdapterRequest") as refused:
        llm.generate(["x"], PARAMS, prompt_adapter_request=given)
    assert refused.value.field == "prompt_adapter_request"


@pytest.mark.parametrize("content", [5, [5], [{"type": "image_url"}], [{"type": "text", "text": 5}]])
def test_a_message_of_anything_else_is_refused(llm: LLM, content: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        llm.chat([{"role": "user", "content": content}], PARAMS)
    assert refused.value.field == "messages"


def test_the_virtual_tokens_of_all_count_against_the_context(
    llm: LLM, a: PromptAdapterRequest, b: PromptAdapterRequest
) -> None:
    ids = [464] * 220
    assert llm.generate({"parts": [ids, a]}, PARAMS, prompt_adapter_request=[[b]])
    with pytest.raises(ContextLengthExceeded, match="220 prompt tokens, 37 virtual tokens"):
        llm.generate({"parts": [ids, a]}, PARAMS, prompt_adapter_request=[[b, b]])
