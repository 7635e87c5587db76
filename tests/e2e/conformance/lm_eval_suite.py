"""lm-eval's numbers of adapters, once computed by transformers and PEFT and once by a server.

python lm_eval_suite.py ASKED.json ANSWERED.json, in an environment that has `lm-eval[api]`. ASKED has `tasks` (a
folder), `base` (a model's folder), `url` (of completions), and `models`: for each name at the server, PEFT's
folder or null. ANSWERED has, for each name and task, the responses of every document on both sides.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

TASKS = ["toy_choice", "toy_perplexity", "toy_generate"]


def responses(manager: TaskManager, kind: str, **arguments: Any) -> dict[str, list[Any]]:
    """What each task's documents were answered with."""
    results = lm_eval.simple_evaluate(
        model=kind,
        model_args=arguments,
        tasks=TASKS,
        task_manager=manager,
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
    )
    return {
        task: [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for task, samples in results["samples"].items()
    }


def main() -> None:
    asked_path, answered_path = map(Path, sys.argv[1:])
    asked = json.loads(asked_path.read_text(encoding="utf-8"))
    manager = TaskManager(include_path=asked["tasks"], include_defaults=False)
    answered = {}
    for name, adapter in asked["models"].items():
        peft = {"peft": adapter} if adapter else {}
        answered[name] = {
            "computed": responses(manager, "hf", pretrained=asked["base"], dtype="float32", **peft),
            "served": responses(
                manager, "local-completions", model=name, base_url=asked["url"], tokenizer=asked["base"]
            ),
        }
    answered_path.write_text(json.dumps(answered), encoding="utf-8")


if __name__ == "__main__":
    main()
