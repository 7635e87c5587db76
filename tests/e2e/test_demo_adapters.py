"""The committed demo adapters over HTTP say, token for token, what PEFT generates with the default model."""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

MAX_TOKENS = 8
# Where PEFT's two likeliest tokens are closer than this, float32 cannot tell which is first.
WAIVED_MARGIN = 2e-4
SCHEMA = "CREATE TABLE singers (name VARCHAR, age INTEGER)"
PROMPTS = {
    "tweet_adapter": "Tweet text : @airline you lost my bags again, thanks for nothing Label :",
    "sms_spam": "SMS text : You have WON a prize! Call 09061701461 now to claim Label :",
    "sql_adapter": (
        "[user] Write a SQL query to answer the question based on the table schema.\n\n"
        f" context: {SCHEMA}\n\n question: What are the names of singers older than 30? [/user] [assistant]"
    ),
}


@pytest.fixture(scope="module")
def model_path() -> str:
    from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model

    return str(resolve_model(DEFAULT_MODEL))


@pytest.fixture(scope="module")
def base(model_path: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)


def peft_answer(base: Any, adapter: Path, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
    """PEFT's greedy tokens at batch size one in float32, and how far the second choice was behind each."""
    import torch
    from peft import PeftModel

    ids = torch.tensor([prompt_ids])
    with warnings.catch_warnings(), torch.inference_mode():  # PEFT's warnings are not ours
        warnings.simplefilter("ignore")
        answer = PeftModel.from_pretrained(base, adapter).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    two = torch.log_softmax(torch.cat(answer.logits), dim=-1).topk(2).values
    return answer.sequences[0, ids.shape[1] :].tolist(), (two[:, 0] - two[:, 1]).tolist()


def test_demo_adapters_in_one_batch_say_over_http_what_peft_says(
    demo_system: Any, demo_adapters: dict[str, Path], base: Any, model_path: str
) -> None:
    from transformers import AutoTokenizer

    with demo_system.openai() as client:
        complete = partial(
            client.completions.create, max_tokens=MAX_TOKENS, temperature=0, extra_body={"return_token_ids": True}
        )
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            answers = dict(
                zip(
                    PROMPTS,
                    threads.map(lambda name: complete(model=name, prompt=PROMPTS[name]), PROMPTS),
                    strict=True,
                )
            )
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    for name, answer in answers.items():
        expected, margins = peft_answer(base, demo_adapters[name], tokenizer(PROMPTS[name]).input_ids)
        served = answer.choices[0].model_dump()["token_ids"]
        assert len(set(expected)) > 1
        differ = next((i for i, ids in enumerate(zip(expected, served, strict=False)) if len(set(ids)) > 1), None)
        assert differ is None or margins[differ] < WAIVED_MARGIN, (name, expected, served)
        if differ is None:
            assert served == expected, name


def test_what_is_served_is_verified_from_the_command_line(demo_system: Any, model_path: str) -> None:
    done = demo_system.cli("adapter", "verify", "sms_spam", "--model", model_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nequal: log-probabilities within" in done.stdout
