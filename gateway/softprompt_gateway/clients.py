"""The services behind the gateway, with their failures as errors of ours."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.errors import InvalidArgument, KeyNotFound, SoftpromptError, Unavailable
from softprompt_api.inference.v1 import inference_pb2 as inference
from softprompt_api.names import with_task
from softprompt_api.registry.v1 import registry_pb2 as registry
from softprompt_api.registry.v1.registry_pb2_grpc import KeyServiceStub, RegistryServiceStub
from softprompt_api.rpc.channel import MAX_MESSAGE_BYTES, open_channel
from softprompt_api.rpc.context import ask, outgoing
from softprompt_api.rpc.ending import Ending
from softprompt_api.tracing import carrier

from softprompt_gateway.bases import Bases
from softprompt_gateway.catalog import spelling_of
from softprompt_gateway.coalesce import Coalesced
from softprompt_gateway.discovery import Discovery
from softprompt_gateway.placement import Place
from softprompt_gateway.replica import Replica
from softprompt_gateway.replicas import Replicas
from softprompt_gateway.session import Calls, Session
from softprompt_gateway.settings import Settings
from softprompt_gateway.statuses import translate

Response = TypeVar("Response")
UploadCall = grpc.aio.StreamUnaryCall[registry.RegisterAdapterRequest, registry.RegisterAdapterResponse]

_QUICK_TIMEOUT_S = 2.0
# Of the inference service, where nothing is generated: a probe computes some prompts.
_INFERENCE_TIMEOUT_S = 60.0
# A larger message ends its stream, and with it everybody's calls; a request goes with the number of its call.
_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 1024


async def _answer(service: str, call: Awaitable[Response]) -> Response:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise translate(service, error) from error


async def _is_serving(channel: grpc.aio.Channel) -> bool:
    try:
        check = health_pb2.HealthCheckRequest()
        stub: Any = health_pb2_grpc.HealthStub(channel)  # makes its methods as it is made: no types
        answer = await stub.Check(check, timeout=_QUICK_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


class RegistryClient:
    """The adapter registry."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, upload_timeout_s: float) -> None:
        self._channel = channel
        self._stub = RegistryServiceStub(channel)
        self._keys = KeyServiceStub(channel)
        self._timeout_s = timeout_s
        self._upload_timeout_s = upload_timeout_s
        self._versions = Coalesced(self._get_adapter)

    async def serving(self) -> bool:
        """Whether its health check says so."""
        return await _is_serving(self._channel)

    async def get_adapter(self, spelling: str) -> registry.AdapterVersion:
        """The version that `name`, `name@3` or a digest stands for now."""
        return await self._versions.get(spelling)

    async def _get_adapter(self, spelling: str) -> registry.AdapterVersion:
        request = registry.GetAdapterRequest(adapter=spelling)
        answer = await _answer("registry", ask(self._stub.GetAdapter, request, timeout_s=self._timeout_s))
        return answer.adapter

    async def list_adapters(self, request: registry.ListAdaptersRequest) -> registry.ListAdaptersResponse:
        """One page of names with their latest versions."""
        return await _answer("registry", ask(self._stub.ListAdapters, request, timeout_s=self._timeout_s))

    async def list_versions(self, request: registry.ListVersionsRequest) -> registry.ListVersionsResponse:
        """One page of a name's versions, newest first."""
        return await _answer("registry", ask(self._stub.ListVersions, request, timeout_s=self._timeout_s))

    async def set_alias(self, request: registry.SetAliasRequest) -> registry.AdapterVersion:
        """Move or remove an alias; the version it points to now."""
        answer = await _answer("registry", ask(self._stub.SetAlias, request, timeout_s=self._timeout_s))
        return answer.adapter

    async def update_adapter(self, request: registry.UpdateAdapterRequest) -> registry.AdapterVersion:
        """Change labels or pin of a version."""
        answer = await _answer("registry", ask(self._stub.UpdateAdapter, request, timeout_s=self._timeout_s))
        return answer.adapter

    async def import_adapter(self, request: registry.ImportAdapterRequest) -> registry.ImportAdapterResponse:
        """Register an adapter whose files the registry reads itself."""
        return await _answer("registry", ask(self._stub.ImportAdapter, request, timeout_s=self._upload_timeout_s))

    async def delete_adapter(self, name: str) -> int:
        """Delete a name; how many versions it had."""
        request = registry.DeleteAdapterRequest(name=name)
        answer = await _answer("registry", ask(self._stub.DeleteAdapter, request, timeout_s=self._timeout_s))
        return answer.deleted_versions

    async def delete_version(self, name: str, version: int) -> None:
        """Delete one version."""
        request = registry.DeleteVersionRequest(name=name, version=version)
        await _answer("registry", ask(self._stub.DeleteVersion, request, timeout_s=self._timeout_s))

    async def list_keys(self, request: registry.ListKeysRequest) -> registry.ListKeysResponse:
        """One page of the API keys."""
        return await _answer("registry", ask(self._keys.ListKeys, request, timeout_s=self._timeout_s))

    async def find_key(self, sha256: str) -> registry.ApiKey | None:
        """The API key with this sha256; None when there is none."""
        call = ask(self._keys.GetKey, registry.GetKeyRequest(sha256=sha256), timeout_s=self._timeout_s)
        try:
            return (await _answer("registry", call)).api_key
        except KeyNotFound:
            return None

    async def watch(self, cursor: str) -> AsyncIterator[registry.WatchAdaptersResponse]:
        """Changes after the cursor, until the stream breaks with an error."""
        try:
            async for event in self._stub.WatchAdapters(registry.WatchAdaptersRequest(cursor=cursor)):
                yield event
        except grpc.aio.AioRpcError as error:
            raise translate("registry", error) from error

    @asynccontextmanager
    async def open_lease(self) -> AsyncIterator[Callable[[str], Awaitable[float]]]:
        """What is asked with the cursor of all changes that were taken: for how long from now on there is a lease.

        0: none was given. With "" it is given back.
        """
        call = self._stub.HoldLease()

        async def ask_for(cursor: str) -> float:
            try:
                async with asyncio.timeout(self._timeout_s):
                    await call.write(registry.HoldLeaseRequest(cursor=cursor))
                    answer = await call.read()
            except grpc.aio.AioRpcError as error:
                raise translate("registry", error) from error
            except (TimeoutError, asyncio.InvalidStateError) as error:
                raise Unavailable("the registry does not answer") from error
            if not isinstance(answer, registry.HoldLeaseResponse):
                raise Unavailable("the registry ended the stream")
            return answer.lease_ms / 1000

        try:
            yield ask_for
        finally:
            call.cancel()

    def open_upload(self) -> UploadCall:
        """A registration to write a header and chunks into."""
        return self._stub.RegisterAdapter(timeout=self._upload_timeout_s, metadata=outgoing())

    async def finish_upload(self, call: UploadCall, ending: Ending) -> registry.RegisterAdapterResponse:
        """The registry's answer to a registration that was written, or that it broke off."""
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise translate("registry", ending.of(error)) from error


class InferenceClient:
    """The inference services: each call goes to the replica where it belongs."""

    def __init__(self, replicas: Replicas, *, timeout_s: float, generate_timeout_s: float) -> None:
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._generate_timeout_s = generate_timeout_s

    async def close(self) -> None:
        """Abort running generations and close the connections."""
        await self._replicas.close()

    async def bases(self) -> Bases:
        """The base models that there are, as last told by replicas that answered."""
        return await self._replicas.bases()

    @property
    def known_bases(self) -> Bases:
        """The same as far as is known by now; none before the first replica has answered."""
        return self._replicas.known_bases

    async def serving(self) -> bool:
        """Whether every known base model has a replica that is asked and, by its health check now, serves."""
        await self._replicas.look_at_all()
        every = self._replicas.every
        checks = await asyncio.gather(*[_is_serving(replica.channel) for replica in every])
        known = {replica.fingerprint for replica in every if replica.served is not None}
        return bool(known) and known == {
            replica.fingerprint
            for replica, is_well in zip(every, checks, strict=True)
            if is_well and replica.is_up
        }

    def generate(self, place: Place, requests: Sequence[inference.GenerateRequest]) -> Calls:
        """Start generations that belong together, on one replica; InvalidArgument where one is too large."""
        context = carrier()
        for request in requests:
            request.trace_context.update(context)
            _check_size(request)
        tried: list[Replica] = []

        def find() -> Session:
            replica = self._replicas.choose(
                place.served, lambda: place.key(requests[0]), adds=_num_choices(requests), but=tried
            )
            tried.append(replica)
            return replica.session()

        return Calls(requests, find, timeout_s=self._generate_timeout_s)

    async def tokenize(self, place: Place, request: inference.TokenizeRequest) -> inference.TokenizeResponse:
        """The ids of a prompt; InvalidArgument where it is too large."""
        _check_size(request)
        return await self._ask(
            place.served,
            place.key(request),
            lambda replica: ask(replica.stub.Tokenize, request, timeout_s=self._timeout_s),
        )

    async def detokenize(self, place: Place, token_ids: list[int]) -> str:
        """The text of ids."""
        request = inference.DetokenizeRequest(ids=token_ids)
        answer = await self._ask(
            place.served,
            place.digest.encode(),
            lambda replica: ask(replica.stub.Detokenize, request, timeout_s=self._timeout_s),
        )
        return answer.text

    async def probe_adapter(
        self, version: registry.AdapterVersion, *, patience_s: float = 0.0
    ) -> registry.AdapterVersion:
        """Measure a version, if need be a little later, when nobody else is served; the version with what was
        measured."""
        request = inference.ProbeAdapterRequest(adapter=spelling_of(version), patience_ms=int(patience_s * 1000))
        answer = await self._ask(
            (await self.bases()).of(version),
            version.digest.encode(),
            lambda replica: ask(replica.stub.ProbeAdapter, request, timeout_s=self._timeout_s + patience_s),
        )
        return answer.adapter

    async def nearest_tokens(
        self, version: registry.AdapterVersion, task: int | None, top_k: int
    ) -> inference.NearestTokensResponse:
        """The tokens nearest to each virtual token of an adapter."""
        request = inference.NearestTokensRequest(adapter=with_task(spelling_of(version), task), top_k=top_k)
        return await self._ask(
            (await self.bases()).of(version),
            with_task(version.digest, task).encode(),
            lambda replica: ask(replica.stub.NearestTokens, request, timeout_s=self._timeout_s),
        )

    async def loads(self) -> dict[str, inference.GetLoadResponse | None]:
        """What is running now on each replica, by its name; None: it did not answer."""
        every = self._replicas.every
        request = inference.GetLoadRequest()
        calls = [
            _answer("inference", ask(replica.stub.GetLoad, request, timeout_s=_QUICK_TIMEOUT_S))
            for replica in every
        ]
        answers = await asyncio.gather(*[_unless_it_fails(call) for call in calls])
        return {replica.name: answer for replica, answer in zip(every, answers, strict=True)}

    async def resident(self, limit: int) -> dict[str, inference.ListResidentResponse]:
        """The adapters in memory of each replica that serves, by its name, most recently used first."""
        await self.bases()
        serving = self._replicas.serving()
        request = inference.ListResidentRequest(limit=limit)
        answers = await asyncio.gather(
            *[
                _answer("inference", ask(replica.stub.ListResident, request, timeout_s=self._timeout_s))
                for replica in serving
            ]
        )
        return {replica.name: answer for replica, answer in zip(serving, answers, strict=True)}

    async def _ask(
        self, served: inference.GetModelResponse, key: bytes, call: Callable[[Replica], Awaitable[Response]]
    ) -> Response:
        """The answer of the replica that comes first, or of the next one where that is away."""
        tried: list[Replica] = []
        failed: Unavailable | None = None
        while True:
            try:
                replica = self._replicas.choose(served, lambda: key, but=tried)
            except Unavailable as none_is_left:
                raise (failed or none_is_left) from None
            tried.append(replica)
            try:
                return await _answer("inference", call(replica))
            except Unavailable as error:
                failed = error


def _check_size(request: inference.GenerateRequest | inference.TokenizeRequest) -> None:
    size_bytes = request.ByteSize()
    if size_bytes > _MAX_REQUEST_BYTES:
        raise InvalidArgument(
            f"a prompt, with all that goes with it, takes {size_bytes} bytes on its way to the inference service; "
            f"at most {_MAX_REQUEST_BYTES} may be sent: make it shorter"
        )


def _num_choices(requests: Sequence[inference.GenerateRequest]) -> int:
    return sum(max(1, request.sampling.n) for request in requests)


async def _unless_it_fails(answer: Awaitable[Response]) -> Response | None:
    try:
        return await answer
    except SoftpromptError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Clients:
    """The services, connected when first called."""

    registry: RegistryClient
    inference: InferenceClient
    channels: tuple[grpc.aio.Channel, ...]

    async def close(self) -> None:
        """Close the connections; running calls are cancelled."""
        await self.inference.close()
        for channel in self.channels:
            await channel.close()


def open_clients(settings: Settings) -> Clients:
    """Clients of the services at the settings' addresses; needs a running event loop."""
    to_registry = open_channel(settings.registry_address, settings.client_tls)
    replicas = Replicas(
        Discovery(settings.inference_places), lambda address: open_channel(address, settings.client_tls)
    )
    return Clients(
        registry=RegistryClient(
            to_registry,
            timeout_s=settings.registry_timeout_s,
            # Longer than a client's body may take: whoever is slow is told so.
            upload_timeout_s=settings.upload_timeout_s + settings.registry_timeout_s,
        ),
        inference=InferenceClient(
            replicas, timeout_s=_INFERENCE_TIMEOUT_S, generate_timeout_s=settings.request_timeout_s
        ),
        channels=(to_registry,),
    )
