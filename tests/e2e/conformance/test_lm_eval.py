"""lm-eval's `local-completions` of a running system agrees with its `hf`, which transformers and PEFT compute."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.conformance, pytest.mark.timeout(2400)]

PACKAGES = ("lm-eval[api]==0.4.13",)
TOLERANCE = 1e-4
DOCUMENTS = [
    {
        "text": "My order still has not arrived. This is a",
        "choices": [" complaint", " thank you", " question"],
        "gold": 0,
    },
    {"text": "Thank you, the staff was very kind. This is a", "choices": [" complaint", " thank you"], "gold": 1},
    {"text": "The capital of France is", "choices": [" Paris", " London", " the river Seine", " 12"], "gold": 0},
    {"text": "Two and two are", "choices": [" four", " five", " fourteen and a half"], "gold": 0},
]
HEAD = """
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "toy_perplexity": """
output_type: loglikelihood_rolling
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "toy_generate": """
output_type: generate_until
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false, temperature: 0}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tasks as lm-eval wants them: YAML, over documents in a file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)), encoding="utf-8")
    for name, rest in TASKS.items():
        text = f"task: {name}\n{HEAD.format(data=data).strip()}\n{rest.strip()}\n"
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return folder


def numbers(response: Any) -> Iterator[float | bool | str]:
    """Every log-probability, whether it is greedy, and every text in a response, in order."""
    if isinstance(response, list):
        for part in response:
            yield from numbers(part)
    else:
        yield response


def test_every_kind_of_adapter_gets_the_numbers_that_peft_computes(
    start_system: Callable[..., Any],
    make_adapter: Callable[..., Path],
    tiny_model: Path,
    tasks: Path,
    python_with: Callable[..., Path],
    run: Callable[..., str],
    tmp_path: Path,
) -> None:
    folders = {
        "soft": make_adapter(51, 16),
        "prefix": make_adapter(52, 8, "prefix_tuning"),
        "lora": make_adapter(53, kind="lora"),
    }
    system = start_system("--prompt-adapters", f"soft={folders['soft']}", f"prefix={folders['prefix']}")
    assert system.cli("adapter", "add", "lora", str(folders["lora"])).returncode == 0
    models = {"tiny": None, **{name: str(folder) for name, folder in folders.items()}}
    asked, answered = tmp_path / "asked.json", tmp_path / "answered.json"
    url = f"{system.url}/v1/completions"
    asked.write_text(json.dumps({"tasks": str(tasks), "base": str(tiny_model), "url": url, "models": models}))
    python = python_with("lm-eval", *PACKAGES, beside_ours=True)
    run(python, Path(__file__).with_name("lm_eval_suite.py"), asked, answered)
    results = json.loads(answered.read_text(encoding="utf-8"))
    assert results.keys() == models.keys()
    for name, sides in results.items():
        assert sides["computed"].keys() == sides["served"].keys() == TASKS.keys()
        for task in TASKS:
            computed, served = (list(numbers(sides[side][task])) for side in ("computed", "served"))
            assert len(computed) == len(served) >= len(DOCUMENTS)
            for one, other in zip(computed, served, strict=True):
                is_number = isinstance(one, float)
                assert one == (pytest.approx(other, abs=TOLERANCE, rel=0) if is_number else other), (name, task)
    told = {name: json.dumps(sides["served"]) for name, sides in results.items()}
    assert len(set(told.values())) == len(models), "each adapter has numbers of its own"
