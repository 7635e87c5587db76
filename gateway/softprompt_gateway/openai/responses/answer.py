"""One response from its creation to its end: the object that OpenAI's clients read, and the events on its way."""

import json
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import orjson
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import SamplingParams

from softprompt_gateway.errors import SERVER_ERROR, ErrorBody
from softprompt_gateway.openai.generation import finish_reason
from softprompt_gateway.openai.responses.events import Events
from softprompt_gateway.openai.responses.output import Output
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.tool_calls import CallReader, Said
from softprompt_gateway.resolve import Target


class Answer:
    """One response.

    Args:
        events: are told of everything.
    """

    def __init__(self, request: ResponsesRequest, target: Target, events: Events) -> None:
        names = frozenset(tool.function.name for tool in request.callable)
        self._reader = CallReader(names) if names else None
        self._events = events
        self._output = Output(events)
        self._token_ids: list[int] | None = [] if request.return_token_ids else None
        self._shape: dict[str, Any] = {
            "id": f"resp_{uuid.uuid4().hex}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": target.model,
            "output": [],
            "usage": None,
            **_repeated(request, target.served),
        }

    def json(self) -> bytes:
        """The whole response, as far as it came."""
        return orjson.dumps(self._shape)

    def begin(self, accepted: pb.Accepted) -> None:
        """Its prompt was accepted: it is created."""
        if self._token_ids is not None:
            self._shape |= {"prompt_token_ids": list(accepted.prompt_token_ids), "token_ids": self._token_ids}
        for kind in ("response.created", "response.in_progress"):
            self._tell(kind)

    def add(self, text: str, token_ids: Iterable[int], logprobs: Sequence[pb.TokenLogprob]) -> None:
        """What was generated further."""
        if self._token_ids is not None:
            self._token_ids += token_ids
        if self._reader is not None:
            self._add(self._reader.read(text))
        elif text or logprobs:
            self._output.say(text, logprobs)

    def end(self, finished: pb.Finished, usage: pb.Usage) -> None:
        """That was all."""
        if self._reader is not None:
            self._add(self._reader.finish())
        is_cut = finish_reason(finished) == "length"
        has_cut_call = self._reader is not None and self._reader.is_cut  # by a stop string
        self._output.end("incomplete" if is_cut or has_cut_call else "completed")
        self._shape["usage"] = _usage(usage)
        if is_cut:
            self._stop("incomplete", incomplete_details={"reason": "max_output_tokens"})
        else:
            self._stop("completed", completed_at=int(time.time()))

    def fail(self, error: ErrorBody) -> None:
        """It broke off."""
        code = error.answer.code
        self._events.tell("error", {"code": code, "message": error.message, "param": error.param})
        self._output.abandon()
        self._stop("failed", error={"code": _failure(error), "message": error.message})

    def _add(self, said: Said) -> None:
        for piece in said.pieces:
            if isinstance(piece, str):
                self._output.say(piece)
            else:
                self._output.call(piece)

    def _stop(self, status: str, **members: Any) -> None:
        self._shape |= {"status": status, "output": self._output.shapes, **members}
        self._tell(f"response.{status}")

    def _tell(self, kind: str) -> None:
        self._events.tell(kind, {"response": self._shape})


def _repeated(request: ResponsesRequest, served: pb.GetModelResponse) -> dict[str, Any]:
    """What an answer repeats of its request, and the defaults of what it left out."""
    choice = request.tool_choice
    ours = SamplingParams()
    sampling = pb.SamplingParams(temperature=ours.temperature, top_p=ours.top_p)
    sampling.MergeFrom(served.default_sampling)
    sampling.MergeFrom(pb.SamplingParams(temperature=request.temperature, top_p=request.top_p))
    return {
        "background": False,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "max_tool_calls": None,
        "metadata": request.metadata or {},
        "parallel_tool_calls": request.is_parallel,
        "previous_response_id": None,
        "prompt_cache_key": request.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": request.safety_identifier,
        "service_tier": "default",
        "store": False,
        "temperature": sampling.temperature,
        "text": _verbatim({"format": _format(request), "verbosity": "medium"}),
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump() if choice else "auto",
        "tools": _verbatim([tool.told() for tool in request.tools or ()]),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "user": request.user,
    }


def _format(request: ResponsesRequest) -> dict[str, Any]:
    format_ = request.text.format if request.text else None
    return format_.model_dump(by_alias=True, exclude_none=True) if format_ else {"type": "text"}


def _verbatim(shape: Any) -> orjson.Fragment:
    """JSON that may hold numbers of any size, as schemas do."""
    return orjson.Fragment(json.dumps(shape, ensure_ascii=False))


def _usage(usage: pb.Usage) -> Mapping[str, Any]:
    """The usage as this route spells it; virtual tokens are told apart and are not input tokens."""
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "cache_write_tokens": 0,
            "virtual_tokens": usage.virtual_tokens,
        },
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _failure(error: ErrorBody) -> str:
    """One of the few words that a failed response may have for why."""
    if error.answer.status == 429:
        return "rate_limit_exceeded"
    return "server_error" if error.answer.type == SERVER_ERROR else "invalid_prompt"
