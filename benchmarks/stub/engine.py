"""`python -m benchmarks.stub.engine`: the engine over a model that takes a fixed time for each step."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from softprompt_api.ending import run_to_end
from softprompt_api.errors import Unsupported
from softprompt_api.structured import StructuredOutputsParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import LoadAdapter, LoadLora, Logprobs, ModelInfo
from softprompt_inference.engine.plan import Chunk, Matcher, Pending, Runner, Sampled, Search, StepPlan
from softprompt_inference.engine.process import serve_parent

from benchmarks.model_files import read_shape

STEP_S = 0.02
_PAGE_SIZE = 16
_NUM_PAGES = 8192
_MAX_MODEL_LEN = 2048
# Past the control tokens and single bytes of most vocabularies: each token is text.
_FIRST_TOKEN = 500
_NUM_TOKENS = 100


@dataclass(frozen=True, slots=True)
class _Chosen:
    sampled: Sequence[Sampled]

    def result(self) -> Sequence[Sampled]:
        return self.sampled


class FixedStepRunner:
    """Waits, and answers each sample with a token that depends on its index alone."""

    def __init__(self, config: EngineConfig) -> None:
        shape = read_shape(Path(config.model_path))
        self.info = ModelInfo(
            architecture="FixedStep",
            hidden_size=shape.hidden_size,
            num_layers=1,
            num_kv_heads=1,
            head_dim=1,
            vocab_size=shape.vocab_size,
            dtype="bfloat16",
            device="cpu",
            max_model_len=_MAX_MODEL_LEN,
            max_virtual_tokens=config.max_virtual_tokens,
            weights_bytes=0,
            kv_cache_bytes=0,
            num_pages=_NUM_PAGES,
            page_size=_PAGE_SIZE,
        )

    def launch(self, plan: StepPlan) -> Pending:
        """One token per sample, after the fixed time."""
        time.sleep(STEP_S)
        return _Chosen([_answer(chunk) for chunk in plan.chunks if chunk.sample is not None or chunk.scores])

    def load_rows(self, first_id: int, adapter: LoadAdapter) -> None:
        """Take no notice: nothing is computed from rows."""

    def load_key_values(self, first_id: int, adapter: LoadAdapter) -> Iterator[None]:  # noqa: ARG002 - as for rows
        """Take no notice."""
        return iter(())

    def drop_rows(self, first_id: int) -> None:
        """Take no notice."""

    def find_nearest(self, first_id: int, top_k: int) -> Search:  # noqa: ARG002
        """There is no vocabulary to search."""
        raise Unsupported("this engine computes nothing")

    def load_lora(self, slot: int, lora: LoadLora) -> Iterator[None]:  # noqa: ARG002 - it computes nothing
        """Take no notice."""
        return iter(())

    def drop_lora(self, slot: int) -> None:
        """Take no notice."""

    def compile(self, wanted: StructuredOutputsParams) -> Future[Matcher]:
        """Refuse: no token here is text that could follow a grammar."""
        raise Unsupported(f"{wanted.spelled[0]} is not supported by a model that computes nothing")


def _answer(chunk: Chunk) -> Sampled:
    """Nothing is likelier than anything else."""
    num_scores = len(chunk.scores.rows) if chunk.scores else 0
    return Sampled(
        token_id=_FIRST_TOKEN + chunk.sample.index % _NUM_TOKENS if chunk.sample else None,
        scores=[Logprobs(chosen=0.0, top=[])] * num_scores,
    )


def _load(config: EngineConfig, _report: Callable[[str], None]) -> Runner:
    return FixedStepRunner(config)


if __name__ == "__main__":
    run_to_end(lambda: serve_parent(_load))
