"""A job's answer as server-sent events: openings, deltas and ends, usage if asked for, and the end mark."""

from collections.abc import Callable

import orjson
from softprompt_api.inference.v1 import inference_pb2 as pb

from softprompt_gateway import sse
from softprompt_gateway.metrics import Metrics
from softprompt_gateway.openai.chunks import Chunks
from softprompt_gateway.openai.generation import Generation
from softprompt_gateway.openai.job import Job, usage_of
from softprompt_gateway.openai.settling import settle


class Streamed:
    """The events of one job, as far as it was generated; see `softprompt_gateway.sse.Events`."""

    def __init__(self, job: Job, generation: Generation, metrics: Metrics) -> None:
        self._job = job
        self._generation = generation
        self._metrics = metrics
        self._per_prompt = job.choices_per_prompt
        # Everything but the choice is the same in every chunk, and is written once.
        self._identity = orjson.dumps(job.identity(job.style.chunk))[:-1]
        self._head = b"data: " + self._identity + b',"choices":['
        self._chunks = Chunks(job.style, head=self._head, tail=b"]" + self._end(), joins_text=job.silent)
        self._opening = self._open()
        self.has_ended = False

    @property
    def has_more(self) -> bool:
        """Whether there is something to take, if only the end or an error."""
        return not self.has_ended and (bool(self._opening) or self._generation.has_more)

    def follow(self, notify: Callable[[], None]) -> None:
        """Call `notify` whenever there is something to take."""
        self._generation.follow(notify)

    def take(self) -> bytes:
        """The events since the last look; raises the error that ended the generation."""
        if self._opening:
            opening, self._opening = self._opening, b""
            return opening
        per_prompt, chunks, events = self._per_prompt, self._chunks, self._generation.take()
        if self._job.include_usage_so_far:
            chunks.tail = b"]" + self._end()
        for prompt, event in events:
            if not isinstance(event, pb.PromptLogprobs):
                chunks.add(prompt * per_prompt + event.index, event)
                continue
            for index in range(prompt * per_prompt, (prompt + 1) * per_prompt):
                chunks.add(index, event)
        written = chunks.take()
        if self._generation.has_ended:
            self.has_ended = True
            return written + self._close()
        return written

    def close(self) -> None:
        """Abort what still runs, and count what was generated."""
        self._generation.cancel()
        settle(self._job, self._generation, self._metrics)

    def _open(self) -> bytes:
        style, per_prompt = self._job.style, self._per_prompt
        extras = orjson.dumps(style.extras(self._generation.accepted))[1:-1]
        tail = b"]," + extras + self._end() if extras else b"]" + self._end()
        return b"".join(
            self._head + orjson.dumps(opening) + tail
            for prompt, accepted in enumerate(self._generation.accepted)
            for index in range(prompt * per_prompt, (prompt + 1) * per_prompt)
            if (opening := style.opening(index, accepted)) is not None
        )

    def _end(self) -> bytes:
        """What stands behind the choices of a chunk."""
        if not self._job.include_usage:
            return b"}\n\n"
        if not self._job.include_usage_so_far:
            return b',"usage":null}\n\n'
        return b',"usage":' + orjson.dumps(usage_of(self._generation.usage_so_far)) + b"}\n\n"

    def _close(self) -> bytes:
        if not self._job.include_usage:
            return sse.DONE
        shape = orjson.dumps(usage_of(self._generation.usage))
        return sse.event(self._identity + b',"choices":[],"usage":' + shape + b"}") + sse.DONE
