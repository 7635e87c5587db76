"""The RPCs over a real socket, with an engine at the edge that says what a test tells it to say."""

# gRPC names the methods.

from __future__ import annotations

import asyncio
import math
import re
import struct
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
import structlog
from google.protobuf.message import Message
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from softprompt_api.errors import ContextLengthExceeded, InvalidArgument, Overloaded, SoftpromptError, Unavailable
from softprompt_api.formats import Content, Lora, LoraModule, Rows
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1 import inference_pb2_grpc
from softprompt_api.params import SamplingParams
from softprompt_api.quality import Probe
from softprompt_api.registry.v1 import registry_pb2
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.quality import probe_to
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.status import from_rpc_error
from softprompt_api.structured import StructuredOutputsParams
from softprompt_api.tracing import Tracer
from softprompt_inference.adapters.adapter import Adapter
from softprompt_inference.adapters.fetching import MakeWay
from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.admission import Admission
from softprompt_inference.effect import PROMPTS, EffectProbe
from softprompt_inference.engine.client import EngineClient, OutputStream
from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import (
    Abort,
    AddRequest,
    Command,
    DropAdapter,
    Finish,
    LoadAdapter,
    LoadLora,
    Logprobs,
    ModelInfo,
    Nearest,
    NearRow,
    Output,
    SoftPromptPart,
    Stats,
    TextPart,
)
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.generation import GenerateCall, Generator
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_inference.prompts import PromptEncoder, TextPrompt
from softprompt_inference.servicer import Front, InferenceServicer
from softprompt_inference.text import Tokenizer

VOCAB_SIZE = 49152
MAX_MODEL_LEN = 100
MAX_OPEN_CHOICES = 8
DIGEST_A = "sha256:" + "a" * 64
DIGEST_B = "sha256:" + "b" * 64


@dataclass
class FakeEngine:
    """Notes every command; a test puts the outputs."""

    info: ModelInfo
    stats: Stats = field(default_factory=lambda: Stats(running=3, waiting=2, used_pages=7, generated_tokens=99))
    commands: list[Command] = field(default_factory=list)
    streams: dict[str, OutputStream] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    searches: list[tuple[str, int]] = field(default_factory=list)
    nearest: Nearest = field(default_factory=lambda: Nearest(search_id=1))
    _num_held: int = 0  # what streams hold that was not taken

    def submit(self, command: Command) -> None:
        self.commands.append(command)
        if isinstance(command, AddRequest):
            # The stream is the real one; its client is this engine.
            self.streams[command.request_id] = OutputStream(cast(EngineClient, self), command.request_id)
        self.changed.set()

    def outputs(self, request_id: str) -> OutputStream:
        return self.streams[request_id]

    async def find_nearest(self, digest: str, top_k: int) -> Nearest:
        self.searches.append((digest, top_k))
        return self.nearest

    def _forget(self, request_id: str, *, abort: bool) -> None:
        if self.streams.pop(request_id, None) is not None and abort:
            self.submit(Abort(request_id=request_id))

    def put(self, request: AddRequest, *token_ids: int, finish: Finish | None = None, **values: Any) -> None:
        """Say tokens; the last one with `finish`."""
        for number, token_id in enumerate(token_ids, start=1):
            is_last = number == len(token_ids)
            self.streams[request.request_id]._put(
                Output(
                    request_id=request.request_id,
                    token_id=token_id,
                    finish=finish if is_last else None,
                    **(values if is_last else {}),
                )
            )

    def tell(self, request: AddRequest, *logprobs: Logprobs | None) -> None:
        """Say how likely the next tokens of the prompt are."""
        output = Output(request_id=request.request_id, prompt_logprobs=list(logprobs))
        self.streams[request.request_id]._put(output)

    def fail(self, request: AddRequest, reason: str, field: str = "") -> None:
        output = Output(
            request_id=request.request_id,
            finish=Finish.ERROR,
            error_reason=reason,
            error_message="it broke",
            error_field=field,
        )
        self.streams[request.request_id]._put(output)

    def of(self, kind: type[Any]) -> list[Any]:
        """The commands of one kind so far."""
        return [command for command in self.commands if isinstance(command, kind)]

    async def wait_for(self, kind: type[Any], number: int = 1) -> list[Any]:
        """The first commands of one kind, once there are so many."""
        async with asyncio.timeout(5):
            while len(self.of(kind)) < number:
                self.changed.clear()
                await self.changed.wait()
        return self.of(kind)


@dataclass
class FakeSource:
    """The registry's answers."""

    versions: dict[str, registry_pb2.AdapterVersion] = field(default_factory=dict)
    fetching: asyncio.Event = field(default_factory=asyncio.Event)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    abandoned: asyncio.Event = field(default_factory=asyncio.Event)
    contents: dict[str, Content] = field(default_factory=dict)
    is_away: bool = False
    brought: list[str] = field(default_factory=list)  # asked for together with their files

    async def resolve(self, spelling: str) -> registry_pb2.AdapterVersion:
        if self.is_away:
            raise Unavailable("the adapter registry cannot be reached")
        return self.versions[spelling]

    async def resolve_to_fetch(self, name: str) -> registry_pb2.AdapterVersion:
        self.brought.append(name)
        return await self.resolve(name)

    async def record(self, version: registry_pb2.AdapterVersion, probe: Probe) -> registry_pb2.AdapterVersion:
        version.probe.CopyFrom(probe_to(probe))
        return version

    async def fetch(self, digest: str, make_way: MakeWay) -> Adapter:
        self.fetching.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.abandoned.set()
            raise
        rows = Rows(data=bytes(80), dtype="float32", num_virtual_tokens=10, row_size=2)
        return Adapter(digest=digest, content=self.contents.get(digest, rows))


@dataclass
class World:
    """A running service and its edges."""

    engine: FakeEngine
    source: FakeSource
    residency: Residency
    stub: inference_pb2_grpc.InferenceServiceAsyncStub
    tokenizer: Tokenizer
    servicer: InferenceServicer
    front: Front

    def generate(self, **fields: Any) -> grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]:
        sampling = pb.SamplingParams(**{"max_tokens": 20} | fields.pop("sampling", {}))
        if not {"text", "token_ids", "chat", "parts", "prompt"} & set(fields):
            fields["text"] = "Hello there"
        fields.pop("prompt", None)
        return self.stub.Generate(pb.GenerateRequest(sampling=sampling, **fields))

    async def error(self, **fields: Any) -> SoftpromptError:
        """The error that a generation ends with."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in self.generate(**fields):
                pass
        return from_rpc_error(caught.value)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(resolve_model(DEFAULT_MODEL))


@pytest.fixture
async def grammars() -> AsyncIterator[GrammarChecks]:
    checks = GrammarChecks(resolve_model(DEFAULT_MODEL), vocab_size=VOCAB_SIZE)
    yield checks
    await checks.close()


@pytest.fixture
def max_adapters() -> int:
    """Soft prompts that the engine has room for; tests override this by parametrising it."""
    return 1


@pytest.fixture
def spans() -> InMemorySpanExporter | None:
    """Where spans go, for tests that trace; they override this by parametrising it."""
    return None


@pytest.fixture
async def world(
    tokenizer: Tokenizer, grammars: GrammarChecks, max_adapters: int, spans: InMemorySpanExporter | None
) -> AsyncIterator[World]:
    tracer = None
    if spans is not None:
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(spans))
        tracer = Tracer(provider)
    engine = FakeEngine(
        ModelInfo(
            architecture="LlamaForCausalLM",
            hidden_size=2,
            num_layers=1,
            num_kv_heads=1,
            head_dim=2,
            vocab_size=VOCAB_SIZE,
            dtype="float32",
            device="cpu",
            max_model_len=MAX_MODEL_LEN,
            max_virtual_tokens=64,
            weights_bytes=1000,
            kv_cache_bytes=2000,
            num_pages=50,
            page_size=16,
        )
    )
    source = FakeSource()
    source.gate.set()
    source.versions["tweets"] = registry_pb2.AdapterVersion(
        name="tweets", version=3, digest=DIGEST_A, num_virtual_tokens=10
    )
    source.versions[DIGEST_A] = source.versions["tweets"]
    source.versions["notes"] = registry_pb2.AdapterVersion(
        name="notes", version=1, digest=DIGEST_B, num_virtual_tokens=10
    )
    residency = Residency(
        fetch=source.fetch,
        load=lambda adapter: engine.submit(adapter.load_command()),
        drop=lambda digest: engine.submit(DropAdapter(digest=digest)),
        max_adapters=max_adapters,
        max_rows=64,
        max_key_value_rows=64,
        max_loras=1,
        host_cache=HostCache(0),
    )
    servicer = InferenceServicer(tracer)
    service = pb.DESCRIPTOR.services_by_name["InferenceService"]
    server = ServiceServer("127.0.0.1:0", [service], tracer=tracer)
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server.server)
    with ThreadPoolExecutor(1) as executor:
        prompts = PromptEncoder(
            tokenizer, vocab_size=VOCAB_SIZE, max_tokens=MAX_MODEL_LEN, executor=executor, num_threads=1
        )
        generator = Generator(
            engine=engine,
            tokenizer=tokenizer,
            prompts=prompts,
            source=cast(AdapterSource, source),
            residency=residency,
            grammars=grammars,
            base_model_id="org/Base",
            admission=Admission(max_open=MAX_OPEN_CHOICES, max_wait_s=60.0, load=lambda: engine.stats),
        )
        base_model = registry_pb2.BaseModel(id="org/Base", vocab_size=VOCAB_SIZE)
        front = Front(
            engine=engine,
            tokenizer=tokenizer,
            prompts=prompts,
            generator=generator,
            residency=residency,
            effects=EffectProbe(
                engine, prompts, residency, cast(AdapterSource, source), base_model, idle_s=lambda: 0.0
            ),
            base_model=base_model,
            ready_unix_s=1,
        )
        servicer.open(front)
        await server.start()
        async with open_channel(f"127.0.0.1:{server.port}") as channel:
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            yield World(
                engine=engine,
                source=source,
                residency=residency,
                stub=stub,
                tokenizer=tokenizer,
                servicer=servicer,
                front=front,
            )
            await server.stop(0)
    residency.check()


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)


async def test_events_come_in_order_from_accepted_to_usage(world: World) -> None:
    call = world.generate()
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.put(request, *ids(world.tokenizer, " you"), finish=Finish.LENGTH, cached_tokens=1)
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events] == ["accepted", "delta", "finished", "usage"]
    assert events[1].delta.text == " you"
    assert events[2].finished.reason == pb.FINISH_REASON_LENGTH
    assert events[3].usage == pb.Usage(prompt_tokens=2, completion_tokens=1, cached_tokens=1)


async def test_the_engine_gets_the_prompt_the_ends_and_a_seed_per_choice(world: World) -> None:
    call = world.generate(sampling={"n": 2, "seed": 40, "max_tokens": 5})
    requests = await world.engine.wait_for(AddRequest, 2)
    assert [request.seed for request in requests] == [40, 41]
    assert requests[0].prompt == [TextPart(token_ids=ids(world.tokenizer, "Hello there"))]
    assert requests[0].eos_token_ids == [2]
    assert requests[0].params.max_tokens == 5
    call.cancel()


async def test_what_the_model_recommends_is_told_and_done_where_a_request_does_not_say(world: World) -> None:
    world.servicer.open(replace(world.front, defaults={"temperature": 0.6, "top_k": 20}))
    model = await world.stub.GetModel(pb.GetModelRequest())
    assert model.default_sampling == pb.SamplingParams(temperature=0.6, top_k=20)
    call = world.generate(sampling={"top_k": 5})
    [request] = await world.engine.wait_for(AddRequest)
    assert (request.params.temperature, request.params.top_k, request.params.top_p) == (0.6, 5, 1.0)
    call.cancel()


async def test_a_lora_computes_its_requests_and_puts_nothing_before_the_prompt(world: World) -> None:
    module = LoraModule(
        name="q", rank=1, scale=0.5, in_features=2, out_features=1, a=bytes(8), b=bytes(4), dtype="float32"
    )
    world.source.contents[DIGEST_A] = Lora(modules=(module,))
    call = world.generate(adapter="tweets", sampling={"n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    assert [type(command) for command in world.engine.commands] == [LoadLora, AddRequest, AddRequest]
    for request in requests:
        assert request.prompt == [TextPart(token_ids=ids(world.tokenizer, "Hello there"))]
        assert request.lora == DIGEST_A
        world.engine.put(request, *ids(world.tokenizer, " you"), finish=Finish.LENGTH)
    events = [event async for event in call]
    assert (events[0].accepted.adapter_name, events[0].accepted.adapter_version) == ("tweets", 3)
    assert events[-1].usage.virtual_tokens == 0


@pytest.mark.parametrize(
    ("grammar", "wanted"),
    [
        (pb.Grammar(json_schema='{"type": "object"}'), {"json": '{"type": "object"}'}),
        (pb.Grammar(regex="a+"), {"regex": "a+"}),
        (pb.Grammar(choice=pb.Choices(texts=["a", "b"])), {"choice": ("a", "b")}),
        (pb.Grammar(lark="start: /a/"), {"grammar": "start: /a/"}),
        (pb.Grammar(json_object=True), {"json_object": True}),
    ],
)
async def test_a_grammar_reaches_the_engine(world: World, grammar: pb.Grammar, wanted: dict[str, Any]) -> None:
    call = world.generate(sampling={"grammar": grammar, "n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    assert {request.params.structured_outputs for request in requests} == {StructuredOutputsParams(**wanted)}
    call.cancel()


@pytest.mark.parametrize(
    "grammar",
    [
        pb.Grammar(),
        pb.Grammar(json_object=False),
        pb.Grammar(choice=pb.Choices()),
        pb.Grammar(regex="(["),
        pb.Grammar(json_schema="5"),
        pb.Grammar(json_schema='{"type": "robot"}'),
        pb.Grammar(lark="nothing"),
        pb.Grammar(lark="x" * 200_000),
    ],
)
async def test_what_is_no_grammar_is_refused_before_anything_is_accepted(
    world: World, grammar: pb.Grammar
) -> None:
    error = await world.error(sampling={"grammar": grammar})
    assert isinstance(error, InvalidArgument)
    assert error.field == "structured_outputs"
    assert not world.engine.of(AddRequest)


async def test_tools_calls_and_results_are_in_the_prompt(world: World) -> None:
    call = pb.ToolCall(id="1", name="f", arguments='{"a": 1}')
    chat = pb.ChatPrompt(
        messages=[
            pb.ChatMessage(role="user", content="x"),
            pb.ChatMessage(role="assistant", tool_calls=[call]),
            pb.ChatMessage(role="tool", content="y", tool_call_id="1"),
        ],
        tools=['{"type": "function", "function": {"name": "f"}}'],
    )
    ids = (await world.stub.Tokenize(pb.TokenizeRequest(chat=chat))).ids
    text = world.tokenizer.decode(ids)
    assert '<tools>\n{"type": "function", "function": {"name": "f"}}\n</tools>' in text
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\ny\n</tool_response>" in text


async def test_how_likely_the_prompt_is_comes_before_any_delta_and_of_one_choice(world: World) -> None:
    call = world.generate(sampling={"n": 2, "prompt_logprobs": 1})
    first, second = await world.engine.wait_for(AddRequest, 2)
    assert (first.params.prompt_logprobs, second.params.prompt_logprobs) == (1, None)
    hello, there = ids(world.tokenizer, "Hello there")
    world.engine.put(second, *ids(world.tokenizer, " you"), finish=Finish.LENGTH)
    world.engine.tell(first, None)
    world.engine.tell(first, Logprobs(chosen=-0.5, top=[(hello, -0.25)]))
    world.engine.put(first, *ids(world.tokenizer, " me"), finish=Finish.LENGTH)
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events][:4] == [
        *("accepted", "prompt_logprobs", "prompt_logprobs", "delta")
    ]
    one, other = (event.prompt_logprobs for event in events[1:3])
    [unpredicted], [predicted] = one.tokens, other.tokens
    assert (one.starts_unpredicted, other.starts_unpredicted) == (True, False)
    assert (unpredicted.chosen.token_id, unpredicted.chosen.token, len(unpredicted.top)) == (hello, "Hello", 0)
    assert (predicted.chosen.token_id, predicted.chosen.token_bytes) == (there, b" there")
    assert (predicted.chosen.logprob, predicted.top[0].token, predicted.top[0].logprob) == (-0.5, "Hello", -0.25)
    assert {event.delta.text for event in events[3:]} >= {" you", " me"}


async def test_a_long_prompt_is_told_in_messages_of_bounded_size(world: World) -> None:
    call = world.generate(token_ids=pb.TokenIds(ids=[50] * 60), sampling={"prompt_logprobs": 20})
    [request] = await world.engine.wait_for(AddRequest)
    likely = Logprobs(chosen=-1.0, top=[(token_id, -1.0) for token_id in range(20)])
    for _ in range(6):
        world.engine.tell(request, *[likely] * 10)
    world.engine.put(request, 50, finish=Finish.LENGTH)
    told = [
        event.prompt_logprobs for event in [event async for event in call] if event.HasField("prompt_logprobs")
    ]
    assert [len(each.tokens) for each in told] == [10] * 6


async def test_without_tokens_a_generation_is_accepted_and_counted(world: World) -> None:
    call = world.generate(sampling={"max_tokens": 0})
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.streams[request.request_id]._put(
        Output(request_id=request.request_id, finish=Finish.LENGTH, cached_tokens=0)
    )
    events = [event async for event in call]
    assert [event.WhichOneof("event") for event in events] == ["accepted", "finished", "usage"]
    assert events[-1].usage == pb.Usage(prompt_tokens=2)


async def test_without_a_seed_each_request_draws_its_own(world: World) -> None:
    calls = [world.generate(), world.generate()]
    first, second = await world.engine.wait_for(AddRequest, 2)
    assert first.seed != second.seed
    assert first.request_id != second.request_id
    for call in calls:
        call.cancel()


async def test_unset_max_tokens_is_left_to_the_context(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="Hi"))
    [request] = await world.engine.wait_for(AddRequest)
    assert request.params.max_tokens is None
    call.cancel()


async def test_tokens_that_arrive_together_come_as_one_delta(world: World) -> None:
    call = world.generate()
    [request] = await world.engine.wait_for(AddRequest)
    token_ids = ids(world.tokenizer, " one two three")
    world.engine.put(request, *token_ids, finish=Finish.LENGTH)
    deltas = [event.delta async for event in call if event.WhichOneof("event") == "delta"]
    assert [list(delta.token_ids) for delta in deltas] == [token_ids]


async def test_a_stop_string_aborts_its_choice_and_no_other(world: World) -> None:
    call = world.generate(sampling={"n": 2, "stop": ["END"]})
    first, second = await world.engine.wait_for(AddRequest, 2)
    world.engine.put(first, *ids(world.tokenizer, " it isEND of"))
    [aborted] = await world.engine.wait_for(Abort)
    assert aborted.request_id == first.request_id
    world.engine.put(second, *ids(world.tokenizer, " done"), finish=Finish.STOP)
    events = [event async for event in call]
    [stopped] = [event.finished for event in events if event.finished.stop_string]
    assert (stopped.index, stopped.stop_string) == (0, "END")
    text = "".join(event.delta.text for event in events if event.delta.index == 0)
    assert text == " it is"
    assert world.engine.of(Abort) == [aborted]


async def test_a_stop_token_is_named(world: World) -> None:
    call = world.generate(sampling={"stop_token_ids": [9]})
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.put(request, *ids(world.tokenizer, " a"), 9, finish=Finish.STOP, stop_token_id=9)
    events = [event async for event in call]
    assert events[-2].finished == pb.Finished(index=0, reason=pb.FINISH_REASON_STOP, stop_token_id=9)
    assert "".join(event.delta.text for event in events) == " a"


async def test_logprobs_carry_text_and_bytes(world: World) -> None:
    call = world.generate(sampling={"logprobs": 1})
    [request] = await world.engine.wait_for(AddRequest)
    token_id = ids(world.tokenizer, "🦙")[0]
    logprobs = Logprobs(chosen=-0.5, top=[(token_id, -0.5)])
    world.engine.put(request, token_id, finish=Finish.LENGTH, logprobs=logprobs)
    [delta] = [event.delta async for event in call if event.WhichOneof("event") == "delta"]
    [entry] = delta.logprobs
    token_bytes = world.tokenizer.token_bytes(token_id)
    assert (entry.chosen.token_bytes, entry.chosen.token) == (token_bytes, "\ufffd")
    assert "🦙".encode().startswith(token_bytes)
    assert list(entry.top) == [entry.chosen]


async def test_an_adapter_is_loaded_before_the_request_and_named_in_the_answer(world: World) -> None:
    call = world.generate(adapter="tweets")
    [request] = await world.engine.wait_for(AddRequest)
    assert [type(command) for command in world.engine.commands] == [LoadAdapter, AddRequest]
    assert request.prompt[0] == SoftPromptPart(digest=DIGEST_A)
    # All ten virtual tokens and one of the two text tokens; usage tells of the text alone.
    world.engine.put(request, 50, finish=Finish.LENGTH, cached_tokens=11)
    events = [event async for event in call]
    assert events[-1].usage.cached_tokens == 1
    accepted = events[0].accepted
    assert (accepted.adapter_name, accepted.adapter_version, accepted.adapter_digest) == ("tweets", 3, DIGEST_A)
    assert (accepted.virtual_tokens, events[-1].usage.virtual_tokens) == (10, 10)
    assert (len(accepted.prompt_token_ids), events[-1].usage.prompt_tokens) == (2, 2)


async def test_a_task_is_bound_with_its_digest(world: World) -> None:
    world.source.versions["tweets"].num_tasks = 2
    call = world.generate(adapter="tweets:1")
    [request] = await world.engine.wait_for(AddRequest)
    assert request.prompt[0] == SoftPromptPart(digest=f"{DIGEST_A}:1")
    assert [command.digest for command in world.engine.of(LoadAdapter)] == [f"{DIGEST_A}:1"]
    world.engine.put(request, 50, finish=Finish.LENGTH)
    events = [event async for event in call]
    assert events[0].accepted.adapter_digest == f"{DIGEST_A}:1"
    for spelling in ("tweets", "tweets:2"):
        error = await world.error(adapter=spelling)
        assert (error.reason, error.field) == ("INVALID_ARGUMENT", "adapter")
    tokens = await world.stub.Tokenize(pb.TokenizeRequest(text="Hello", adapter=f"{DIGEST_A}:0"))
    assert tokens.virtual_tokens == 10


def parts(*pieces: str | list[int] | tuple[str]) -> pb.PromptParts:
    """A prompt in parts: texts, ids, and soft prompts as tuples of their name."""
    made = []
    for piece in pieces:
        if isinstance(piece, str):
            made.append(pb.PromptPart(text=piece))
        elif isinstance(piece, list):
            made.append(pb.PromptPart(token_ids=pb.TokenIds(ids=piece)))
        else:
            made.append(pb.PromptPart(soft_prompt=piece[0]))
    return pb.PromptParts(parts=made)


LORA_MODULE = LoraModule(
    name="q", rank=1, scale=0.5, in_features=2, out_features=1, a=bytes(8), b=bytes(4), dtype="float32"
)
DIGEST_C = "sha256:" + "c" * 64


@pytest.mark.parametrize("max_adapters", [2])
async def test_soft_prompts_and_a_lora_go_together_in_one_request(world: World) -> None:
    world.source.contents[DIGEST_C] = Lora(modules=(LORA_MODULE,))
    call = world.generate(adapter=f"notes+{DIGEST_C}+tweets@latest", sampling={"n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    loads = [LoadAdapter, LoadLora, LoadAdapter]
    assert [type(command) for command in world.engine.commands] == [*loads, AddRequest, AddRequest]
    for request in requests:
        assert request.prompt == [
            SoftPromptPart(digest=DIGEST_B),
            SoftPromptPart(digest=DIGEST_A),
            TextPart(token_ids=ids(world.tokenizer, "Hello there")),
        ]
        assert request.lora == DIGEST_C
        world.engine.put(request, 50, finish=Finish.LENGTH, cached_tokens=21)
    events = [event async for event in call]
    accepted, usage = events[0].accepted, events[-1].usage
    assert [(one.name, one.version, one.digest) for one in accepted.adapters] == [
        ("notes", 1, DIGEST_B),
        ("", 0, DIGEST_C),
        ("tweets", 3, DIGEST_A),
    ]
    assert (accepted.adapter_name, accepted.virtual_tokens) == ("notes", 20)
    assert (usage.prompt_tokens, usage.virtual_tokens, usage.cached_tokens) == (2, 20, 1)


@pytest.mark.parametrize("max_adapters", [2])
async def test_soft_prompts_stand_anywhere_in_a_prompt(world: World) -> None:
    call = world.generate(adapter="tweets", parts=parts("Hello", ("notes",), " there", [50, 51], (DIGEST_A,)))
    [request] = await world.engine.wait_for(AddRequest)
    hello, there = (ids(world.tokenizer, text) for text in ("Hello", " there"))
    assert request.prompt == [
        SoftPromptPart(digest=DIGEST_A),
        TextPart(token_ids=hello),
        SoftPromptPart(digest=DIGEST_B),
        TextPart(token_ids=there),
        TextPart(token_ids=[50, 51]),
        SoftPromptPart(digest=DIGEST_A),
    ]
    # The first soft prompt, the first text and the second soft prompt.
    world.engine.put(request, 50, finish=Finish.LENGTH, cached_tokens=20 + len(hello))
    events = [event async for event in call]
    assert list(events[0].accepted.prompt_token_ids) == [*hello, *there, 50, 51]
    assert [one.digest for one in events[0].accepted.adapters] == [DIGEST_A, DIGEST_B]
    usage = events[-1].usage
    assert (usage.prompt_tokens, usage.virtual_tokens) == (len(hello) + len(there) + 2, 30)
    assert usage.cached_tokens == len(hello)


async def test_soft_prompts_stand_anywhere_in_a_conversation(world: World) -> None:
    content = [
        pb.ContentPart(text="Answer "),
        pb.ContentPart(soft_prompt="tweets"),
        pb.ContentPart(text="briefly"),
    ]
    messages = [pb.ChatMessage(role="user", parts=content), pb.ChatMessage(role="assistant", content="Yes?")]
    chat = pb.ChatPrompt(messages=[*messages, messages[0]])
    call = world.generate(chat=chat)
    [request] = await world.engine.wait_for(AddRequest)
    first, one, second, two, third = request.prompt
    assert one == two == SoftPromptPart(digest=DIGEST_A)
    texts = [world.tokenizer.decode(part.token_ids) for part in (first, second, third)]
    assert texts[0].endswith("<|im_start|>user\nAnswer ")
    assert texts[1].startswith("briefly<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>")
    assert texts[2] == "briefly<|im_end|>\n<|im_start|>assistant\n"
    call.cancel()
    tokens = await world.stub.Tokenize(pb.TokenizeRequest(chat=chat, adapter="notes"))
    assert tokens.virtual_tokens == 30
    assert list(tokens.ids) == [*first.token_ids, *second.token_ids, *third.token_ids]


async def test_penalties_see_the_text_of_all_parts_and_no_virtual_token(world: World) -> None:
    call = world.generate(parts=parts([50], ("tweets",), [51]), sampling={"repetition_penalty": 1.5})
    [request] = await world.engine.wait_for(AddRequest)
    virtual_ids = VirtualIds(VOCAB_SIZE)
    virtual_ids.assign(DIGEST_A, 10)
    sequence = make_sequence(
        request, virtual_ids=virtual_ids, lora_slots=LoraSlots(0), max_model_len=MAX_MODEL_LEN
    )
    sample = sequence.chunk(12).sample
    assert sample is not None
    assert sample.seen is not None
    assert list(sample.seen.token_ids) == [50, 51]
    call.cancel()


@pytest.mark.parametrize(
    ("fields", "field_name", "message"),
    [
        ({"adapter": f"{DIGEST_C}+{DIGEST_B}"}, "adapter", "are both LoRAs"),
        ({"adapter": "tweets+given"}, "adapter", "given gives keys and values .* before tweets"),
        ({"adapter": "given+given"}, "adapter", "both give keys and values"),
        ({"parts": parts("x", ("given",))}, "prompt", "given gives keys and values"),
        ({"parts": parts("x", (DIGEST_C,))}, "prompt", "is a LoRA"),
        ({"parts": parts(("tweets",))}, "prompt", "the prompt is empty"),
        ({"parts": pb.PromptParts()}, "prompt", "the prompt is empty"),
        ({"parts": pb.PromptParts(parts=[pb.PromptPart()])}, "prompt", "neither text nor ids nor a soft prompt"),
        ({"parts": parts("x", ("Not A Name",))}, "prompt", "not an adapter name"),
        ({"parts": parts("x", ("tweets+tweets",))}, "prompt", "not an adapter name"),
        ({"parts": parts("x", [VOCAB_SIZE])}, "prompt", "has id"),
        ({"adapter": "tweets+"}, "adapter", "not an adapter name"),
        ({"adapter": "+".join(["tweets"] * 17)}, "adapter", "has 17 adapters; at most 16"),
        ({"adapter": "tweets+notes"}, "adapter", "needs 2 soft prompts .* there is room for 1"),
        (
            {
                "chat": pb.ChatPrompt(
                    messages=[pb.ChatMessage(role="user", content="x", parts=[pb.ContentPart(text="x")])]
                )
            },
            "messages[0].parts",
            "not both",
        ),
        (
            {"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="user", parts=[pb.ContentPart()])])},
            "messages[0].parts",
            "neither text nor a soft prompt",
        ),
    ],
)
async def test_what_does_not_go_together_is_refused_by_field_and_takes_no_room(
    world: World, fields: dict[str, Any], field_name: str, message: str
) -> None:
    given = Rows(data=bytes(80), dtype="float32", num_virtual_tokens=10, row_size=2, are_key_values=True)
    digest = "sha256:" + "d" * 64
    world.source.versions["given"] = registry_pb2.AdapterVersion(name="given", version=1, digest=digest)
    world.source.contents = {
        digest: given,
        DIGEST_B: Lora(modules=(LORA_MODULE,)),
        DIGEST_C: Lora(modules=(LORA_MODULE,)),
    }
    if fields.get("adapter") == "tweets+notes":
        del world.source.contents[DIGEST_B]
    error = await world.error(**fields)
    assert isinstance(error, InvalidArgument)
    assert (error.field, bool(re.search(message, error.message))) == (field_name, True), error.message
    assert world.engine.commands == []


async def test_the_virtual_tokens_of_all_count_against_the_context(world: World) -> None:
    prompt = parts([50] * 61, ("tweets",), ("tweets",))
    error = await world.error(parts=prompt)
    assert isinstance(error, ContextLengthExceeded)
    assert "61 tokens + 20 virtual tokens + max_tokens 20, the limit is 100" in error.message


@pytest.mark.parametrize("rpc", ["Preload", "Evict"])
async def test_adapters_are_brought_in_and_let_go_one_by_one(world: World, rpc: str) -> None:
    message = {"Preload": pb.PreloadRequest, "Evict": pb.EvictRequest}[rpc]
    for spelling in ("", "tweets+notes"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await getattr(world.stub, rpc)(message(adapter=spelling))
        assert from_rpc_error(caught.value).field == "adapter"


@pytest.mark.parametrize("max_adapters", [2])
async def test_an_adapter_is_pinned_as_it_is_brought_in(world: World) -> None:
    async def listed() -> dict[str, bool]:
        answer = await world.stub.ListResident(pb.ListResidentRequest())
        return {one.digest: one.pinned for one in answer.adapters}

    await world.stub.Preload(pb.PreloadRequest(adapter="tweets"))
    assert world.source.brought == ["tweets"]
    assert await listed() == {DIGEST_A: False}
    await world.stub.Preload(pb.PreloadRequest(adapter="tweets", pin=True))
    assert await listed() == {DIGEST_A: True}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.Preload(pb.PreloadRequest(adapter="notes", pin=True))
    assert isinstance(from_rpc_error(caught.value), Overloaded)
    await world.stub.Evict(pb.EvictRequest(adapter="tweets"))
    assert await listed() == {DIGEST_B: False}


@pytest.mark.parametrize("spelling", ["", "org/Base"])
async def test_the_base_model_needs_no_adapter(world: World, spelling: str) -> None:
    call = world.generate(adapter=spelling)
    [request] = await world.engine.wait_for(AddRequest)
    assert [type(part) for part in request.prompt] == [TextPart]
    call.cancel()


async def test_a_digest_in_memory_is_served_while_the_registry_is_away(world: World) -> None:
    world.source.is_away = True
    call = world.generate(adapter=DIGEST_A)
    await world.engine.wait_for(AddRequest)
    assert isinstance(await world.error(adapter="tweets"), Unavailable)
    call.cancel()


async def test_the_field_that_an_engine_finds_at_fault_is_told(world: World) -> None:
    call = world.generate()
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.fail(request, "CONTEXT_LENGTH_EXCEEDED", field="max_tokens")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    error = from_rpc_error(caught.value)
    assert isinstance(error, ContextLengthExceeded)
    assert error.field == "max_tokens"


@pytest.mark.parametrize(
    "sampling",
    [
        {"grammar": pb.Grammar(json_schema='{"type": "integer", "maximum": 18446744073709551616}')},
        {"grammar": pb.Grammar(json_schema=r'{"enum": ["\ud800"]}')},
    ],
)
async def test_what_no_grammar_can_be_made_of_is_the_requests_fault(
    world: World, sampling: dict[str, Any]
) -> None:
    error = await world.error(sampling=sampling)
    assert isinstance(error, InvalidArgument)
    assert error.field == "structured_outputs"


async def test_an_adapter_is_free_again_after_its_last_request(world: World) -> None:
    call = world.generate(adapter=DIGEST_A)
    [request] = await world.engine.wait_for(AddRequest)
    waiting = world.generate(adapter=DIGEST_B)
    world.engine.put(request, 50, finish=Finish.LENGTH)
    assert [event async for event in call]
    _, second = await world.engine.wait_for(AddRequest, 2)
    assert second.prompt[0] == SoftPromptPart(digest=DIGEST_B)
    assert world.engine.of(DropAdapter) == [DropAdapter(digest=DIGEST_A)]
    waiting.cancel()


async def test_a_client_that_leaves_aborts_and_frees_its_adapter(world: World) -> None:
    call = world.generate(adapter=DIGEST_A, sampling={"n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    call.cancel()
    aborts = await world.engine.wait_for(Abort, 2)
    assert {abort.request_id for abort in aborts} == {request.request_id for request in requests}
    other = world.generate(adapter=DIGEST_B)
    await world.engine.wait_for(AddRequest, 3)
    drop, load = world.engine.of(DropAdapter)[0], world.engine.of(LoadAdapter)[-1]
    order = [world.engine.commands.index(command) for command in (*aborts, drop, load)]
    assert order == sorted(order)
    other.cancel()


async def test_a_deadline_aborts(world: World) -> None:
    call = world.stub.Generate(pb.GenerateRequest(text="Hi"), timeout=0.2)
    await world.engine.wait_for(AddRequest)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await world.engine.wait_for(Abort)


async def test_a_client_that_leaves_while_its_adapter_comes_lets_go_of_it(world: World) -> None:
    world.source.gate.clear()
    call = world.generate(adapter=DIGEST_A)
    await world.source.fetching.wait()
    call.cancel()
    async with asyncio.timeout(5):
        await world.source.abandoned.wait()
    # The one place for adapters must become free, or this would wait for ever.
    world.source.gate.set()
    other = world.generate(adapter=DIGEST_B)
    [request] = await world.engine.wait_for(AddRequest)
    assert request.prompt[0] == SoftPromptPart(digest=DIGEST_B)
    other.cancel()


async def test_a_reader_that_stopped_reading_and_leaves_aborts_at_once(world: World) -> None:
    call = world.generate(sampling={"logprobs": 20})
    [request] = await world.engine.wait_for(AddRequest)
    await call.read()
    # Far more than the transport buffers: the service now waits in a write.
    logprobs = Logprobs(chosen=-1.0, top=[(token_id, -1.0) for token_id in range(20)])
    for _ in range(40):
        for _ in range(500):
            world.engine.put(request, 50, logprobs=logprobs)
        await asyncio.sleep(0.01)
    call.cancel()
    async with asyncio.timeout(1):
        await world.engine.wait_for(Abort)


async def test_a_slow_reader_gets_everything_in_messages_of_bounded_size(world: World) -> None:
    call = world.generate(sampling={"stop": ["END"]})
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.put(request, *[50] * 2000, *ids(world.tokenizer, "END"), *[50] * 2000)
    deltas = [event.delta async for event in call if event.WhichOneof("event") == "delta"]
    sizes = [len(delta.token_ids) for delta in deltas]
    assert sum(sizes) == 2000 + len(ids(world.tokenizer, "END"))
    assert max(sizes) <= 512


async def test_tokens_that_came_before_an_error_are_told_before_it(world: World) -> None:
    call = world.generate(sampling={"n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    for request in requests:
        world.engine.put(request, 50, 50)
        world.engine.fail(request, "UNAVAILABLE")
    told: list[tuple[int, int]] = []

    async def read() -> None:
        async for event in call:
            if event.HasField("delta"):
                told.append((event.delta.index, len(event.delta.token_ids)))

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert told == [(0, 2), (1, 2)]


async def test_a_failed_choice_fails_the_call_and_aborts_the_others(world: World) -> None:
    call = world.generate(sampling={"n": 2})
    first, second = await world.engine.wait_for(AddRequest, 2)
    world.engine.fail(first, "UNAVAILABLE")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert isinstance(from_rpc_error(caught.value), Unavailable)
    assert await world.engine.wait_for(Abort) == [Abort(request_id=second.request_id)]


@pytest.mark.parametrize(
    ("sampling", "field_name"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"n": -1}, "n"),
        ({"n": 129}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"presence_penalty": 3.0}, "presence_penalty"),
        ({"frequency_penalty": -3.0}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
        ({"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ({"logit_bias": {3: 101.0}}, "logit_bias"),
        ({"min_tokens": 21}, "min_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
    ],
)
async def test_sampling_out_of_range_is_refused_by_field(
    world: World, sampling: dict[str, Any], field_name: str
) -> None:
    error = await world.error(sampling=sampling)
    assert isinstance(error, InvalidArgument)
    assert error.field == field_name
    assert world.engine.commands == []


@pytest.mark.parametrize(
    ("fields", "field_name"),
    [
        ({"prompt": None}, "prompt"),
        ({"text": ""}, "prompt"),
        ({"text": "", "adapter": "tweets"}, "prompt"),
        ({"token_ids": pb.TokenIds()}, "prompt"),
        ({"token_ids": pb.TokenIds(ids=[1, VOCAB_SIZE])}, "token_ids"),
        ({"token_ids": pb.TokenIds(ids=[-1])}, "token_ids"),
        ({"chat": pb.ChatPrompt()}, "messages"),
        ({"chat": pb.ChatPrompt(messages=[pb.ChatMessage(role="god", content="x")])}, "messages[0].role"),
        ({"text": "x", "adapter": "Not A Name"}, "adapter"),
        ({"text": "x", "adapter": "sha256:12"}, "adapter"),
        ({"text": "x", "request_id": "a\nb"}, "request_id"),
        ({"text": "x", "request_id": "a" * 129}, "request_id"),
    ],
)
async def test_requests_that_make_no_sense_are_refused_by_field(
    world: World, fields: dict[str, Any], field_name: str
) -> None:
    error = await world.error(**fields)
    assert isinstance(error, InvalidArgument)
    assert error.field == field_name
    assert world.engine.of(AddRequest) == []


async def test_a_prompt_that_fills_the_context_is_refused_with_numbers(world: World) -> None:
    error = await world.error(token_ids=pb.TokenIds(ids=[50] * 95), adapter="tweets")
    assert isinstance(error, ContextLengthExceeded)
    assert "95 tokens + 10 virtual tokens + max_tokens 20, the limit is 100" in error.message
    assert error.field == "prompt"


async def test_max_tokens_beyond_the_context_are_refused_with_numbers(world: World) -> None:
    error = await world.error(token_ids=pb.TokenIds(ids=[50] * 81))
    assert isinstance(error, ContextLengthExceeded)
    assert "81 tokens + 0 virtual tokens + max_tokens 20, the limit is 100" in error.message
    assert error.field == "max_tokens"


async def test_exactly_the_context_is_accepted(world: World) -> None:
    call = world.generate(token_ids=pb.TokenIds(ids=[50] * 70), adapter="tweets")
    await world.engine.wait_for(AddRequest)
    call.cancel()


async def test_a_prompt_of_megabytes_is_refused_unread(world: World) -> None:
    error = await world.error(text="a" * 5_000_000)
    assert isinstance(error, ContextLengthExceeded)


async def test_more_choices_than_may_wait_are_refused_and_then_taken_again(world: World) -> None:
    call = world.generate(sampling={"n": MAX_OPEN_CHOICES})
    await world.engine.wait_for(AddRequest, MAX_OPEN_CHOICES)
    error = await world.error()
    assert isinstance(error, Overloaded)
    call.cancel()
    await world.engine.wait_for(Abort, MAX_OPEN_CHOICES)
    again = world.generate()
    await world.engine.wait_for(AddRequest, MAX_OPEN_CHOICES + 1)
    again.cancel()


async def test_a_bad_request_changes_nothing_for_a_running_stream(world: World) -> None:
    call = world.generate()
    [request] = await world.engine.wait_for(AddRequest)
    assert isinstance(await world.error(sampling={"temperature": 9.0}), InvalidArgument)
    world.engine.put(request, 50, finish=Finish.LENGTH)
    assert [event async for event in call][-1].usage.completion_tokens == 1


@pytest.mark.parametrize("wrong", [-1, VOCAB_SIZE])
async def test_detokenize_refuses_ids_outside_the_vocabulary(world: World, wrong: int) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.Detokenize(pb.DetokenizeRequest(ids=[1, wrong]))
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert error.field == "ids"


async def test_tokenize_counts_the_adapters_virtual_tokens(world: World) -> None:
    answer = await world.stub.Tokenize(pb.TokenizeRequest(text="Hello there", adapter="tweets"))
    assert list(answer.ids) == ids(world.tokenizer, "Hello there")
    assert (answer.virtual_tokens, answer.max_model_len) == (10, MAX_MODEL_LEN)
    assert list(answer.token_strings) == []


async def test_tokens_are_told_with_their_texts(world: World) -> None:
    answer = await world.stub.Tokenize(pb.TokenizeRequest(text="Hello 🦙", return_token_strings=True))
    assert list(answer.token_strings) == [world.tokenizer.token_text(token_id) for token_id in answer.ids]


@pytest.mark.parametrize(
    ("rpc", "wanted", "why"),
    [
        ("Tokenize", pb.TokenizeRequest(text="wonderful " * 8, return_token_strings=True), "more than"),
        ("Tokenize", pb.TokenizeRequest(text="🦙" * 8), r"there are [0-9]+ ids; at most 16"),
        ("Detokenize", pb.DetokenizeRequest(ids=[7] * 16), "more than"),
        ("Detokenize", pb.DetokenizeRequest(ids=[7] * 17), "there are 17 ids; at most 16"),
    ],
)
async def test_what_no_message_can_hold_is_refused(
    world: World, rpc: str, wanted: Message, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("softprompt_inference.prompts.MAX_IDS", 16)
    monkeypatch.setattr("softprompt_inference.servicer.MAX_MESSAGE_BYTES", 64)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(world.stub, rpc)(wanted)
    error = from_rpc_error(caught.value)
    assert isinstance(error, InvalidArgument)
    assert error.field == {"Tokenize": "prompt", "Detokenize": "ids"}[rpc]
    assert re.search(why, error.message)


async def test_ids_that_cannot_fit_are_refused_uncopied(world: World) -> None:
    error = await world.error(token_ids=pb.TokenIds(ids=[-1] * (MAX_MODEL_LEN + 1)))
    assert isinstance(error, ContextLengthExceeded)
    assert f"the prompt has {MAX_MODEL_LEN + 1} ids" in error.message


async def test_ends_that_the_model_has_no_logits_for_end_nothing(
    world: World, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine refuses ids outside the vocabulary, so nobody would be served."""
    monkeypatch.setattr(tokenizer, "eos_token_ids", (2, VOCAB_SIZE))
    generator = Generator(
        engine=world.engine,
        tokenizer=tokenizer,
        prompts=world.front.prompts,
        source=cast(AdapterSource, world.source),
        residency=world.residency,
        grammars=world.front.generator._grammars,
        base_model_id="org/Base",
        admission=Admission(max_open=1, max_wait_s=60.0, load=lambda: world.engine.stats),
    )
    call = GenerateCall(prompt=TextPrompt(text="Hello"), params=SamplingParams())
    async with generator.start(call):
        [request] = await world.engine.wait_for(AddRequest)
    assert request.eos_token_ids == [2]


@pytest.mark.parametrize("rpc", ["Tokenize", "Detokenize", "NearestTokens"])
async def test_what_waits_outside_the_line_of_generations_is_bounded(world: World, rpc: str) -> None:
    places, request = {
        "Tokenize": (world.servicer._tokenized, pb.TokenizeRequest(text="Hello")),
        "Detokenize": (world.servicer._tokenized, pb.DetokenizeRequest(ids=[50])),
        "NearestTokens": (world.servicer._searches, pb.NearestTokensRequest(adapter="tweets")),
    }[rpc]
    with places.holding("", places._most), pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(world.stub, rpc)(request)
    assert isinstance(from_rpc_error(caught.value), Overloaded)
    await getattr(world.stub, rpc)(request)


async def test_a_generation_is_logged_once_however_it_ends(world: World) -> None:
    with structlog.testing.capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logged:
        call = world.generate(request_id="whole", adapter="tweets")
        [request] = await world.engine.wait_for(AddRequest)
        world.engine.put(request, *ids(world.tokenizer, " you"), finish=Finish.LENGTH, cached_tokens=1)
        async for _ in call:
            pass
        call = world.generate(request_id="left")
        await call.read()
        call.cancel()
        await world.engine.wait_for(Abort)
        await world.error(request_id="refused", adapter="tweets", sampling={"max_tokens": MAX_MODEL_LEN})
        failing = asyncio.create_task(world.error(request_id="failed"))
        request = (await world.engine.wait_for(AddRequest, 3))[-1]
        world.engine.fail(request, Overloaded.reason)
        await failing
    lines = {line["request_id"]: line for line in logged if line["event"] in ("generated", "not generated")}
    assert (lines["whole"]["completion_tokens"], lines["whole"]["virtual_tokens"]) == (1, 10)
    causes = {name: lines[name]["cause"] for name in ("left", "refused", "failed")}
    assert causes == {"left": "aborted", "refused": ContextLengthExceeded.reason, "failed": Overloaded.reason}


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.mark.parametrize("spans", [InMemorySpanExporter()])
async def test_a_generation_of_a_shared_stream_is_traced_by_its_own_context(
    world: World, spans: InMemorySpanExporter
) -> None:
    call = world.stub.GenerateMany()
    start = pb.GenerateRequest(text="Hello there", adapter="tweets", sampling=pb.SamplingParams(max_tokens=20))
    start.trace_context["traceparent"] = TRACEPARENT
    await call.write(pb.GenerateManyRequest(call=1, start=start))
    [request] = await world.engine.wait_for(AddRequest)
    world.engine.put(request, *ids(world.tokenizer, " you"), finish=Finish.LENGTH, cached_tokens=1)
    await call.done_writing()
    async for _ in call:
        pass
    found = {span.name: span for span in spans.get_finished_spans()}
    assert set(found) == {"generate", "encode", "bind", "adapters", "first token", "decode"}
    whole = found.pop("generate")
    assert TRACEPARENT.startswith(f"00-{whole.context.trace_id:032x}-{whole.parent.span_id:016x}")
    assert {span.parent.span_id for span in found.values()} == {whole.context.span_id}
    assert whole.attributes["softprompt.completion_tokens"] == 1
    assert "Hello" not in "".join(span.to_json() for span in (whole, *found.values()))


async def test_the_load_is_the_engines(world: World) -> None:
    load = await world.stub.GetLoad(pb.GetLoadRequest())
    assert (load.running, load.waiting, load.used_pages, load.num_pages) == (3, 2, 7, 50)
    assert load.generated_tokens == 99
    assert (load.base_model_id, load.max_loras) == ("org/Base", 1)
    assert [tier.tier for tier in load.adapter_tiers] == [pb.RESIDENT_TIER_DEVICE, pb.RESIDENT_TIER_HOST]


@pytest.mark.parametrize(
    "ask",
    [
        lambda stub: stub.GetModel(pb.GetModelRequest()),
        lambda stub: stub.GetLoad(pb.GetLoadRequest()),
        lambda stub: stub.Tokenize(pb.TokenizeRequest(text="x")),
        lambda stub: stub.Generate(pb.GenerateRequest(text="x")).read(),
    ],
)
async def test_until_the_model_is_loaded_every_call_is_unavailable(
    ask: Callable[[Any], Any], tmp_path: Path
) -> None:
    server = ServiceServer(f"unix:{tmp_path}/s", [pb.DESCRIPTOR.services_by_name["InferenceService"]])
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(InferenceServicer(), server.server)
    await server.start(serving=False)
    async with grpc.aio.insecure_channel(f"unix:{tmp_path}/s") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(inference_pb2_grpc.InferenceServiceStub(channel))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "loading" in str(caught.value.details())
    await server.stop(0)


async def test_generations_share_a_stream_and_closing_it_lets_them_finish(world: World) -> None:
    call = world.stub.GenerateMany()
    for number in (1, 2):
        start = pb.GenerateRequest(text="Hello there", sampling=pb.SamplingParams(max_tokens=20))
        await call.write(pb.GenerateManyRequest(call=number, start=start))
    requests = await world.engine.wait_for(AddRequest, 2)
    world.servicer.close_sessions()
    for request in requests:
        world.engine.put(request, *ids(world.tokenizer, " you"), finish=Finish.LENGTH)
    told: dict[int, list[str | None]] = {1: [], 2: []}
    ends = []
    async for message in call:
        for number in message.deltas.calls:
            told[number].append("delta")
        for event in message.events:
            told[event.call].append(event.response.WhichOneof("event") or event.WhichOneof("event"))
            ends += [event.end] if event.HasField("end") else []
    assert await call.code() is grpc.StatusCode.OK
    assert told == {number: ["accepted", "delta", "finished", "usage", "end"] for number in (1, 2)}
    assert ends == [pb.CallEnd()] * 2


async def test_a_gateway_that_leaves_aborts_what_it_started(world: World) -> None:
    call = world.stub.GenerateMany()
    await call.write(pb.GenerateManyRequest(call=1, start=pb.GenerateRequest(text="Hi", adapter=DIGEST_A)))
    [request] = await world.engine.wait_for(AddRequest)
    call.cancel()
    [aborted] = await world.engine.wait_for(Abort)
    assert aborted.request_id == request.request_id


@pytest.mark.parametrize("max_adapters", [1])
async def test_who_waits_for_room_for_adapters_is_known_by_tenant_and_number_of_choices(world: World) -> None:
    running = world.generate(adapter="tweets")
    await world.engine.wait_for(AddRequest)
    waiting = world.generate(adapter="notes", tenant="acme", sampling={"n": 2})
    async with asyncio.timeout(30):
        while not world.residency._line:
            await world.stub.GetLoad(pb.GetLoadRequest())
    assert [waiter.tenant for waiter in world.residency._line] == ["acme"]
    assert world.residency.num_waiting == 2
    running.cancel()
    await world.engine.wait_for(AddRequest, 3)
    assert world.residency.num_waiting == 0
    waiting.cancel()


async def test_a_requests_salt_and_tenant_reach_each_of_its_choices(world: World) -> None:
    call = world.generate(cache_salt="acme/", tenant="acme", sampling={"n": 2})
    requests = await world.engine.wait_for(AddRequest, 2)
    assert [(request.salt, request.tenant) for request in requests] == [("acme/", "acme")] * 2
    call.cancel()
    for name, value in (("cache_salt", "x" * 513), ("tenant", "A"), ("tenant", "x" * 64)):
        error = await world.error(**{name: value})
        assert (type(error), error.field) == (InvalidArgument, name)


async def test_the_tokens_nearest_to_each_virtual_token_are_told(world: World) -> None:
    world.engine.nearest = Nearest(
        search_id=1,
        rows=[NearRow(norm=2.5, tokens=[(28, 0.5), (29, 0.25)]), NearRow(norm=1.0, tokens=[(30, -0.5)])],
    )
    answer = await world.stub.NearestTokens(pb.NearestTokensRequest(adapter="tweets", top_k=2))
    assert (answer.adapter_name, answer.adapter_version, answer.adapter_digest) == ("tweets", 3, DIGEST_A)
    assert [virtual.norm for virtual in answer.virtual_tokens] == [2.5, 1.0]
    [first, second] = answer.virtual_tokens[0].nearest
    assert (first.token_id, first.cosine, first.token) == (28, 0.5, world.tokenizer.token_text(28))
    assert second.token_id == 29
    assert world.engine.searches == [(DIGEST_A, 2)]
    assert world.engine.of(LoadAdapter), "it was not brought in"


async def test_five_tokens_are_told_where_no_number_is_named(world: World) -> None:
    await world.stub.NearestTokens(pb.NearestTokensRequest(adapter=DIGEST_A))
    assert world.engine.searches == [(DIGEST_A, 5)]


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (pb.NearestTokensRequest(adapter="tweets", top_k=21), "top_k"),
        (pb.NearestTokensRequest(adapter="tweets", top_k=-1), "top_k"),
        (pb.NearestTokensRequest(adapter="org/Base"), "adapter"),
    ],
)
async def test_what_cannot_be_searched_for_is_refused_by_field(
    world: World, request_: pb.NearestTokensRequest, field: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.NearestTokens(request_)
    error = from_rpc_error(caught.value)
    assert (type(error), error.field) == (InvalidArgument, field)


async def test_what_the_engine_refuses_to_search_is_told(world: World) -> None:
    world.engine.nearest = Nearest(search_id=1, error_reason="INVALID_ARGUMENT", error_message="these are keys")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.NearestTokens(pb.NearestTokensRequest(adapter="tweets"))
    assert from_rpc_error(caught.value).message == "these are keys"


async def test_a_probe_compares_prompts_with_an_adapter_and_without(world: World) -> None:
    call = world.stub.ProbeAdapter(pb.ProbeAdapterRequest(adapter="tweets"))
    likely, unlikely = (struct.pack("<2f", *map(math.log, shares)) for shares in ((0.75, 0.25), (0.25, 0.75)))
    for number in range(2 * len(PROMPTS)):
        request = (await world.engine.wait_for(AddRequest, number + 1))[-1]
        has_adapter = any(isinstance(part, SoftPromptPart) for part in request.prompt)
        assert has_adapter == (number >= len(PROMPTS))
        every = unlikely if has_adapter else likely
        world.engine.put(request, 1, finish=Finish.LENGTH, logprobs=Logprobs(chosen=0.0, top=[], every=every))
    probed = (await call).adapter
    [effect] = probed.probe.effects
    assert (probed.name, probed.version) == ("tweets", 3)
    assert (effect.num_flips, effect.num_prompts) == (len(PROMPTS), len(PROMPTS))
    assert effect.mean_kl == pytest.approx(0.5 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("patience_ms", [-1, 600_001])
async def test_a_probe_has_so_much_patience_and_no_more(world: World, patience_ms: int) -> None:
    request = pb.ProbeAdapterRequest(adapter="tweets", patience_ms=patience_ms)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await world.stub.ProbeAdapter(request)
    error = from_rpc_error(caught.value)
    assert (error.reason, error.field) == ("INVALID_ARGUMENT", "patience_ms")
    assert error.message == "patience_ms must be 0 to 600000"


async def test_a_probe_whose_caller_leaves_is_aborted_and_lets_the_adapter_go(world: World) -> None:
    call = world.stub.ProbeAdapter(pb.ProbeAdapterRequest(adapter="tweets"))
    [request] = await world.engine.wait_for(AddRequest)
    call.cancel()
    [aborted] = await world.engine.wait_for(Abort)
    assert aborted.request_id == request.request_id
