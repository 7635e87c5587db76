"""From a checked request to an HTTP answer, whole or streamed; completions and chat differ only in their style."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from softprompt_api.inference.v1 import inference_pb2 as pb
from starlette.responses import Response

from softprompt_gateway import sse
from softprompt_gateway.clients import InferenceClient
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.chunks import Chunks
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.style import Style
from softprompt_gateway.resolve import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One checked request.

    Attributes:
        calls: one Generate request per prompt.
        silent: whether only text counts: a delta without text may be left out of a stream, and deltas that
            arrived together may be told as one.
    """

    target: Target
    calls: Sequence[pb.GenerateRequest]
    choices_per_prompt: int
    style: Style
    stream: bool
    include_usage: bool
    silent: bool


def usage_of(usage: pb.Usage) -> dict[str, Any]:
    """OpenAI's usage; virtual tokens are told apart and are not prompt tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "virtual_tokens": usage.virtual_tokens,
        },
    }


class Answering:
    """Runs jobs on the inference service."""

    def __init__(self, inference: InferenceClient, metrics: Metrics, *, write_timeout_s: float) -> None:
        self._inference = inference
        self._metrics = metrics
        self._write_timeout_s = write_timeout_s

    async def answer(self, job: Job) -> Response:
        """The answer; errors before the first token are raised, so that they have their own status."""
        generation = await Generation.start(self._inference, job.calls)
        if job.stream:
            return sse.EventStream(
                self._events(job, generation),
                close=generation.cancel,
                write_timeout_s=self._write_timeout_s,
                headers=job.target.headers(),
            )
        prompts = await generation.choices(job.choices_per_prompt)
        self._metrics.used(generation.usage)
        choices = [
            job.style.choice(prompt * job.choices_per_prompt + n, generation.accepted[prompt], choice)
            for prompt, of_prompt in enumerate(prompts)
            for n, choice in enumerate(of_prompt)
        ]
        body = {
            **_identity(job, job.style.whole),
            "choices": choices,
            "usage": usage_of(generation.usage),
            **job.style.extras(generation.accepted),
        }
        return Response(orjson.dumps(body), media_type="application/json", headers=job.target.headers())

    async def _events(self, job: Job, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The stream: openings, deltas and ends, usage if asked for, and the end mark."""
        style, per_prompt = job.style, job.choices_per_prompt
        # Everything but the choice is the same in every chunk, and is written once.
        identity = orjson.dumps(_identity(job, style.chunk))[:-1]
        head = b"data: " + identity + b',"choices":['
        end = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"
        tail = b"]" + end
        extras = orjson.dumps(style.extras(generation.accepted))[1:-1]
        opening_tail = b"]," + extras + end if extras else tail

        for prompt, accepted in enumerate(generation.accepted):
            for index in range(prompt * per_prompt, (prompt + 1) * per_prompt):
                if (opening := style.opening(index, accepted)) is not None:
                    yield head + orjson.dumps(opening) + opening_tail

        chunks = Chunks(style, head=head, tail=tail, joins_text=job.silent)
        async for events in generation.events():
            for prompt, event in events:
                chunks.add(prompt * per_prompt + event.index, event)
            if written := chunks.take():
                yield written

        self._metrics.used(generation.usage)
        if job.include_usage:
            usage = orjson.dumps(usage_of(generation.usage))
            yield sse.event(identity + b',"choices":[],"usage":' + usage + b"}")
        yield sse.DONE


def _identity(job: Job, kind: str) -> dict[str, Any]:
    return {
        "id": f"{job.style.id_prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": job.target.model,
    }
