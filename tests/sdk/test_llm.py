"""`LLM`: prompts, adapters and the base model in one batch, in this process."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file
from softprompt import (
    LLM,
    LoRARequest,
    PromptAdapterRequest,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from softprompt_api.errors import (
    AdapterInvalid,
    ContextLengthExceeded,
    InternalError,
    InvalidArgument,
    Unsupported,
)
from softprompt_inference.model.transfer import PIECE_BYTES

GREEDY = SamplingParams(temperature=0, max_tokens=8)
MakeAdapter = Callable[..., Path]


def make_llm(model: Path, **options: Any) -> LLM:
    return LLM(
        str(model), **{"dtype": "float32", "device": "cpu", "max_model_len": 64, "kv_cache_gb": 0.01, **options}
    )


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> LLM:
    return make_llm(tiny_model, max_model_len=256, kv_cache_gb=0.02, max_prompt_adapter_token=32)


@pytest.fixture(scope="module")
def adapters(make_adapter: MakeAdapter) -> list[PromptAdapterRequest]:
    return [PromptAdapterRequest(f"adapter-{number}", number, make_adapter(number)) for number in (1, 2)]


def ids(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def greedy_by_peft(
    model: Path, adapter: Path | None, prompt_ids: list[int], num_tokens: int, task: int | None = None
) -> list[int]:
    """What transformers and PEFT generate from the same prompt, in float32, alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    inputs = torch.tensor([prompt_ids])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            oracle = PeftModel.from_pretrained(oracle, adapter)
        made = oracle.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            **({} if task is None else {"task_ids": torch.tensor([task])}),
        )
    return made[0, len(prompt_ids) :].tolist()


def test_outputs_come_in_order_and_equal_what_peft_generates(
    llm: LLM, tiny_model: Path, adapters: list[PromptAdapterRequest]
) -> None:
    prompts = ["The quick brown fox", "Hello", "One two three four five six seven"]
    requests = [adapters[0], None, adapters[1]]
    outputs = llm.generate(prompts, GREEDY, prompt_adapter_request=requests)
    assert [output.prompt for output in outputs] == prompts
    assert [output.prompt_adapter_request for output in outputs] == requests
    for output, request in zip(outputs, requests, strict=True):
        folder = None if request is None else Path(request.local_path)
        expected = greedy_by_peft(tiny_model, folder, list(output.prompt_token_ids), 8)
        assert list(output.outputs[0].token_ids) == expected


def test_every_kind_and_task_equals_what_peft_generates(
    llm: LLM, tiny_model: Path, make_adapter: MakeAdapter
) -> None:
    multitask, prefix = make_adapter(21, 5, "multitask"), make_adapter(22, 20, "prefix_tuning")
    requests = [
        PromptAdapterRequest("many", 21, multitask, prompt_adapter_task=0),
        PromptAdapterRequest("many", 21, multitask, prompt_adapter_task=1),
        PromptAdapterRequest("prefix", 22, prefix),
        None,
    ]
    outputs = llm.generate(["The quick brown fox"] * 4, GREEDY, prompt_adapter_request=requests)
    for output, request in zip(outputs, requests, strict=True):
        folder, task = (None, None) if request is None else (Path(request.local_path), request.task)
        expected = greedy_by_peft(tiny_model, folder, list(output.prompt_token_ids), 8, task)
        assert list(output.outputs[0].token_ids) == expected
    assert len({tuple(one) for one in ids(outputs)}) == 4


@pytest.fixture(scope="module")
def make_lora(make_adapter: MakeAdapter) -> Callable[..., LoRARequest]:
    """`make_lora(number)`: a random LoRA that PEFT wrote for the tiny model, under this id."""

    def make(number: int, *, rank: int = 4) -> LoRARequest:
        return LoRARequest(f"lora-{number}", number, make_adapter(number, kind="lora", rank=rank))

    return make


def both_by_peft(model: Path, soft_prompt: Path, lora: Path, prompt_ids: list[int], num_tokens: int) -> list[int]:
    """PEFT computes a soft prompt or a LoRA: both, with rows put before the text by hand."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    rows = load_file(soft_prompt / "adapter_model.safetensors")["prompt_embeddings"]
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        oracle = PeftModel.from_pretrained(base, lora)
        made: list[int] = []
        while len(made) < num_tokens:
            text = oracle.get_input_embeddings()(torch.tensor([*prompt_ids, *made]))
            logits = oracle(inputs_embeds=torch.cat([rows, text])[None], use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
    return made


def test_loras_soft_prompts_and_both_together_equal_what_peft_generates(
    llm: LLM, tiny_model: Path, adapters: list[PromptAdapterRequest], make_lora: Callable[..., LoRARequest]
) -> None:
    one, two = make_lora(1), make_lora(2)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    soft_prompts = [None, None, adapters[0], adapters[0], adapters[0], None]
    loras = [None, one, None, one, two, two]
    prompts = ["The quick brown fox"] * 6
    outputs = llm.generate(prompts, params, prompt_adapter_request=soft_prompts, lora_request=loras)
    assert [output.lora_request for output in outputs] == loras
    for output, soft_prompt, lora in zip(outputs, soft_prompts, loras, strict=True):
        prompt_ids = list(output.prompt_token_ids)
        folders = [Path(request.local_path) for request in (soft_prompt, lora) if request is not None]
        if len(folders) == 2:
            expected = both_by_peft(tiny_model, *folders, prompt_ids, 8)
        else:
            expected = greedy_by_peft(tiny_model, next(iter(folders), None), prompt_ids, 8)
        assert list(output.outputs[0].token_ids) == expected
    assert len({tuple(one) for one in ids(outputs)}) == 6
    (chat,) = llm.chat([{"role": "user", "content": "Hi"}], params, lora_request=one)
    assert list(chat.outputs[0].token_ids) == greedy_by_peft(
        tiny_model, Path(one.local_path), list(chat.prompt_token_ids), 8
    )


def test_loras_beyond_the_limit_come_and_go_between_calls_and_are_refused_in_one(
    tiny_model: Path, make_lora: Callable[..., LoRARequest]
) -> None:
    llm = make_llm(tiny_model, max_loras=2)
    loras = [make_lora(number) for number in (1, 2, 3)]
    first = ids(llm.generate(["Hello"] * 2, GREEDY, lora_request=loras[:2]))
    for number in (2, 0, 1, 2, 0):
        (alone,) = ids(llm.generate("Hello", GREEDY, lora_request=loras[number]))
        assert number == 2 or alone == first[number]
    with pytest.raises(InvalidArgument, match="the call has 3 LoRAs; at most 2"):
        llm.generate(["Hello"] * 3, GREEDY, lora_request=loras)
    assert ids(llm.generate(["Hello"] * 2, GREEDY, lora_request=loras[:2])) == first


def test_a_lora_that_cannot_be_used_is_refused_before_anything_runs(
    tiny_model: Path,
    llm: LLM,
    adapters: list[PromptAdapterRequest],
    make_lora: Callable[..., LoRARequest],
    tmp_path: Path,
) -> None:
    lora = make_lora(70)
    with pytest.raises(InvalidArgument, match="is a LORA adapter; give it as lora_request"):
        llm.generate("Hello", GREEDY, prompt_adapter_request=PromptAdapterRequest("x", 70, lora.local_path))
    with pytest.raises(InvalidArgument, match="is a PROMPT_TUNING adapter; give it as prompt_adapter_request"):
        llm.generate("Hello", GREEDY, lora_request=LoRARequest("x", 71, adapters[0].local_path))
    with pytest.raises(AdapterInvalid, match="rank 65; at most 64"):
        llm.generate("Hello", GREEDY, lora_request=make_lora(72, rank=65))
    foreign = tmp_path / "foreign"
    shutil.copytree(lora.local_path, foreign)
    tensors = load_file(foreign / "adapter_model.safetensors")
    renamed = {name.replace("layers.1.", "layers.9."): tensor for name, tensor in tensors.items()}
    save_file(renamed, foreign / "adapter_model.safetensors")
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps({**config, "target_modules": "all-linear"}))
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=r"layers\.9\..* which the model does not have"):
            llm.generate("Hello", GREEDY, lora_request=LoRARequest("foreign", 73, foreign))
    assert llm.generate("Hello", GREEDY, lora_request=lora)
    with pytest.raises(InvalidArgument, match="enable_lora=False"):
        make_llm(tiny_model, enable_lora=False).generate("Hello", GREEDY, lora_request=lora)


@pytest.mark.parametrize(
    ("name", "number", "path", "field"),
    [("Bad Name", 1, "x", "lora_name"), ("name", 0, "x", "lora_int_id"), ("name", 1, "", "lora_path")],
)
def test_a_lora_request_that_cannot_be_is_refused_when_made(name: str, number: int, path: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        LoRARequest(name, number, path)
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("kind", "task", "message"),
    [("multitask", None, "name one"), ("multitask", 2, "no task 2"), ("prompt_tuning", 0, "no tasks")],
)
def test_a_task_that_is_not_there_or_not_named_is_refused(
    llm: LLM, make_adapter: MakeAdapter, kind: str, task: int | None, message: str
) -> None:
    request = PromptAdapterRequest("wrong", 30, make_adapter(30, 5, kind), prompt_adapter_task=task)
    with pytest.raises(InvalidArgument, match=message) as refused:
        llm.generate("Hello", GREEDY, prompt_adapter_request=request)
    assert refused.value.field == "prompt_adapter_task"


@pytest.mark.parametrize("task", [-1, True, "0"])
def test_a_task_that_cannot_be_is_refused(task: Any) -> None:
    with pytest.raises(InvalidArgument) as refused:
        PromptAdapterRequest("many", 1, "path", prompt_adapter_task=task)
    assert refused.value.field == "prompt_adapter_task"


def test_a_mixed_batch_gives_each_prompt_what_it_gets_alone(
    llm: LLM, adapters: list[PromptAdapterRequest]
) -> None:
    prompts = [f"Prompt number {number}" for number in range(12)]
    requests = [(None, *adapters)[number % 3] for number in range(12)]
    together = ids(llm.generate(prompts, GREEDY, prompt_adapter_request=requests))
    alone = [
        ids(llm.generate(prompt, GREEDY, prompt_adapter_request=request))[0]
        for prompt, request in zip(prompts, requests, strict=True)
    ]
    assert together == alone
    same = [llm.generate("Same", GREEDY, prompt_adapter_request=request) for request in (None, *adapters)]
    assert len({tuple(ids(outputs)[0]) for outputs in same}) == 3


def test_one_request_stands_for_every_prompt(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    outputs = llm.generate(["a", "b"], GREEDY, prompt_adapter_request=adapters[0])
    assert [output.prompt_adapter_request for output in outputs] == [adapters[0]] * 2


@pytest.mark.parametrize("form", [[464, 2068], {"prompt_token_ids": [464, 2068]}])
def test_prompts_may_be_token_ids(llm: LLM, form: object) -> None:
    for prompts in (form, [form]):
        (output,) = llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
        assert output.prompt is None
        assert output.prompt_token_ids == [464, 2068]


def test_without_parameters_sixteen_tokens_are_sampled(llm: LLM) -> None:
    (output,) = llm.generate({"prompt": "Hello"})
    completion = output.outputs[0]
    assert len(completion.token_ids) == 16 or completion.finish_reason == "stop"
    assert completion.logprobs is None


def test_each_prompt_may_have_its_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=number, ignore_eos=True) for number in (1, 3)]
    assert [len(output) for output in ids(llm.generate(["a", "a"], params))] == [1, 3]


def test_n_gives_choices_of_their_own_and_a_seed_repeats_them(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=7, temperature=1.5, max_tokens=8)
    first, again = (llm.generate("Hello", params)[0].outputs for _ in range(2))
    assert [choice.index for choice in first] == [0, 1, 2, 3]
    assert [choice.token_ids for choice in first] == [choice.token_ids for choice in again]
    assert len({tuple(choice.token_ids) for choice in first}) == 4


def test_an_llm_with_a_seed_repeats_itself(tiny_model: Path) -> None:
    def sampled() -> list[list[int]]:
        made = make_llm(tiny_model, seed=3)
        return [made.generate("Hello", SamplingParams(max_tokens=8))[0].outputs[0].token_ids for _ in range(2)]

    first = sampled()
    assert first[0] != first[1]
    assert first == sampled()


def test_a_stop_string_ends_the_output_and_stays_out_of_the_text(llm: LLM) -> None:
    whole = llm.generate("Hello", GREEDY)[0].outputs[0]
    stop = whole.text[3:6]
    completion = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=8, stop=[stop]))[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert whole.text.startswith(completion.text)
    assert stop not in completion.text


def test_a_stop_token_is_named_as_the_reason(llm: LLM) -> None:
    third = llm.generate("Hello", GREEDY)[0].outputs[0].token_ids[2]
    params = SamplingParams(temperature=0, max_tokens=8, stop_token_ids=[third])
    completion = llm.generate("Hello", params)[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", third)
    assert completion.token_ids[-1] == third


def test_prompts_are_as_likely_as_transformers_and_peft_find_them(
    llm: LLM, tiny_model: Path, adapters: list[PromptAdapterRequest]
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=2, n=2)
    request = adapters[0]
    outputs = llm.generate(["The quick brown fox"] * 2, params, prompt_adapter_request=[None, request])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        ids = torch.tensor([outputs[0].prompt_token_ids])
        logits = [base(input_ids=ids).logits[0, :-1]]
        with_adapter = PeftModel.from_pretrained(base, request.local_path)
        every = with_adapter(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        logits.append(every[-ids.shape[1] - 1 : -1])
    for output, rows, num_unpredicted in zip(outputs, logits, (1, 0), strict=True):
        assert output.prompt_logprobs is not None
        assert list(output.prompt_logprobs[:num_unpredicted]) == [None] * num_unpredicted
        token_ids = output.prompt_token_ids[num_unpredicted:]
        own = [
            each[token_id]
            for each, token_id in zip(output.prompt_logprobs[num_unpredicted:], token_ids, strict=True)
        ]
        expected = torch.log_softmax(rows.double(), -1).gather(1, torch.tensor(token_ids)[:, None])[:, 0]
        assert [entry.logprob for entry in own] == pytest.approx(expected.tolist(), abs=1e-4)
        assert all(2 <= len(each) <= 3 for each in output.prompt_logprobs[num_unpredicted:] if each)
        assert [(one.text, one.finish_reason, list(one.token_ids)) for one in output.outputs] == [
            ("", "length", [])
        ] * 2
    assert llm.generate(["Hello"], GREEDY)[0].prompt_logprobs is None


def test_logprobs_hold_the_chosen_and_the_likeliest_tokens(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    completion = llm.generate("Hello", params)[0].outputs[0]
    assert completion.logprobs is not None
    assert completion.cumulative_logprob is not None
    chosen = [entry[token_id] for token_id, entry in zip(completion.token_ids, completion.logprobs, strict=True)]
    assert all(entry.rank == 1 for entry in chosen)
    assert all(len(entry) == 3 for entry in completion.logprobs)
    assert sum(entry.logprob for entry in chosen) == pytest.approx(completion.cumulative_logprob)


def test_without_parameters_those_that_the_model_recommends_are_used(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    recommended = {**config, "do_sample": True, "top_k": 1, "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    llm = make_llm(folder)
    assert llm.get_default_sampling_params() == SamplingParams(top_k=1, temperature=0.5)
    plain = llm.generate("Hello", SamplingParams(temperature=0))
    assert ids(llm.generate("Hello")) == ids(plain)


def test_chat_goes_through_the_chat_template(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    conversation = [{"role": "user", "content": "Hi"}]
    (output,) = llm.chat(conversation, GREEDY)
    assert output.prompt is not None
    assert "<|im_start|>user\nHi<|im_end|>" in output.prompt
    several = llm.chat([conversation, conversation], GREEDY, prompt_adapter_request=[None, adapters[0]])
    assert ids(several)[0] == ids([output])[0]
    assert ids(several)[1] != ids(several)[0]


def test_chat_gives_values_to_the_chat_template(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    template = "{{ messages[0].content }}{% if enable_thinking %} think{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    llm = make_llm(folder)
    conversation = [{"role": "user", "content": "Hi"}]
    for values, prompt in ((None, "Hi"), ({"enable_thinking": True}, "Hi think")):
        (output,) = llm.chat(conversation, GREEDY, chat_template_kwargs=values)
        assert output.prompt == prompt
    with pytest.raises(InvalidArgument, match=r"sets 'thinking'") as refused:
        llm.chat(conversation, GREEDY, chat_template_kwargs={"thinking": True})
    assert refused.value.field == "chat_template_kwargs"


def test_chat_tells_the_model_of_tools_calls_and_results(llm: LLM) -> None:
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}}
    called = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    conversation = [
        {"role": "user", "content": "Is it warm?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": called}],
        },
        {"role": "tool", "content": "21 degrees", "tool_call_id": "1"},
    ]
    (output,) = llm.chat(conversation, GREEDY, tools=[{"type": "function", "function": function}])
    assert output.prompt is not None
    for told in (
        '"name": "get_weather", "parameters"',
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "<tool_response>\n21 degrees\n</tool_response>",
    ):
        assert told in output.prompt
    assert ids([output]) != ids(llm.chat(conversation, GREEDY))


def test_chat_refuses_what_is_no_tool(llm: LLM) -> None:
    for tool in ({"type": "function"}, {"type": "web_search"}, {"function": {"name": {1, 2}}}):
        with pytest.raises(InvalidArgument) as refused:
            llm.chat([{"role": "user", "content": "x"}], GREEDY, tools=[tool])
        assert refused.value.field == "tools"


@pytest.mark.parametrize(
    ("prompts", "error", "message"),
    [
        (["fine", ""], InvalidArgument, r"prompts\[1\]: the prompt is empty"),
        (["fine", [1, 10**6]], InvalidArgument, r"prompts\[1\]: prompt has token id 1000000"),
        (["fine", 3], InvalidArgument, r"prompts\[1\] must be a string"),
        (["fine", "word " * 400], ContextLengthExceeded, r"prompts\[1\]: the context holds 256 tokens"),
        (["fine", "\ud800"], InvalidArgument, r"prompts\[1\]: the text holds a lone surrogate"),
        (3, InvalidArgument, "prompts must be a string"),
    ],
)
def test_a_bad_prompt_is_named_before_anything_runs(
    llm: LLM, prompts: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        llm.generate(prompts, GREEDY)  # type: ignore[arg-type]
    assert ids(llm.generate("Hello", GREEDY)) == ids(llm.generate("Hello", GREEDY))


def test_virtual_tokens_count_against_the_context(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    prompt = [464] * 250
    params = SamplingParams(temperature=0, max_tokens=3)
    assert llm.generate(prompt, params)
    with pytest.raises(ContextLengthExceeded, match="5 virtual tokens"):
        llm.generate(prompt, params, prompt_adapter_request=adapters[0])


def test_lists_must_be_as_long_as_the_prompts(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    with pytest.raises(InvalidArgument, match="prompt_adapter_request has 2 entries for 1 prompts"):
        llm.generate(["a"], GREEDY, prompt_adapter_request=[adapters[0], None])


def test_an_id_stands_for_one_name_and_one_path(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    llm.generate("Hello", GREEDY, prompt_adapter_request=adapters[0])
    for name, path in (("other", adapters[0].local_path), ("adapter-1", adapters[1].local_path)):
        with pytest.raises(InvalidArgument, match="adapter id 1 stands for 'adapter-1' at"):
            llm.generate("Hello", GREEDY, prompt_adapter_request=PromptAdapterRequest(name, 1, path))


def test_changed_files_need_another_id(llm: LLM, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(make_adapter(30), folder)
    request = PromptAdapterRequest("changing", 30, folder)
    before = ids(llm.generate("Hello", GREEDY, prompt_adapter_request=request))
    shutil.copytree(make_adapter(31), folder, dirs_exist_ok=True)
    with pytest.raises(InvalidArgument, match="the files of 'changing' have changed since id 30 was first used"):
        llm.generate("Hello", GREEDY, prompt_adapter_request=request)
    after = ids(llm.generate("Hello", GREEDY, prompt_adapter_request=PromptAdapterRequest("changing", 31, folder)))
    assert after != before


def test_an_adapter_that_cannot_be_used_leaves_its_id_free(llm: LLM, make_adapter: MakeAdapter) -> None:
    def generate_with(path: str | Path) -> list[RequestOutput]:
        return llm.generate("Hello", GREEDY, prompt_adapter_request=PromptAdapterRequest("late", 40, path))

    with pytest.raises(AdapterInvalid, match="there is no folder"):
        generate_with("/no/such/folder")
    with pytest.raises(AdapterInvalid, match="40 virtual tokens; at most 32 are allowed"):
        generate_with(make_adapter(40, 40))
    assert generate_with(make_adapter(40))


def test_adapters_beyond_the_limit_come_and_go(tiny_model: Path, make_adapter: MakeAdapter) -> None:
    llm = make_llm(tiny_model, max_prompt_adapters=1)
    requests = [PromptAdapterRequest(f"a{number}", number, make_adapter(number)) for number in (1, 2)]
    first = ids(llm.generate(["Hello", "Hello"], GREEDY, prompt_adapter_request=requests))
    for number in (0, 1, 0):
        alone = ids(llm.generate("Hello", GREEDY, prompt_adapter_request=requests[number]))[0]
        assert alone == first[number]


def test_adapters_may_be_switched_off(tiny_model: Path, adapters: list[PromptAdapterRequest]) -> None:
    llm = make_llm(tiny_model, enable_prompt_adapter=False)
    with pytest.raises(InvalidArgument, match="enable_prompt_adapter=False"):
        llm.generate("Hello", GREEDY, prompt_adapter_request=adapters[0])


@pytest.mark.parametrize("share", [True, False])
def test_soft_prompts_may_be_computed_for_every_call(
    tiny_model: Path, adapters: list[PromptAdapterRequest], share: bool
) -> None:
    llm = make_llm(tiny_model, share=share)
    params = SamplingParams(max_tokens=1, temperature=0)
    for prompt in ([5, 6, 7], [8, 9]):
        llm.generate(prompt, params, prompt_adapter_request=adapters[0])
    stats = llm._engine.step().stats
    num_virtual_tokens = stats.computed_prompt_tokens + stats.cached_prompt_tokens - 5
    assert num_virtual_tokens > 0
    assert stats.cached_prompt_tokens == (num_virtual_tokens // 2 if share else 0)


def test_an_interrupted_call_leaves_nothing_running(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = llm._engine
    step, calls = engine.step, []

    def interrupted() -> object:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=50, ignore_eos=True))
    monkeypatch.undo()
    assert not engine.has_work
    engine.check()


def test_a_call_that_was_interrupted_within_a_step_does_not_disturb_the_next(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate(["a"], GREEDY)
    runner = llm._engine._runner
    launch, calls = runner.launch, []

    def interrupted(plan: object) -> object:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return launch(plan)

    monkeypatch.setattr(runner, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(max_tokens=50, ignore_eos=True))
    monkeypatch.undo()
    assert not llm._engine.has_work
    llm._engine.check()
    assert ids(llm.generate(["a"], GREEDY)) == ids(expected)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("kind", ["lora", "prefix_tuning"])
def test_what_did_not_come_in_to_its_end_is_loaded_anew(
    tiny_model: Path,
    make_adapter: MakeAdapter,
    make_lora: Callable[..., LoRARequest],
    kind: str,
    failure: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(PIECE_BYTES, "cpu", 1)
    adapter: dict[str, Any] = (
        {"lora_request": make_lora(9)}
        if kind == "lora"
        else {"prompt_adapter_request": PromptAdapterRequest("prefix", 22, make_adapter(22, 5, kind))}
    )
    expected = ids(make_llm(tiny_model).generate("Hello", GREEDY, **adapter))
    llm = make_llm(tiny_model, max_loras=1)
    loading = llm._engine._loading
    advance, calls = loading.advance, []

    def failing(digest: str) -> bool:
        calls.append(digest)
        if len(calls) == 3:
            raise failure
        return advance(digest)

    monkeypatch.setattr(loading, "advance", failing)
    with pytest.raises((failure, InternalError)):
        llm.generate("Hello", GREEDY, **adapter)
    assert not llm._engine.has_work
    llm._engine.check()
    assert ids(llm.generate("Hello", GREEDY, **adapter)) == expected
    llm._engine.check()


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("sampling_params", {"temperature": 0}, "sampling_params takes SamplingParams, not dict"),
        ("sampling_params", [None], "sampling_params takes SamplingParams, not NoneType"),
        ("sampling_params", [], "sampling_params has 0 entries for 1 prompts"),
        ("lora_request", "path", "lora_request takes LoRARequest, not str"),
        (
            "lora_request",
            PromptAdapterRequest("name", 1, "x"),
            "lora_request takes LoRARequest, not PromptAdapter",
        ),
        ("prompt_adapter_request", "path", "must be a PromptAdapterRequest"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(
    llm: LLM, argument: str, value: object, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message) as caught:
        llm.generate(["Hello"], **{argument: value})
    assert caught.value.field == argument


def test_an_id_stands_for_one_adapter_within_a_call_too(llm: LLM, adapters: list[PromptAdapterRequest]) -> None:
    first, second = adapters[:2]
    fresh = [PromptAdapterRequest(one.name, 77, one.local_path) for one in (first, second)]
    with pytest.raises(InvalidArgument, match="adapter id 77 stands for") as caught:
        llm.generate(["a", "b"], GREEDY, prompt_adapter_request=fresh)
    assert caught.value.field == "prompt_adapter_id"


@pytest.mark.parametrize(
    ("name", "number", "path"), [("Bad Name", 1, "x"), ("name", 0, "x"), ("name", True, "x"), ("name", 1, "")]
)
def test_a_request_that_cannot_be_is_refused_when_made(name: str, number: int, path: str) -> None:
    with pytest.raises(InvalidArgument):
        PromptAdapterRequest(name, number, path)


def test_scripts_for_vllm_may_say_how_many_virtual_tokens_there_are(llm: LLM, make_adapter: MakeAdapter) -> None:
    path = make_adapter(50, 5)
    told, untold = PromptAdapterRequest("told", 50, path, 5), PromptAdapterRequest("told", 50, path)
    first, second = (ids(llm.generate("Hello", GREEDY, prompt_adapter_request=one)) for one in (told, untold))
    assert first == second
    wrong = PromptAdapterRequest("told", 50, path, prompt_adapter_num_virtual_tokens=6)
    with pytest.raises(InvalidArgument, match="is 6, and 'told' has 5") as refused:
        llm.generate("Hello", GREEDY, prompt_adapter_request=wrong)
    assert refused.value.field == "prompt_adapter_num_virtual_tokens"


@pytest.mark.parametrize(("argument", "value"), [("tensor_parallel_size", 2), ("trust_remote_code", True)])
def test_what_vllm_can_and_this_cannot_is_refused_by_name(tiny_model: Path, argument: str, value: object) -> None:
    with pytest.raises(Unsupported) as refused:
        make_llm(tiny_model, **{argument: value})
    assert refused.value.field == argument


def test_the_tokenizer_is_transformers_own(llm: LLM) -> None:
    assert llm.get_tokenizer().encode("Hello there") == llm.generate("Hello there", GREEDY)[0].prompt_token_ids
    assert llm.get_tokenizer() is llm.get_tokenizer()


def test_a_share_of_the_gpu_is_no_percentage(tiny_model: Path) -> None:
    with pytest.raises(InvalidArgument, match="above 0 and at most 1") as caught:
        make_llm(tiny_model, gpu_memory_utilization=90)
    assert caught.value.field == "gpu_memory_utilization"


def test_an_output_is_what_its_form_says(llm: LLM) -> None:
    form = StructuredOutputsParams(
        json={"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3}
    )
    params = SamplingParams(temperature=1.5, max_tokens=200, n=3, structured_outputs=form)
    free = llm.generate(["Hello"], GREEDY)
    outputs = llm.generate(["Count:", "Hello"], [params, GREEDY])
    for one in outputs[0].outputs:
        if one.finish_reason == "stop":
            assert 2 <= len(json.loads(one.text)) <= 3
    assert ids(outputs[1:]) == ids(free)


def test_a_form_that_is_none_is_refused_before_anything_runs(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="(["))
    with pytest.raises(InvalidArgument, match=r"prompts\[1\]: regex cannot be followed") as caught:
        llm.generate(["Hello", "Hello"], [GREEDY, params])
    assert caught.value.field == "structured_outputs"
