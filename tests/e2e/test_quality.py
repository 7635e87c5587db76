"""What a running system tells of adapters: what they change, what they are near, and that they are PEFT's."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from softprompt_inference.effect import PROMPTS
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

KINDS = ["prompt_tuning", "prefix_tuning", "lora", "multitask"]


@pytest.fixture(scope="module")
def hub(open_hub: Any) -> Iterator[Any]:
    with contextlib.closing(open_hub()) as hub:
        yield hub


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def system(start_system: Callable[..., Any], hub: Any, root: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        return start_system("--allow-file-imports", str(root), "--allow-hub-imports")


@pytest.fixture(scope="module")
def folders(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {kind: make_adapter(80, 16, kind) for kind in KINDS}


def add(system: Any, name: str, folder: Path, *options: str) -> Any:
    done = system.cli("adapter", "add", name, str(folder), *options)
    assert done.returncode == 0, done.stderr
    return done


@torch.inference_mode()
def next_logprobs(model_folder: Path, adapter: Path | None, task: int | None) -> torch.Tensor:
    """PEFT's own distributions of the token after each fixed prompt: [prompts, vocabulary]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT and transformers warn of each other
        model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter)
        tokenizer = AutoTokenizer.from_pretrained(model_folder)
        tasks = {} if task is None else {"task_ids": torch.tensor([task])}
        inputs = [tokenizer(prompt, return_tensors="pt") for prompt in PROMPTS]
        logits = [model.eval()(**one, **tasks).logits[0, -1] for one in inputs]
    return torch.log_softmax(torch.stack(logits).double(), dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_effect_is_that_of_pefts_own_distributions(
    system: Any, tiny_model: Path, folders: dict[str, Path], kind: str
) -> None:
    added = json.loads(add(system, kind, folders[kind], "--json").stdout)
    effects = added["probe"]["effects"]
    assert [effect["task"] for effect in effects] == ([0, 1] if kind == "multitask" else [None])
    without = next_logprobs(tiny_model, None, None)
    for effect in effects:
        own = next_logprobs(tiny_model, folders[kind], effect["task"])
        divergences = (own.exp() * (own - without)).sum(-1)
        assert effect["num_prompts"] == len(PROMPTS)
        assert effect["mean_kl"] == pytest.approx(float(divergences.mean()), rel=1e-3)
        assert effect["max_kl"] == pytest.approx(float(divergences.max()), rel=1e-3)
        assert effect["num_flips"] == int((own.argmax(-1) != without.argmax(-1)).sum())
    shown = system.cli("adapter", "show", kind).stdout
    assert f"mean KL {effects[0]['mean_kl']:.3g} nats" in shown


def test_an_adapter_that_does_nothing_is_added_and_warned_of(
    system: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    tensors = load_file(folders["lora"] / "adapter_model.safetensors")
    tensors = {name: value * 1e-5 if "lora_B" in name else value for name, value in tensors.items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    (tmp_path / "adapter_config.json").write_bytes((folders["lora"] / "adapter_config.json").read_bytes())
    added = add(system, "nothing", tmp_path)
    assert "nothing@1 is ready" in added.stdout
    assert "warning: the adapter changes next to nothing: mean KL" in added.stderr
    assert "changes next to nothing" in httpx.get(f"{system.url}/v1/adapters/nothing").json()["warnings"][-1]


def test_an_adapter_is_added_where_nobody_can_measure_it(system: Any, folders: dict[str, Path]) -> None:
    added = add(system, "unmeasured", folders["lora"], "--inference", "127.0.0.1:1")
    assert "unmeasured@1 is ready" in added.stdout
    assert "its effect was not measured: no inference service answers" in added.stderr
    assert "not measured yet" in system.cli("adapter", "show", "unmeasured").stdout
    quiet = add(system, "quiet", folders["lora"], "--no-probe")
    assert "measured" not in quiet.stderr
    probed = system.cli("adapter", "probe", "unmeasured")
    assert probed.returncode == 0, probed.stderr
    assert probed.stdout.startswith("unmeasured@1: mean KL ")


def test_norms_are_kept_beside_those_of_the_vocabulary(
    system: Any, tiny_model: Path, folders: dict[str, Path]
) -> None:
    add(system, "norms", folders["prompt_tuning"], "--no-probe")
    shown = httpx.get(f"{system.url}/v1/adapters/norms").json()
    rows = load_file(folders["prompt_tuning"] / "adapter_model.safetensors")["prompt_embeddings"].norm(dim=-1)
    weight = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight.detach()
    assert shown["row_norms"]["low"] == pytest.approx(float(rows.min()), rel=1e-5)
    assert shown["row_norms"]["high"] == pytest.approx(float(rows.max()), rel=1e-5)
    assert shown["vocabulary_norms"]["median"] == pytest.approx(float(weight.norm(dim=-1).median()), rel=0.01)


@pytest.mark.parametrize("spelling", ["near", "near_tasks:1"])
def test_the_nearest_tokens_are_told_over_http_and_by_the_command(
    system: Any, tiny_model: Path, folders: dict[str, Path], spelling: str
) -> None:
    name, _, task = spelling.partition(":")
    tensors = load_file(folders["multitask" if task else "prompt_tuning"] / "adapter_model.safetensors")
    add(system, name, folders["multitask" if task else "prompt_tuning"], "--no-probe")
    rows = tensors["prompt_embeddings"]
    if task:
        rows = rows * (tensors["prefix_task_cols"][1] @ tensors["prefix_task_rows"][1])
    weight = AutoModelForCausalLM.from_pretrained(tiny_model).get_input_embeddings().weight.detach()
    cosines = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(weight, dim=-1).T
    wanted = cosines.topk(3)
    answer = httpx.get(
        f"{system.url}/v1/adapters/{spelling}/nearest-tokens", params={"top_k": 3}, timeout=60
    ).json()
    found = [[near["token_id"] for near in virtual["tokens"]] for virtual in answer["data"]]
    assert found == wanted.indices.tolist()
    printed = json.loads(system.cli("adapter", "nearest", spelling, "--top-k", "3", "--json").stdout)
    assert [[near["token_id"] for near in virtual["nearest"]] for virtual in printed] == found
    assert f"{printed[0]['nearest'][0]['cosine']:.2f}" in system.cli("adapter", "nearest", spelling).stdout


def test_keys_and_values_are_near_no_tokens(system: Any, folders: dict[str, Path]) -> None:
    add(system, "keys", folders["prefix_tuning"], "--no-probe")
    answer = httpx.get(f"{system.url}/v1/adapters/keys/nearest-tokens", timeout=60)
    assert answer.status_code == 400
    assert "only virtual tokens that are embeddings" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_served_is_verified_to_be_pefts(
    system: Any, tiny_model: Path, folders: dict[str, Path], kind: str
) -> None:
    name = f"verified-{kind.replace('_', '-')}"
    add(system, name, folders[kind], "--no-probe")
    spelling = f"{name}:1" if kind == "multitask" else name
    done = system.cli(
        "adapter", "verify", spelling, "--model", str(tiny_model), "--prompt", "Hello there, my friend"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "equal: log-probabilities within 0.0001" in done.stdout
    assert done.stderr == ""


def test_what_is_not_pefts_is_told_with_the_first_difference(
    system: Any, tiny_model: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    add(system, "differs", folders["prompt_tuning"], "--no-probe")
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.01)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    arguments = ("differs", "--model", str(tmp_path), "--prompt", "Hello")
    told = system.cli("adapter", "verify", *arguments)
    assert told.returncode == 1
    assert "NOT EQUAL" in told.stdout
    shown = json.loads(system.cli("adapter", "verify", *arguments, "--json").stdout)
    assert not shown["equal"]
    assert shown["prompts"][0]["largest_delta"] > 1e-4


def test_a_base_model_that_is_not_here_is_asked_for(system: Any, folders: dict[str, Path]) -> None:
    add(system, "nowhere", folders["prompt_tuning"], "--no-probe")
    done = system.cli("adapter", "verify", "nowhere", "--prompt", "Hello")
    assert done.returncode == 1
    assert "say with --model where the base model is" in done.stderr


def test_adapters_are_imported_from_below_the_root_and_from_the_hub(
    system: Any, hub: Any, root: Path, folders: dict[str, Path]
) -> None:
    hub.put("somebody/tweets", folders["lora"])
    inside = root / "tweets"
    inside.mkdir()
    for path in folders["lora"].iterdir():
        (inside / path.name).write_bytes(path.read_bytes())
    digests = set()
    for name, source in (("from-file", f"file://{inside}"), ("from-hub", "hf://somebody/tweets@v1")):
        answer = httpx.post(f"{system.url}/v1/adapters", json={"name": name, "source": source}, timeout=60)
        assert answer.status_code == 201, answer.text
        digests.add(answer.json()["digest"])
    uploaded = json.loads(add(system, "uploaded", folders["lora"], "--no-probe", "--json").stdout)
    assert digests == {uploaded["digest"]}
    outside = {"name": "outside", "source": f"file://{folders['lora']}"}
    refused = httpx.post(f"{system.url}/v1/adapters", json=outside, timeout=60)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "source")
    assert str(folders["lora"]) not in refused.text


def test_scripts_for_other_servers_load_and_unload_adapters(
    system: Any, root: Path, folders: dict[str, Path]
) -> None:
    def post(route: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{system.url}/v1/{route}", json=body, timeout=60)

    for what, kind in (("lora", "lora"), ("prompt_adapter", "prompt_tuning")):
        inside = root / f"script {kind}"
        inside.mkdir()
        for path in folders[kind].iterdir():
            (inside / path.name).write_bytes(path.read_bytes())
        route, name = what.removesuffix("_adapter"), f"script-{kind.replace('_', '-')}"
        loaded = post(f"load_{route}_adapter", **{f"{what}_name": name, f"{what}_path": str(inside)})
        assert loaded.status_code == 200, loaded.text
        assert loaded.text.startswith("Success: ")
        answer = post("completions", model=name, prompt="Hello", max_tokens=1)
        assert answer.headers["x-softprompt-adapter"] == f"{name}@1"
        again = post(f"load_{route}_adapter", **{f"{what}_name": name, f"{what}_path": str(inside)})
        assert (again.status_code, again.json()["error"]["param"]) == (400, f"{what}_name")
        assert post(f"unload_{route}_adapter", **{f"{what}_name": name}).status_code == 200
        assert post("completions", model=name, prompt="Hello", max_tokens=1).status_code == 404
