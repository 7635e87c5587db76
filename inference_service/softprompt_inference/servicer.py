"""The RPCs of inference.proto: parse, call, format. Errors become statuses in the server's interceptor."""

# gRPC names the methods and their arguments.
# ruff: noqa: ARG002, N802

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.protobuf.message import Message
from softprompt_api.errors import AdapterNotFound, InvalidArgument, SoftpromptError, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1 import inference_pb2_grpc as pb_grpc
from softprompt_api.registry.v1 import registry_pb2
from softprompt_api.rpc.channel import MAX_MESSAGE_BYTES
from softprompt_api.rpc.context import enter_request
from softprompt_api.shares import Shares
from softprompt_api.tracing import Tracer, carrier, serve

from softprompt_inference.adapters.residency import Residency
from softprompt_inference.choice import error_of
from softprompt_inference.composed import BoundAdapter
from softprompt_inference.convert import (
    to_call,
    to_nearest,
    to_prompt,
    to_resident,
    to_response,
    to_tier,
    to_top_k,
    write_response,
)
from softprompt_inference.effect import EffectProbe
from softprompt_inference.ending import Ending
from softprompt_inference.generation import EngineHandle, Event, Generation, Generator
from softprompt_inference.prompts import PromptEncoder, check_number_of_ids, text_ids_of
from softprompt_inference.session import Session
from softprompt_inference.text import Tokenizer

_LISTED = 1000
_MAX_LISTED = 10_000
_NAMED = 100
# Each takes milliseconds, or some hundred steps of the engine: further ones would wait for long.
_MAX_TOKENIZED = 64
_MAX_SEARCHES = 32
# These requests tell no tenant.
_ANYBODY = ""

Context = grpc.aio.ServicerContext[Any, Any]
Answer = TypeVar("Answer", bound=Message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Front:
    """What answers the RPCs, once the model is loaded.

    Attributes:
        prompts: encodes and decodes what Tokenize and Detokenize ask for.
        defaults: sampling parameters where a request does not say.
    """

    engine: EngineHandle
    tokenizer: Tokenizer
    prompts: PromptEncoder
    generator: Generator
    residency: Residency
    effects: EffectProbe
    base_model: registry_pb2.BaseModel
    ready_unix_s: int
    defaults: Mapping[str, Any] = field(default_factory=dict)


class InferenceServicer(pb_grpc.InferenceServiceServicer):
    """Answers Unavailable until it is `opened` with a front."""

    def __init__(self, tracer: Tracer | None = None) -> None:
        self._tracer = tracer
        self._front: Front | None = None
        self._sessions: set[Session[Event]] = set()
        self._tokenized = Shares(_MAX_TOKENIZED, what="texts are tokenised or wait for it")
        self._searches = Shares(_MAX_SEARCHES, what="searches for nearest tokens run or wait")

    def open(self, front: Front) -> None:
        """Answer with this front from now on."""
        self._front = front

    def close_sessions(self) -> None:
        """Let GenerateMany streams end after the generations that run; by themselves they would last for ever."""
        for session in self._sessions:
            session.close()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> AsyncIterator[pb.GenerateResponse]:
        async with self._start(request) as generation:
            while events := await generation.next():
                for event in events:
                    yield to_response(event, self._ready().tokenizer)

    async def GenerateMany(
        self, request_iterator: AsyncIterator[pb.GenerateManyRequest], context: Context
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        session = Session(self._start, self._write)
        self._sessions.add(session)
        try:
            async with aclosing(session.serve(request_iterator)) as messages:
                async for message in messages:
                    yield message
        finally:
            self._sessions.discard(session)

    @asynccontextmanager
    async def _start(self, request: pb.GenerateRequest) -> AsyncIterator[Generation]:
        """A generation, logged and traced once it has ended in whatever way."""
        front = self._ready()
        call = to_call(request, front.defaults)
        enter_request(request.request_id or uuid.uuid4().hex)
        with serve(self._tracer, "generate", dict(request.trace_context) or carrier()) as span:
            ending = Ending(call, span)
            try:
                async with front.generator.start(call) as generation:
                    ending.generation = generation
                    yield generation
            except SoftpromptError as error:
                ending.reason = error.reason
                raise
            finally:
                ending.tell()

    def _write(self, event: Event, response: pb.GenerateResponse) -> None:
        write_response(event, response, self._ready().tokenizer)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> pb.TokenizeResponse:
        front = self._ready()
        with self._tokenized.holding(_ANYBODY):
            prompt = await front.prompts.encode(to_prompt(request))
            ids = text_ids_of(prompt)
            check_number_of_ids(len(ids), field="prompt")
            texts = await front.prompts.token_texts(ids) if request.return_token_strings else ()
        answer = pb.TokenizeResponse(
            ids=ids,
            token_strings=texts,
            max_model_len=front.engine.info.max_model_len,
            virtual_tokens=await front.generator.count_virtual_tokens(request.adapter, prompt),
        )
        return _fitting(answer, field="prompt")

    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> pb.DetokenizeResponse:
        front = self._ready()
        with self._tokenized.holding(_ANYBODY):
            text = await front.prompts.decode(request.ids)
        return _fitting(pb.DetokenizeResponse(text=text), field="ids")

    async def GetModel(self, request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        front = self._ready()
        info = front.engine.info
        return pb.GetModelResponse(
            base_model=front.base_model,
            max_model_len=info.max_model_len,
            device=info.device,
            max_virtual_tokens=info.max_virtual_tokens,
            memory=pb.MemoryPlan(
                weights_bytes=info.weights_bytes,
                kv_cache_bytes=info.kv_cache_bytes,
                num_pages=info.num_pages,
                page_size=info.page_size,
            ),
            ready_unix_s=front.ready_unix_s,
            default_sampling=pb.SamplingParams(**front.defaults),
        )

    async def GetLoad(self, request: pb.GetLoadRequest, context: Context) -> pb.GetLoadResponse:
        front = self._ready()
        stats = front.engine.stats
        running, waiting = front.residency.loras_asked_for()
        return pb.GetLoadResponse(
            running=stats.running,
            waiting=stats.waiting,
            used_pages=stats.used_pages,
            num_pages=front.engine.info.num_pages,
            resident_adapters=stats.resident_adapters,
            computed_prompt_tokens=stats.computed_prompt_tokens,
            cached_prompt_tokens=stats.cached_prompt_tokens,
            generated_tokens=stats.generated_tokens,
            preemptions=stats.preemptions,
            adapter_tiers=map(to_tier, front.residency.tiers()),
            adapter_misses=front.residency.misses,
            base_model_id=front.base_model.id,
            max_loras=front.residency.max_loras,
            running_loras=running[:_NAMED],
            waiting_loras=waiting[:_NAMED],
        )

    async def ListResident(self, request: pb.ListResidentRequest, context: Context) -> pb.ListResidentResponse:
        residency = self._ready().residency
        if not 0 <= request.limit <= _MAX_LISTED:
            raise InvalidArgument(f"limit must be 1 to {_MAX_LISTED}, or 0 for {_LISTED}", field="limit")
        return pb.ListResidentResponse(
            adapters=map(to_resident, residency.resident(request.limit or _LISTED)),
            total_size=residency.num_resident,
        )

    async def Preload(self, request: pb.PreloadRequest, context: Context) -> pb.PreloadResponse:
        front = self._ready()
        digest = (await _bound(front, request.adapter, fetches=True)).digest
        async with front.residency.use(digest):
            if request.pin:
                front.residency.pin(digest)
            return pb.PreloadResponse(digest=digest)

    async def Evict(self, request: pb.EvictRequest, context: Context) -> pb.EvictResponse:
        front = self._ready()
        digest = (await _bound(front, request.adapter)).digest
        if not front.residency.evict(digest):
            raise AdapterNotFound("the adapter is not in memory", field="adapter")
        return pb.EvictResponse(digest=digest)

    async def ProbeAdapter(self, request: pb.ProbeAdapterRequest, context: Context) -> pb.ProbeAdapterResponse:
        effects = self._ready().effects
        version = await effects.probe(request.adapter, patience_s=request.patience_ms / 1000)
        return pb.ProbeAdapterResponse(adapter=version)

    async def NearestTokens(self, request: pb.NearestTokensRequest, context: Context) -> pb.NearestTokensResponse:
        front = self._ready()
        top_k = to_top_k(request)
        with self._searches.holding(_ANYBODY):
            bound = await _bound(front, request.adapter)
            async with front.residency.use(bound.digest):
                found = await front.engine.find_nearest(bound.digest, top_k)
        if found.error_reason:
            raise error_of(found)
        return to_nearest(bound, found, front.tokenizer)

    def _ready(self) -> Front:
        if self._front is None:
            raise Unavailable("the model is still loading; try again in a moment")
        return self._front


def _fitting(answer: Answer, *, field: str) -> Answer:
    """The answer; InvalidArgument where no message could hold it."""
    if answer.ByteSize() > MAX_MESSAGE_BYTES:
        raise InvalidArgument(
            f"the answer would have more than {MAX_MESSAGE_BYTES >> 20} MiB; ask for less at once", field=field
        )
    return answer


async def _bound(front: Front, spelling: str, *, fetches: bool = False) -> BoundAdapter:
    bound = await front.generator.bind(spelling, fetches=fetches)
    if len(bound.front) != 1:
        raise InvalidArgument("one adapter is expected here, not the base model or several", field="adapter")
    return bound.front[0]
