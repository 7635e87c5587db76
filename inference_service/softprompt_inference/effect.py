"""What an adapter changes: the distributions of the next token after a few fixed prompts, with it and without.

They are exact: whole distributions come out of the engine, computed as those of any request, in the common batch.
One prompt is in it at a time, so that nobody else waits longer for a step than for one more short prompt.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Sequence

import numpy as np
from softprompt_api.errors import InvalidArgument
from softprompt_api.names import parse_requested, with_task
from softprompt_api.params import SamplingParams
from softprompt_api.quality import MAX_PROBED_TASKS, Effect, Probe
from softprompt_api.registry.v1 import registry_pb2 as pb

from softprompt_inference.adapters.adapter import AdapterInfo
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.choice import error_of
from softprompt_inference.engine.messages import AddRequest, Finish, SoftPromptPart, TextPart
from softprompt_inference.generation import EngineHandle
from softprompt_inference.prompts import PromptEncoder, TextPrompt, text_ids_of

# Of several kinds, so that what was trained for one of them shows.
PROMPTS = (
    "The capital of France is",
    "Once upon a time, there was",
    "Question: What is 12 plus 30?\nAnswer:",
    "Review: I loved every minute of it.\nSentiment:",
    "Translate to German: Good morning, my friend.\nGerman:",
    "def add(a, b):\n    return",
    "User: Hello! How are you today?\nAssistant:",
    "SELECT name FROM users WHERE",
)
# What a model masks has no logarithm; this is as good as none.
_LEAST_LOGPROB = -1e4
# So long nobody's completion ran: a good time for what nobody waits for. Who registers an adapter often uses it at
# once, so it is counted from when the probe was asked for at the earliest.
_LULL_S = 1.0
MAX_PATIENCE_S = 600.0
# No tenant's: whoever sends one of these prompts does not learn that it was measured with.
_SALT = "probe"


class EffectProbe:
    """Measures adapters, one at a time.

    Args:
        engine: the engine.
        prompts: encodes prompts.
        residency: holds adapters in the engine.
        source: resolves adapters, and keeps what was measured of them.
        base_model: what is served.
        idle_s: seconds since a completion ran or waited.
    """

    def __init__(
        self,
        engine: EngineHandle,
        prompts: PromptEncoder,
        residency: Residency,
        source: AdapterSource,
        base_model: pb.BaseModel,
        *,
        idle_s: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._residency = residency
        self._source = source
        self._base_model = base_model
        self._idle_s = idle_s
        self._one_at_a_time = asyncio.Lock()
        self._numbers = itertools.count(1)
        self._token_ids: list[list[int]] = []
        self._without: list[np.ndarray] = []  # the base model's, measured once

    async def probe(self, spelling: str, *, patience_s: float = 0.0) -> pb.AdapterVersion:
        """Measure the version that a spelling stands for, and have it recorded; the version as it is then.

        With patience it waits for a lull, so long at most, and measures nothing that was measured meanwhile.
        Every SoftpromptError that it raises is meant for the caller.
        """
        ref = parse_requested(spelling)
        if ref.task is not None:
            raise InvalidArgument(f"all tasks are measured; leave ':{ref.task}' out", field="adapter")
        if not 0 <= patience_s <= MAX_PATIENCE_S:
            raise InvalidArgument(f"patience_ms must be 0 to {MAX_PATIENCE_S * 1000:g}", field="patience_ms")
        await self._wait_for_lull(patience_s)
        version = await self._source.resolve_to_fetch(str(ref))
        if patience_s and version.HasField("probe"):
            return version
        effects = await self._measure(version.digest, version.num_tasks)
        probe = Probe(effects=tuple(effects), base_model_id=self._base_model.id, dtype=self._base_model.dtype)
        return await self._source.record(version, probe)

    async def _wait_for_lull(self, patience_s: float) -> None:
        if not patience_s:
            return
        left_s = _LULL_S
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while left_s > 0:
                    await asyncio.sleep(left_s)
                    left_s = _LULL_S - self._idle_s()

    async def _measure(self, digest: str, num_tasks: int) -> list[Effect]:
        """The effect of an adapter, or of each of its first tasks."""
        async with self._one_at_a_time:
            await self._measure_base_model()
            tasks = range(min(num_tasks, MAX_PROBED_TASKS)) if num_tasks else [None]
            return [await self._measure_task(digest, task) for task in tasks]

    async def _measure_base_model(self) -> None:
        if not self._without:
            self._token_ids = [text_ids_of(await self._prompts.encode(TextPrompt(text=text))) for text in PROMPTS]
            self._without = [await self._logprobs(token_ids, None) for token_ids in self._token_ids]

    async def _measure_task(self, digest: str, task: int | None) -> Effect:
        async with self._residency.use(with_task(digest, task)) as [adapter]:
            own = [await self._logprobs(token_ids, adapter) for token_ids in self._token_ids]
        return compare(own, self._without, task=task)

    async def _logprobs(self, token_ids: list[int], adapter: AdapterInfo | None) -> np.ndarray:
        """Of all tokens that may come next: [vocabulary] float32."""
        prompt: list[TextPart | SoftPromptPart] = [TextPart(token_ids=token_ids)]
        if adapter is not None and not adapter.is_lora:
            prompt.insert(0, SoftPromptPart(digest=adapter.digest))
        request = AddRequest(
            request_id=f"probe-{next(self._numbers)}",
            prompt=prompt,
            params=SamplingParams(max_tokens=1, temperature=0.0, logprobs=0),
            salt=_SALT,
            lora=adapter.digest if adapter is not None and adapter.is_lora else "",
            all_logprobs=True,
        )
        self._engine.submit(request)
        stream = self._engine.outputs(request.request_id)
        arrived = asyncio.Event()
        stream.follow(arrived.set)
        try:
            await arrived.wait()
            [output] = stream.take(1)
        finally:
            stream.close()
        if output.finish is Finish.ERROR:
            raise error_of(output)
        assert output.logprobs is not None
        return np.frombuffer(output.logprobs.every, dtype="<f4")


def compare(own: Sequence[np.ndarray], without: Sequence[np.ndarray], *, task: int | None = None) -> Effect:
    """How far log-probabilities with an adapter are from those without; one array for each prompt."""
    divergences = [divergence(*pair) for pair in zip(own, without, strict=True)]
    return Effect(
        task=task,
        mean_kl=float(np.mean(divergences)),
        max_kl=max(divergences),
        num_flips=sum(int(a.argmax() != b.argmax()) for a, b in zip(own, without, strict=True)),
        num_prompts=len(divergences),
    )


def divergence(own: np.ndarray, without: np.ndarray) -> float:
    """Kullback-Leibler divergence of the first distribution from the second, in nats, from log-probabilities."""
    a, b = (np.maximum(each.astype(np.float64), _LEAST_LOGPROB) for each in (own, without))
    return max(0.0, float(np.sum(np.exp(a) * (a - b))))
