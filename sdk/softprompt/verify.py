"""Whether what is served of an adapter is what PEFT computes: the same tokens and log-probabilities.

PEFT's own forward is replayed on this machine in float32, one prompt at a time, over what was served: at every
position it says which token it would have chosen there, and how likely it finds the one that was served.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt.inference import InferenceClient

PROMPTS = (
    "The capital of France is",
    "Question: What is 12 plus 30?\nAnswer:",
    "Once upon a time, in a village by the sea, there lived",
    "Review: I loved every minute of it.\nSentiment:",
)
# By serving dtype: how far a log-probability may be from PEFT's in float32 by rounding alone. Below float32 the
# whole model is rounded, and a smaller error would not be noticed: over the default model in bfloat16, rounding
# moved one of 192 by 0.30. float16 has 8 times its precision.
TOLERANCES: Mapping[str, float] = {"float32": 1e-4, "float16": 0.0625, "bfloat16": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A greedy completion that was served, as ids, with the log-probability of each of its tokens."""

    prompt: str
    prompt_ids: Sequence[int]
    token_ids: Sequence[int]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What PEFT makes of a served completion, position by position.

    Attributes:
        best_ids: the tokens that it finds likeliest.
        margins: by how much they are likelier than those that were served, as a difference of log-probabilities.
        logprobs: of the tokens that were served.
    """

    best_ids: Sequence[int]
    margins: Sequence[float]
    logprobs: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt's completion beside PEFT's.

    Attributes:
        num_tokens: compared.
        num_ties: tokens that differ where PEFT finds both about as likely, so that rounding decides.
        first_difference: index of the first token that differs otherwise; None: there is none.
        largest_delta: the largest difference of two log-probabilities of one token.
        tolerance: how large it may be.
    """

    prompt: str
    num_tokens: int
    num_ties: int
    first_difference: int | None
    largest_delta: float
    tolerance: float

    @property
    def is_equal(self) -> bool:
        """Whether tokens and log-probabilities are PEFT's."""
        return self.first_difference is None and self.largest_delta <= self.tolerance


def compare(served: Served, replayed: Replayed, *, tolerance: float) -> Comparison:
    """A completion beside what PEFT makes of it. Tokens may differ where rounding may swap them."""
    differ = [best != own for best, own in zip(replayed.best_ids, served.token_ids, strict=True)]
    real = [i for i, margin in enumerate(replayed.margins) if differ[i] and margin > 2 * tolerance]
    deltas = [abs(ours - theirs) for ours, theirs in zip(served.logprobs, replayed.logprobs, strict=True)]
    return Comparison(
        prompt=served.prompt,
        num_tokens=len(served.token_ids),
        num_ties=sum(differ) - len(real),
        first_difference=real[0] if real else None,
        largest_delta=max(deltas),
        tolerance=tolerance,
    )


def serve(client: InferenceClient, adapter: str, prompts: Iterable[str], *, max_tokens: int) -> list[Served]:
    """Greedy completions by a running system; `adapter` is spelled as requests spell it, "" is the base model."""
    sampling = pb.SamplingParams(
        max_tokens=max_tokens, temperature=0.0, repetition_penalty=1.0, logprobs=0, ignore_eos=True
    )
    served = []
    for prompt in prompts:
        request = pb.GenerateRequest(adapter=adapter, text=prompt, sampling=sampling)
        prompt_ids: Sequence[int] = ()
        token_ids: list[int] = []
        logprobs: list[float] = []
        for event in client.generate(request):
            if event.HasField("accepted"):
                prompt_ids = list(event.accepted.prompt_token_ids)
            token_ids += event.delta.token_ids
            logprobs += [entry.chosen.logprob for entry in event.delta.logprobs]
        served.append(Served(prompt=prompt, prompt_ids=prompt_ids, token_ids=token_ids, logprobs=logprobs))
    return served


class Replay:
    """PEFT over a base model: float32, on the CPU, one prompt at a time.

    Args:
        model: the base model's folder.
        adapter: a folder that `softprompt.peft_folder.write_folder` wrote.
        task: of an adapter with tasks.

    Raises ModuleNotFoundError where torch, transformers or peft is not installed.
    """

    def __init__(self, model: Path, adapter: Path, *, task: int | None = None) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        base = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        self._model = PeftModel.from_pretrained(base, adapter).eval()
        self._tasks: dict[str, Any] = {} if task is None else {"task_ids": torch.tensor([task])}

    def run(self, served: Served) -> Replayed:
        """One pass over a prompt and what was served after it."""
        import torch

        count = len(served.token_ids)
        ids = torch.tensor([[*served.prompt_ids, *served.token_ids]])
        with torch.inference_mode():
            logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **self._tasks).logits[0]
        # From the end: kinds of virtual tokens that are embeddings have logits of their own in front.
        logprobs = torch.log_softmax(logits[-count - 1 : -1].double(), dim=-1)
        best, best_ids = logprobs.max(dim=-1)
        own = logprobs.gather(1, torch.tensor(served.token_ids)[:, None])[:, 0]
        return Replayed(best_ids=best_ids.tolist(), margins=(best - own).tolist(), logprobs=own.tolist())
