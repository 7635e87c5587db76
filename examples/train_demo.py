"""Train and evaluate the demo adapters: `python examples/train_demo.py tweet_adapter`.

Each is a PEFT prompt-tuning adapter for the default model: a few virtual tokens in front of the prompt, trained on
the completion's tokens alone, with every weight of the model frozen.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_tasks import TASK_NAMES, Example, Instruction, Task, load_task
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from safetensors.torch import load_file
from softprompt_inference.model.source import DEFAULT_MODEL, default_cache_dir, resolve_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

EXAMPLES = Path(__file__).resolve().parent
WARMUP_SHARE = 0.06
MAX_PROMPT_TOKENS = 160
# A share of the prompts ends in a space, as people write them; the answer then comes without one.
TRAILING_SPACE_SHARE = 0.2
REPORT_EVERY = 10
SAVE_EVERY = 50
# Enough to tell instructions apart, and few enough for a processor.
NUM_TO_CHOOSE_BY = 100
EVALUATION_BATCH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """The frozen model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def token_ids(self, text: str) -> list[int]:
        """Tokens of a text, exactly as a completions server reads a prompt."""
        return list(self.tokenizer(text)["input_ids"])

    def embed(self, token_ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        """Return [..., hidden] for one or several sequences, through the model's own embedding."""
        embedded: Tensor = self.model.get_input_embeddings()(torch.tensor(token_ids, dtype=torch.long))
        return embedded


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One training sequence: the loss is taken on `completion_ids`."""

    prompt_ids: list[int]
    completion_ids: list[int]

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)


def load_base(dtype: torch.dtype) -> Base:
    """Load the default model, frozen."""
    folder = resolve_model(DEFAULT_MODEL, default_cache_dir(), lambda line: print(line, flush=True))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.requires_grad_(False)
    model.eval()
    return Base(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


def add_soft_prompt(base: Base, task: Task) -> PeftModel:
    """Put a fresh soft prompt on the model, starting from the embeddings of the task's text."""
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=task.init_text,
        num_virtual_tokens=task.num_virtual_tokens,
        tokenizer_name_or_path=base.tokenizer.name_or_path,
    )
    peft_model = get_peft_model(base.model, config)
    # Where the tokenizer lay on this machine is nobody's business, and the base model has a public name.
    config.tokenizer_name_or_path = DEFAULT_MODEL
    config.base_model_name_or_path = DEFAULT_MODEL
    return peft_model


def make_row(base: Base, task: Task, example: Example, rng: random.Random) -> Row:
    """Tokenise one example, now and then with a space at the end of its prompt."""
    prompt, completion = example.prompt, example.completion
    if task.labels and rng.random() < TRAILING_SPACE_SHARE:
        prompt, completion = f"{prompt} ", completion.lstrip()
    return Row(prompt_ids=base.token_ids(prompt), completion_ids=[*base.token_ids(completion), base.eos_id])


def batches(base: Base, task: Task, seed: str) -> Iterator[list[Row]]:
    """Yield batches without end, rows of about one length together so that little is padding."""
    rng = random.Random(seed)
    while True:
        pool = [make_row(base, task, example, rng) for example in sample_pool(task, rng)]
        pool = sorted((row for row in pool if len(row) <= MAX_PROMPT_TOKENS), key=len)
        groups = [pool[start : start + task.batch_size] for start in range(0, len(pool), task.batch_size)]
        rng.shuffle(groups)
        yield from (group for group in groups if len(group) == task.batch_size)


def sample_pool(task: Task, rng: random.Random) -> list[Example]:
    """Draw the examples of 32 batches from the training part, with the rarer class repeated up to its share."""
    pool = list(task.train)
    if task.minority_share is not None:
        by_label = [[example for example in pool if example.expected == label] for label in task.labels]
        rare, common = sorted(by_label, key=len)
        wanted = round(len(common) * task.minority_share / (1 - task.minority_share))
        pool += rng.choices(rare, k=max(0, wanted - len(rare)))
    rng.shuffle(pool)
    return pool[: 32 * task.batch_size]


def common_start(sequences: Sequence[list[int]]) -> list[int]:
    """Return what all sequences begin with."""
    same = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    return [column[0] for column in same]


def completion_loss(base: Base, soft_rows: Tensor, rows: list[Row]) -> Tensor:
    """Return the mean cross entropy of the completions' tokens.

    soft_rows  [num_virtual_tokens, hidden] float32, with gradient

    What all rows begin with, the virtual tokens and the prompt's fixed words, runs through the model once. The
    rest is padded on the right, which changes nothing for a causal model, and only what predicts a completion's
    token goes through the head.
    """
    body = base.model.base_model
    shared_ids = common_start([row.prompt_ids[:-1] for row in rows])
    shared = torch.cat([soft_rows.to(base.model.dtype), base.embed(shared_ids)])
    cache = body(inputs_embeds=shared.unsqueeze(0), use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(rows))

    num_shared, longest = len(shared_ids), max(len(row) for row in rows)
    padded = [[*row.prompt_ids, *row.completion_ids, *[base.eos_id] * (longest - len(row))] for row in rows]
    text = base.embed([ids[num_shared:] for ids in padded])
    hidden = body(inputs_embeds=text, past_key_values=cache, use_cache=True).last_hidden_state

    where = [
        (index, len(row.prompt_ids) - num_shared - 1 + offset)
        for index, row in enumerate(rows)
        for offset in range(len(row.completion_ids))
    ]
    batch_ids, positions = torch.tensor(where).unbind(dim=1)
    logits = base.model.get_output_embeddings()(hidden[batch_ids, positions]).float()
    targets = torch.tensor([token_id for row in rows for token_id in row.completion_ids])
    return nn.functional.cross_entropy(logits, targets)


def learning_rate_share(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warmup = max(1, round(num_steps * WARMUP_SHARE))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))


def train(base: Base, task: Task, num_steps: int, seed: int, output: Path, resume: bool) -> None:
    """Train one adapter and write it to `output` as PEFT does, now and then while it trains.

    resume  start from the adapter in `output`, with other batches than its first training saw
    """
    torch.manual_seed(seed)
    peft_model = add_soft_prompt(base, task)
    (soft_rows,) = (parameter for parameter in peft_model.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW([soft_rows], lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, num_steps))
    source = batches(base, task, f"{seed} resumed" if resume else str(seed))
    if resume:
        with torch.no_grad():
            soft_rows.copy_(load_file(output / "adapter_model.safetensors")["prompt_embeddings"])
    losses: list[float] = []
    began = time.monotonic()
    for step in range(1, num_steps + 1):
        loss = completion_loss(base, soft_rows, next(source))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_([soft_rows], 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0 or step == num_steps:
            spent_s = time.monotonic() - began
            left_s = spent_s / step * (num_steps - step)
            recent = sum(losses[-REPORT_EVERY:]) / len(losses[-REPORT_EVERY:])
            print(
                f"{task.name}: step {step}/{num_steps}  loss {recent:.4f}  {left_s / 60:.1f} min left", flush=True
            )
        if step % SAVE_EVERY == 0 or step == num_steps:
            save(peft_model, output)
    print(f"wrote {output}", flush=True)


def save(peft_model: PeftModel, output: Path) -> None:
    """Write the two files of an adapter, and not the model card that PEFT adds."""
    fresh = output.with_name(f".{output.name}.tmp")
    # Without this PEFT asks a hub whether the vocabulary has grown.
    peft_model.save_pretrained(fresh, save_embedding_layers=False)
    output.mkdir(parents=True, exist_ok=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.move(fresh / name, output / name)
        (output / name).chmod(0o644)
    shutil.rmtree(fresh)


@torch.inference_mode()
def generate(
    base: Base, prompts: Sequence[str], soft_rows: Tensor | None, max_tokens: int, stop: str | None
) -> list[str]:
    """Continue every prompt greedily and return the new texts, without what follows `stop`."""
    token_ids = [base.token_ids(prompt) for prompt in prompts]
    shared_ids = common_start([ids[:-1] for ids in token_ids])
    shared = base.embed(shared_ids)
    if soft_rows is not None:
        shared = torch.cat([soft_rows.to(shared.dtype), shared])
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(token_ids[index]))
    for start in range(0, len(order), EVALUATION_BATCH):
        chosen = order[start : start + EVALUATION_BATCH]
        rest = [token_ids[index][len(shared_ids) :] for index in chosen]
        for index, text in zip(chosen, continue_greedily(base, shared, rest, max_tokens, stop), strict=True):
            texts[index] = text
    return texts


def continue_greedily(
    base: Base, shared: Tensor, rest: list[list[int]], max_tokens: int, stop: str | None
) -> list[str]:
    """Continue sequences that begin with the same rows and go on with tokens of their own.

    shared  [num_shared, hidden]

    Padding lies between the two, masked and without a position, so that each row computes what it would alone.
    """
    num_rows, longest = len(rest), max(map(len, rest))
    cache = None
    if len(shared):
        cache = base.model.base_model(inputs_embeds=shared.unsqueeze(0), use_cache=True).past_key_values
        cache.batch_repeat_interleave(num_rows)
    pads = torch.tensor([longest - len(ids) for ids in rest]).unsqueeze(1)
    columns = torch.arange(longest).unsqueeze(0)
    mask = torch.cat([torch.ones(num_rows, len(shared), dtype=torch.long), (columns >= pads).long()], dim=1)
    positions = (len(shared) + columns - pads).clamp(min=0)
    tokens = torch.tensor([[base.eos_id] * (longest - len(ids)) + ids for ids in rest])
    written: list[list[int]] = [[] for _ in rest]
    done = [False] * num_rows
    for _ in range(max_tokens):
        output = base.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache, tokens = output.past_key_values, output.logits[:, -1:].argmax(dim=-1)
        for row, token_id in enumerate(tokens.flatten().tolist()):
            done[row] = done[row] or token_id == base.eos_id
            if not done[row]:
                written[row].append(token_id)
                done[row] = stop is not None and stop in base.tokenizer.decode(written[row])
        if all(done):
            break
        mask = torch.cat([mask, torch.ones(num_rows, 1, dtype=torch.long)], dim=1)
        positions = positions[:, -1:] + 1
    texts = base.tokenizer.batch_decode(written)
    return [text.split(stop)[0] if stop else text for text in texts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Shares of right answers; `balanced` is the mean over the classes, None without classes."""

    accuracy: float
    balanced: float | None
    count: int

    def __str__(self) -> str:
        balanced = "" if self.balanced is None else f", balanced {self.balanced:.1%}"
        return f"{self.accuracy:.1%}{balanced} of {self.count}"


def score(task: Task, examples: Sequence[Example], answers: Sequence[str | None]) -> Score:
    """Judge the answers to the examples."""
    right = [task.is_right(example, answer) for example, answer in zip(examples, answers, strict=True)]
    balanced = None
    if task.labels:
        per_label = [
            [ok for ok, example in zip(right, examples, strict=True) if example.expected == label]
            for label in task.labels
        ]
        balanced = sum(sum(part) / len(part) for part in per_label) / len(per_label)
    return Score(accuracy=sum(right) / len(right), balanced=balanced, count=len(right))


def adapter_score(
    base: Base, task: Task, soft_rows: Tensor, examples: Sequence[Example], ending: str = ""
) -> Score:
    """Score the adapter; a classifier's answer counts only if it is the label and nothing else."""
    prompts = [example.prompt + ending for example in examples]
    texts = generate(base, prompts, soft_rows, task.max_tokens, task.stop)
    answers = [text.strip() if task.labels else task.answer(text) for text in texts]
    return score(task, examples, answers)


def instruction_score(base: Base, task: Task, instruction: Instruction, examples: Sequence[Example]) -> Score:
    """Score the base model under one instruction, reading its answer leniently."""
    prompts = [instruction.write(example) for example in examples]
    if instruction.chat:
        prompts = [
            base.tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
    texts = generate(base, prompts, None, max(task.max_tokens, 16), task.stop)
    return score(task, examples, [task.answer(text) for text in texts])


def best_instruction(base: Base, task: Task) -> Instruction:
    """Choose the instruction with the most right answers on the dev part."""

    def merit(result: Score) -> float:
        return result.accuracy if result.balanced is None else (result.accuracy + result.balanced) / 2

    scored = []
    for instruction in task.instructions:
        result = instruction_score(base, task, instruction, task.dev[:NUM_TO_CHOOSE_BY])
        print(f"{task.name}: base model on dev, {instruction.name}: {result}", flush=True)
        scored.append((merit(result), instruction))
    return max(scored, key=lambda pair: pair[0])[1]


def evaluate(base: Base, task: Task, folder: Path, baseline: bool) -> dict[str, str]:
    """Score adapter, best instruction and majority class on the test part."""
    soft_rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
    results = {"adapter": str(adapter_score(base, task, soft_rows, task.test))}
    if task.labels:
        results["adapter, prompt ends in a space"] = str(
            adapter_score(base, task, soft_rows, task.test, ending=" ")
        )
        majority = max(task.labels, key=lambda label: sum(example.expected == label for example in task.train))
        results[f"majority class ({majority})"] = str(score(task, task.test, [majority] * len(task.test)))
    if baseline:
        instruction = best_instruction(base, task)
        results[f"base model ({instruction.name})"] = str(instruction_score(base, task, instruction, task.test))
    for name, result in results.items():
        print(f"{task.name}: {name}: {result}", flush=True)
    return results


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", choices=[*TASK_NAMES, "all"])
    parser.add_argument("--steps", type=int, help="training steps (default: the task's own number)")
    parser.add_argument(
        "--eval-only", action="store_true", help="evaluate the adapter that lies in the output folder"
    )
    parser.add_argument("--resume", action="store_true", help="train the adapter in the output folder further")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the base model's instructions")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the batches and the generated SQL")
    parser.add_argument(
        "--output", type=Path, default=EXAMPLES / "adapters", help="folder that holds a folder per adapter"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the frozen model")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    names = TASK_NAMES if arguments.adapter == "all" else (arguments.adapter,)
    data_dir = default_cache_dir().parent / "data"
    for name in names:
        task = load_task(name, data_dir, arguments.seed)
        base = load_base(getattr(torch, arguments.dtype))
        folder = arguments.output / name
        if not arguments.eval_only:
            train(base, task, arguments.steps or task.num_steps, arguments.seed, folder, arguments.resume)
            base = load_base(getattr(torch, arguments.dtype))
        results = evaluate(base, task, folder, baseline=not arguments.no_baseline)
        print(json.dumps({name: results}, indent=2), flush=True)


if __name__ == "__main__":
    main()
