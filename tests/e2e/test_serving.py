"""A running system answers the OpenAI SDK and the command line."""

import base64
import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from softprompt.registry import RegistryClient
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

PROMPT = "The quick brown fox jumps over the lazy dog and"


@pytest.fixture(scope="module")
def system(start_system: Callable[..., Any], adapters: dict[str, Path]) -> Any:
    # Prompts of some length take several steps.
    return start_system(
        "--enable-prompt-adapter",
        "--prompt-adapters",
        *[f"{n}={p}" for n, p in adapters.items()],
        environment={"SOFTPROMPT_MAX_STEP_TOKENS": "128"},
    )


@pytest.fixture(scope="module")
def client(system: Any) -> Any:
    with system.openai() as client:
        yield client


def complete(client: openai.OpenAI, model: str, prompt: str = PROMPT, **options: Any) -> str:
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.completions.create(model=model, prompt=prompt, **options).choices[0].text


def chat(client: openai.OpenAI, model: str, text: str = "Hello") -> str:
    answer = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": text}], max_tokens=12, temperature=0
    )
    return answer.choices[0].message.content or ""


def test_the_start_tells_what_is_served_and_one_command_to_try(system: Any) -> None:
    text = system.text()
    for expected in ("tiny (LlamaForCausalLM", "cpu, float32", "pages of 16", "first@1, second@1, third@1"):
        assert expected in text
    assert f"curl {system.url}/v1/completions" in text


def test_the_printed_command_works_as_it_is(system: Any) -> None:
    lines = system.text().splitlines()
    body = next(line for line in lines if line.startswith("  -d '"))
    answer = httpx.post(
        f"{system.url}/v1/completions",
        content=body.removeprefix("  -d '").removesuffix("'"),
        headers={"content-type": "application/json"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-softprompt-adapter"] == "first@1"


def test_models_lists_the_base_and_the_adapters_with_root_and_parent(client: openai.OpenAI) -> None:
    models = {model.id: model.model_dump() for model in client.models.list()}
    assert {"tiny", "first", "second", "third"} <= set(models)
    assert models["first"]["parent"] == "tiny"
    assert models["tiny"]["parent"] is None
    assert models["first"]["root"]
    assert models["second"]["adapter"]["num_virtual_tokens"] == 16


def test_every_model_completes_in_its_own_way(client: openai.OpenAI) -> None:
    texts = {model: complete(client, model) for model in ("tiny", "first", "second", "third")}
    assert len(set(texts.values())) == 4
    assert texts == {model: complete(client, model) for model in texts}


def test_every_kind_is_registered_and_served_as_peft_computes_it(
    system: Any, client: openai.OpenAI, make_adapter: Callable[..., Path], tiny_model: Path
) -> None:
    folders = {
        "prefix": make_adapter(41, 20, "prefix_tuning"),
        "many": make_adapter(42, 5, "multitask"),
        "lora": make_adapter(43, kind="lora"),
    }
    for name, folder in folders.items():
        added = system.cli("adapter", "add", name, str(folder))
        assert added.returncode == 0, added.stderr
    texts = {model: complete(client, model) for model in ("prefix", "many:0", "many:1", "lora", "tiny")}
    assert len(set(texts.values())) == 5
    for model, text in texts.items():
        name, _, task = model.partition(":")
        assert text == complete_by_peft(tiny_model, folders.get(name), int(task) if task else None)
    assert {"prefix", "many:0", "many:1", "lora"} <= {model.id for model in client.models.list()}
    assert chat(client, "lora") not in {chat(client, "tiny"), chat(client, "prefix")}
    with pytest.raises(openai.BadRequestError, match="name one of them, for example many:0"):
        complete(client, "many")


def complete_by_peft(model: Path, adapter: Path | None, task: int | None) -> str:
    """What PEFT's own generate makes of PROMPT."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if adapter is not None:
            oracle = PeftModel.from_pretrained(oracle, adapter)
        tokenizer = AutoTokenizer.from_pretrained(model)
        inputs = tokenizer(PROMPT, return_tensors="pt")
        tasks = {} if task is None else {"task_ids": torch.tensor([task])}
        made = oracle.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=0, **tasks)
    return str(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_adapters_put_together_answer_as_computed_by_hand(
    system: Any,
    client: openai.OpenAI,
    make_adapter: Callable[..., Path],
    tiny_model: Path,
    adapters: dict[str, Path],
) -> None:
    lora = make_adapter(44, kind="lora")
    assert system.cli("adapter", "add", "beside", str(lora)).returncode == 0
    first, second = adapters["first"], adapters["second"]
    inside = [{"type": "soft_prompt", "name": "second"}, {"type": "text", "text": " and on"}]
    asked = [
        ({"model": "first+second"}, PROMPT, [first, second, PROMPT], None),
        ({"model": "second+beside+first"}, PROMPT, [second, first, PROMPT], lora),
        ({"model": "tiny", "extra_body": {"adapters": ["first", "beside"]}}, PROMPT, [first, PROMPT], lora),
        ({"model": "tiny"}, [{"type": "text", "text": PROMPT}, *inside], [PROMPT, second, " and on"], None),
        (
            {"model": "first+beside"},
            [{"type": "text", "text": PROMPT}, *inside],
            [first, PROMPT, second, " and on"],
            lora,
        ),
        ({"model": "tiny"}, PROMPT, [PROMPT], None),
    ]

    def ask(number: int) -> str:
        options, prompt, _, _ = asked[number % len(asked)]
        answer = client.completions.create(prompt=prompt, max_tokens=12, temperature=0, **options)
        return str(answer.choices[0].text)

    with ThreadPoolExecutor(12) as threads:
        texts = list(threads.map(ask, range(2 * len(asked))))
    by_hand = [complete_by_hand(tiny_model, parts, one) for _, _, parts, one in asked]
    assert texts == by_hand * 2
    assert len(set(by_hand)) == len(by_hand)
    answer = client.completions.with_raw_response.create(
        model="first+beside", prompt=asked[4][1], max_tokens=1, temperature=0
    )
    assert answer.headers["x-softprompt-adapter"] == "first@1+beside@1+second@1"
    usage = answer.parse().usage
    assert usage is not None
    assert usage.prompt_tokens_details.model_dump()["virtual_tokens"] == 5 + 16
    assert client.models.retrieve("first+beside").model_dump()["root"] == "first@1+beside@1"
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}, *inside]}]
    answers = [
        client.chat.completions.create(model=model, messages=messages, max_tokens=12, temperature=0)
        for model in ("tiny", "beside")
    ]
    assert len({answer.choices[0].message.content for answer in answers}) == 2
    with pytest.raises(openai.BadRequestError, match="beside and beside are both LoRAs"):
        complete(client, "beside+first+beside")


def complete_by_hand(model: Path, parts: list[Path | str], lora: Path | None) -> str:
    """Greedy text over the rows of adapters and the embeddings of texts, one behind the other."""
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if lora is not None:
            oracle = PeftModel.from_pretrained(oracle, lora)
        tokenizer = AutoTokenizer.from_pretrained(model)
        embed = oracle.get_input_embeddings()
        rows = [
            load_file(part / "adapter_model.safetensors")["prompt_embeddings"]
            if isinstance(part, Path)
            else embed(tokenizer(part, return_tensors="pt").input_ids[0])
            for part in parts
        ]
        made: list[int] = []
        while len(made) < 12 and tokenizer.eos_token_id not in made:
            inputs = torch.cat([*rows, embed(torch.tensor(made, dtype=torch.long))])
            logits = oracle(inputs_embeds=inputs[None], use_cache=False).logits
            made.append(int(logits[0, -1].argmax()))
    return str(tokenizer.decode(made, skip_special_tokens=True))


def test_virtual_tokens_are_counted_apart(client: openai.OpenAI) -> None:
    def usage(model: str) -> Any:
        return client.completions.create(model=model, prompt=PROMPT, max_tokens=1).usage

    base, adapted = usage("tiny"), usage("second")
    assert adapted.prompt_tokens == base.prompt_tokens
    assert adapted.prompt_tokens_details.model_dump()["virtual_tokens"] == 16


def test_streams_give_the_same_text(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="first", prompt=PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream if chunk.choices) == complete(client, "first")
    chunks = client.chat.completions.create(
        model="first",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    received = list(chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in received if chunk.choices)
    assert text == chat(client, "first")
    assert received[-1].usage is not None
    assert received[-1].usage.completion_tokens > 0


def test_requests_together_get_what_each_gets_alone(client: openai.OpenAI) -> None:
    models = ("tiny", "first", "second", "third")
    requests = [(models[number % 4], f"Prompt {number} says {'very ' * (number % 7)}much") for number in range(32)]
    alone = [complete(client, model, prompt) for model, prompt in requests]

    def ask(number: int) -> str:
        model, prompt = requests[number]
        if number % 2:
            return complete(client, model, prompt)
        stream = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(len(requests)) as threads:
        assert list(threads.map(ask, range(len(requests)))) == alone


def test_an_unknown_model_is_404_with_a_suggestion(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        complete(client, "secnd")
    assert raised.value.code == "model_not_found"
    assert "second" in raised.value.message


def test_an_adapter_added_while_serving_is_used_by_the_next_request(
    system: Any, client: openai.OpenAI, make_adapter: Callable[..., Path]
) -> None:
    first, second = make_adapter(10, 7), make_adapter(11, 7)
    added = system.cli("adapter", "add", "added", str(first), "--label", "by=test", "--json")
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["version"] == 1
    before = complete(client, "added"), chat(client, "added")
    assert before != (complete(client, "tiny"), chat(client, "tiny"))

    assert "added@2" in system.cli("adapter", "add", "added", str(second)).stdout
    assert (complete(client, "added"), chat(client, "added")) != before
    assert (complete(client, "added@1"), chat(client, "added@1")) == before

    listed = json.loads(system.cli("adapter", "ls", "--json").stdout)
    assert {info["name"]: info["version"] for info in listed}["added"] == 2
    assert system.cli("adapter", "label", "added", "team=a").returncode == 0
    labelled = json.loads(system.cli("adapter", "ls", "--label", "team=a", "--json").stdout)
    assert [info["name"] for info in labelled] == ["added"]
    assert "no adapters with these labels" in system.cli("adapter", "ls", "--label", "team=b").stdout
    assert "is not KEY=VALUE" in system.cli("adapter", "ls", "--label", "team").stderr
    shown = json.loads(system.cli("adapter", "show", "added", "--json").stdout)
    assert shown["versions"] == [2, 1]
    assert "PROMPT_TUNING" in system.cli("adapter", "show", "added@1").stdout

    assert "1 version" in system.cli("adapter", "rm", "added@2").stdout
    assert (complete(client, "added"), chat(client, "added")) == before
    assert system.cli("adapter", "rm", "added").returncode == 0
    with pytest.raises(openai.NotFoundError):
        complete(client, "added")
    gone = system.cli("adapter", "show", "added")
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1


def test_a_version_is_promoted_rolled_back_and_kept_by_the_command_line(
    system: Any, client: openai.OpenAI, make_adapter: Callable[..., Path]
) -> None:
    folders = [make_adapter(seed, 7) for seed in (30, 31)]
    for folder in folders:
        assert system.cli("adapter", "add", "staged", str(folder)).returncode == 0
    one, two = complete(client, "staged@1"), complete(client, "staged@2")
    assert one != two
    assert system.cli("adapter", "alias", "staged", "prod", "1").stdout == "staged@prod is staged@1 now\n"
    assert (complete(client, "staged@prod"), complete(client, "staged")) == (one, two)
    assert "and was staged@2" in system.cli("adapter", "rollback", "staged").stdout
    assert complete(client, "staged") == one
    with RegistryClient(system.registry) as registry:  # as `--prompt-adapters` does at a start
        assert [registry.ensure("staged", folder)[1] for folder in folders] == [False, False]
    assert complete(client, "staged") == one
    assert "there is no version before staged@1" in system.cli("adapter", "rollback", "staged").stderr
    moved = system.cli("adapter", "alias", "staged", "prod", "2", "--expect", "2")
    assert (moved.returncode, moved.stderr.count("\n")) == (1, 1)
    assert "points to version 1, and was expected to point to version 2" in moved.stderr

    assert "the alias prod points to staged@1" in system.cli("adapter", "rm", "staged@1").stderr
    assert "staged@2 is pinned" in system.cli("adapter", "pin", "staged@2").stdout
    assert "staged@2 is pinned" in system.cli("adapter", "rm", "staged").stderr
    assert "say NAME@VERSION" in system.cli("adapter", "rm", "staged@prod").stderr
    labelled = system.cli("adapter", "label", "staged@prod", "team=x", "stage=prod", "--remove", "nothing")
    assert labelled.stdout == "staged@1 has stage=prod, team=x\n"
    shown = json.loads(system.cli("adapter", "show", "staged", "--json").stdout)
    assert (shown["version"], shown["aliases"], shown["pinned"]) == (1, ["latest", "prod"], False)
    assert shown["labels"] == {"stage": "prod", "team": "x"}
    listed = {info["name"]: info for info in json.loads(system.cli("adapter", "ls", "--json").stdout)}
    assert listed["staged"]["aliases"] == ["latest", "prod"]

    resident = {info["adapter"]: info for info in json.loads(system.cli("adapter", "ps", "--json").stdout)}
    assert (resident["staged@1"]["tier"], resident["staged@1"]["in_use"]) == ("device", 0)
    assert resident["staged@1"]["hits"] >= 2
    assert system.cli("adapter", "evict", "staged@1").returncode == 0
    assert "staged@1 " not in system.cli("adapter", "ps").stdout
    assert "on the device, pinned: " in system.cli("adapter", "preload", "staged@prod", "--pin").stdout
    assert "staged@1 " in system.cli("adapter", "ps").stdout

    assert system.cli("adapter", "unpin", "staged@2").returncode == 0
    assert system.cli("adapter", "alias", "staged", "prod", "--remove").stdout == "removed staged@prod\n"
    assert system.cli("adapter", "rm", "staged").returncode == 0


def test_a_bad_adapter_is_refused_in_one_line_and_serving_goes_on(
    system: Any, client: openai.OpenAI, adapters: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "adapter_config.json").write_bytes((adapters["first"] / "adapter_config.json").read_bytes())
    tensors = (adapters["first"] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(tensors[:-4] + b"\x00\x00\xc0\x7f")  # a NaN
    refused = system.cli("adapter", "add", "broken", str(tmp_path))
    assert refused.returncode == 1
    assert "prompt_embeddings" in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert complete(client, "first")


def test_adapters_of_one_length_under_one_text_never_share_what_was_computed(
    system: Any, client: openai.OpenAI, make_adapter: Callable[..., Path]
) -> None:
    # Exactly one page of virtual tokens, and a text of several pages: all of it would be found again.
    prompt = PROMPT * 8
    alike = ("one", "other")
    for seed, name in enumerate(alike, start=20):
        assert system.cli("adapter", "add", name, str(make_adapter(seed, 16))).returncode == 0
    models = (*alike, "second", "tiny")
    texts = {model: complete(client, model, prompt) for model in models}
    assert len(set(texts.values())) == len(models)
    with ThreadPoolExecutor(16) as threads:
        again = list(threads.map(lambda number: complete(client, models[number % 4], prompt), range(16)))
    assert again == [texts[models[number % 4]] for number in range(16)]
    found = client.completions.create(model="one", prompt=prompt, max_tokens=1).usage.prompt_tokens_details
    assert found.cached_tokens > 0


def test_an_adapter_may_be_named_after_its_base_model(client: openai.OpenAI) -> None:
    assert complete(client, "tiny:second") == complete(client, "second@1") == complete(client, "second")
    with pytest.raises(openai.NotFoundError):
        complete(client, "other:second")


def test_the_answer_names_the_version_that_made_it(system: Any, client: openai.OpenAI) -> None:
    answer = client.completions.with_raw_response.create(model="second", prompt=PROMPT, max_tokens=1)
    listed = client.models.retrieve("second").model_dump()["adapter"]
    assert answer.headers["x-softprompt-adapter"] == "second@1"
    assert answer.headers["x-softprompt-adapter-digest"] == listed["digest"]


def test_a_response_is_computed_with_its_adapters(client: openai.OpenAI) -> None:
    fields: Any = {"input": "Hello", "max_output_tokens": 12, "temperature": 0}
    answers = {
        model: client.responses.with_raw_response.create(model=model, **fields)
        for model in ("tiny", "first", "second", "first+second")
    }
    texts = {model: answer.parse().output_text for model, answer in answers.items()}
    assert len(set(texts.values())) == len(texts)
    assert texts["second"] == chat(client, "second")
    assert answers["first+second"].headers["x-softprompt-adapter"] == "first@1+second@1"
    usage = answers["first+second"].parse().usage
    assert usage.input_tokens_details.virtual_tokens == 5 + 16


def test_virtual_tokens_count_against_the_context(client: openai.OpenAI) -> None:
    ids = [5] * 500  # of 512; "second" has 16 virtual tokens
    fits = client.completions.create(model="tiny", prompt=ids, max_tokens=2)
    assert fits.usage.prompt_tokens == 500
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="second", prompt=ids, max_tokens=2)
    assert raised.value.code == "context_length_exceeded"
    for number in ("512", "500", "16 virtual"):
        assert number in raised.value.message


def test_an_empty_prompt_is_refused_by_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        complete(client, "second", "")
    assert raised.value.param == "prompt"


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_a_truncated_upload_is_refused_and_registers_nothing(
    system: Any, client: openai.OpenAI, adapters: dict[str, Path], kept: float
) -> None:
    tensors = (adapters["first"] / "adapter_model.safetensors").read_bytes()
    answer = httpx.post(
        f"{system.url}/v1/adapters",
        json={
            "name": "truncated",
            "config": json.loads((adapters["first"] / "adapter_config.json").read_text(encoding="utf-8")),
            "tensors_base64": base64.b64encode(tensors[: int(len(tensors) * kept)]).decode(),
        },
        timeout=60,
    )
    assert answer.status_code == 422, answer.text
    assert answer.json()["error"]["code"] == "adapter_invalid"
    assert answer.json()["error"]["param"].startswith("tensors")
    assert "truncated" not in {model.id for model in client.models.list()}
    assert complete(client, "first")


def test_the_command_line_completes_and_chats(system: Any, client: openai.OpenAI) -> None:
    done = system.command("complete", PROMPT, "-m", "second", "--max-tokens", "12")
    assert done.stdout.rstrip("\n") == complete(client, "second").rstrip("\n"), done.stderr
    talked = system.command("chat", "-m", "second", "--max-tokens", "12", stdin="Hello\n")
    assert talked.stdout.rstrip("\n") == chat(client, "second").rstrip("\n"), talked.stderr
    wrong = system.command("complete", "x", "-m", "nobody")
    assert wrong.returncode == 1
    assert "nobody" in wrong.stderr


TOLERANCE = 1e-4
CONTEXTS = ("The quick brown fox", "Question: what is it? Answer:", "One, two, three and")
CONTINUATIONS = (" jumps over the lazy dog", " a lazy dog", " four, five, six")


@pytest.fixture(scope="module")
def scored(system: Any, adapters: dict[str, Path], make_adapter: Callable[..., Path]) -> dict[str, Path | None]:
    """Models whose prompts are scored, and their folders."""
    prefix = make_adapter(51, 20, "prefix_tuning")
    assert system.cli("adapter", "add", "scored-prefix", str(prefix)).returncode == 0
    return {"tiny": None, "first": adapters["first"], "scored-prefix": prefix}


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def likelihoods(model: Path, folder: Path | None, prompts: list[list[int]]) -> list[list[float | None]]:
    """What transformers and PEFT find, each prompt alone; None for the first where nothing predicts it."""
    found = []
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        if folder is not None:
            oracle = PeftModel.from_pretrained(oracle, folder)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            logits = oracle(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
            logprobs = torch.log_softmax(logits, -1)
            start = len(logits) - len(prompt)
            found.append(
                [
                    float(logprobs[start + i - 1, token_id]) if start + i else None
                    for i, token_id in enumerate(prompt)
                ]
            )
    return found


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("name", ["tiny", "first", "scored-prefix"])
def test_ids_are_scored_as_an_evaluation_harness_asks_for_it(
    client: openai.OpenAI,
    tokenizer: Any,
    tiny_model: Path,
    scored: dict[str, Path | None],
    name: str,
    max_tokens: int,
) -> None:
    prompts = [tokenizer(c + more).input_ids for c, more in zip(CONTEXTS, CONTINUATIONS, strict=True)]
    answer = client.completions.create(
        model=name, prompt=prompts, max_tokens=max_tokens, temperature=0, echo=True, logprobs=1, seed=1234
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    expected = likelihoods(tiny_model, scored[name], prompts)
    for choice, prompt, each in zip(answer.choices, prompts, expected, strict=True):
        found = choice.logprobs
        assert found is not None
        assert found.token_logprobs is not None
        assert found.tokens is not None
        assert found.top_logprobs is not None
        assert found.text_offset is not None
        assert len(found.tokens) == len(prompt) + max_tokens
        own = found.token_logprobs[: len(prompt)]
        assert [value is None for value in own] == [value is None for value in each]
        assert own[1:] == pytest.approx(each[1:], abs=TOLERANCE)
        if each[0] is not None:
            assert own[0] == pytest.approx(each[0], abs=TOLERANCE)
        # Greedy tokens are told from others as harnesses do.
        for logprob, top in zip(own[1:], found.top_logprobs[1 : len(prompt)], strict=True):
            assert logprob is not None
            assert max(top.values()) >= logprob
        assert choice.text.startswith(tokenizer.decode(prompt))
        for token, offset in zip(found.tokens[: len(prompt)], found.text_offset, strict=False):
            assert choice.text[offset : offset + len(token)] == token


def test_a_stream_tells_the_same_in_pieces(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "first",
        "prompt": "The quick brown fox jumps over the lazy dog. " * 20,
        "max_tokens": 3,
        "temperature": 0,
        "echo": True,
        "logprobs": 2,
        "extra_body": {"prompt_logprobs": 1},
    }
    [whole] = client.completions.create(**asked).choices
    pieces = [chunk.choices[0] for chunk in client.completions.create(stream=True, **asked)]
    assert "".join(piece.text for piece in pieces) == whole.text
    assert whole.logprobs is not None
    for name, values in whole.logprobs.model_dump().items():
        found = [value for piece in pieces if piece.logprobs for value in getattr(piece.logprobs, name)]
        # Computed in other steps: the last bits may differ.
        if name == "token_logprobs":
            assert found == pytest.approx(values, abs=TOLERANCE)
        elif name != "top_logprobs":
            assert found == values
    told = [
        piece.model_extra["prompt_logprobs"] for piece in pieces if "prompt_logprobs" in (piece.model_extra or {})
    ]
    assert len(told) > 1
    assert [[*each] for piece in told for each in piece] == [
        [*each] for each in whole.model_extra["prompt_logprobs"]
    ]


def test_the_best_of_several_is_the_likeliest_per_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 6, "seed": 3, "logprobs": 0}
    every = client.completions.create(n=5, **asked)
    best = client.completions.create(n=2, best_of=5, **asked)

    def mean(choice: Any) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    expected = sorted(every.choices, key=mean, reverse=True)[:2]
    assert [choice.text for choice in best.choices] == [choice.text for choice in expected]
    assert best.usage is not None
    assert every.usage is not None
    assert best.usage.completion_tokens == every.usage.completion_tokens
    with pytest.raises(openai.BadRequestError, match="cannot be streamed"):
        client.completions.create(n=1, best_of=2, stream=True, **asked)


def test_a_requests_id_is_in_every_services_log_lines_and_its_prompt_in_none(
    system: Any, make_adapter: Callable[..., Path], wait_until: Callable[..., None]
) -> None:
    folder = make_adapter(45)
    body = {
        "name": "logged",
        "config": json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")),
        "tensors_base64": base64.b64encode((folder / "adapter_model.safetensors").read_bytes()).decode(),
    }
    headers = {"x-request-id": "the-registration"}
    assert httpx.post(f"{system.url}/v1/adapters", json=body, headers=headers, timeout=60).status_code == 201
    body = {"model": "logged", "prompt": "unmistakable words", "max_tokens": 3, "ignore_eos": True}
    headers = {"x-request-id": "the-completion"}
    answer = httpx.post(f"{system.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "the-completion")

    def texts() -> list[str]:
        folder = system.data_dir / "logs"
        return [(folder / f"{name}.log").read_text() for name in ("gateway", "inference", "registry")]

    def told() -> dict[tuple[str, str], dict[str, Any]]:
        lines = [json.loads(line) for text in texts() for line in text.splitlines() if line.startswith("{")]
        return {
            (line["request_id"], line["event"]): line
            for line in lines
            if line.get("request_id") in ("the-registration", "the-completion")
        }

    # An answer does not wait for what is told of it.
    expected = {
        *(("the-registration", event) for event in ("audit", "request", "registered")),
        *(("the-completion", event) for event in ("request", "generated")),
    }
    wait_until(lambda: expected <= told().keys(), "the lines of both requests")
    of = told()
    request, generated = of["the-completion", "request"], of["the-completion", "generated"]
    assert (request["method"], request["route"], request["status"]) == ("POST", "/v1/completions", 200)
    assert (request["model"], request["adapters"]) == ("logged", "logged@1")
    assert request["completion_tokens"] == generated["completion_tokens"] == 3
    assert request["prompt_tokens"] == generated["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]
    assert not any("unmistakable" in text for text in texts())
