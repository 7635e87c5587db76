"""The inference service as a running server: engine process, adapters, RPCs, graceful stop.

Health says NOT_SERVING from the first moment until the model is loaded and the registry knows of it, and again
from the end of an engine until another has taken its place.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
import structlog
from softprompt_api.errors import InvalidArgument, Unavailable
from softprompt_api.inference.v1 import inference_pb2, inference_pb2_grpc
from softprompt_api.registry.v1 import registry_pb2, registry_pb2_grpc
from softprompt_api.rpc.channel import open_channel
from softprompt_api.rpc.quality import norms_to
from softprompt_api.rpc.server import ServiceServer
from softprompt_api.tracing import Tracer

from softprompt_inference.adapters.host_cache import HostCache
from softprompt_inference.adapters.residency import Residency
from softprompt_inference.adapters.source import AdapterSource
from softprompt_inference.admission import Admission
from softprompt_inference.announce import Announcer
from softprompt_inference.defaults import read_defaults
from softprompt_inference.effect import EffectProbe
from softprompt_inference.engine.client import EngineClient
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.messages import DropAdapter, ModelInfo
from softprompt_inference.generation import Generator
from softprompt_inference.grammar.checking import GrammarChecks
from softprompt_inference.model.source import resolve_model
from softprompt_inference.prompts import PromptEncoder
from softprompt_inference.servicer import Front, InferenceServicer
from softprompt_inference.settings import Settings
from softprompt_inference.text import Tokenizer

# Encoding a prompt takes milliseconds; more threads would only take processors from the engine. Tokenize and
# Detokenize have one of their own: they ask for no place among the generations, which must not wait behind them.
_ENCODING_THREADS = 2
_TOKENIZING_THREADS = 1
_GRACE_AFTER_ENGINE_DEATH_S = 1.0
# So many engines in a row that have generated nothing: the next would not either.
_MAX_FUTILE_ENGINES = 3

_log = structlog.get_logger()


class EngineDied(Exception):
    """Engines have ended by themselves again and again; the message says how the last did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lasting:
    """What the service has for all its engines, one after the other."""

    folder: Path
    defaults: Mapping[str, Any]
    tokenizer: Tokenizer
    base_model: registry_pb2.BaseModel
    source: AdapterSource
    grammars: GrammarChecks
    host_cache: HostCache
    ready_unix_s: int


class InferenceServer:
    """Serves between `start` and `stop`, or as an async context manager."""

    def __init__(self, settings: Settings, tracer: Tracer | None = None) -> None:
        self._settings = settings
        service = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]
        self._server = ServiceServer(settings.inference_address, [service], settings.server_tls, tracer)
        self._servicer = InferenceServicer(tracer)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self._servicer, self._server.server)
        self._encoding = ThreadPoolExecutor(_ENCODING_THREADS, thread_name_prefix="encode")
        self._tokenizing = ThreadPoolExecutor(_TOKENIZING_THREADS, thread_name_prefix="tokenize")
        self._channel: grpc.aio.Channel | None = None
        self._engine: EngineClient | None = None
        self._residency: Residency | None = None
        self._lasting: _Lasting | None = None
        self._announcing: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.port

    async def start(self) -> None:
        """Load the model, then serve.

        Raises:
            OSError: the address is taken.
            ModelSourceError, EngineStartError, Unsupported: the model cannot be served; the text says why.
            InvalidArgument: a setting does not fit the model.
        """
        settings = self._settings
        await self._server.start(serving=False)
        _log.info("starting", port=self.port, model=settings.model)
        folder, engine, tokenizer = await self._load()
        base_model = make_base_model(
            settings.model_id, engine.info, tokenizer, max_lora_rank=settings.max_lora_rank
        )
        self._channel = open_channel(settings.registry_address, settings.client_tls, short_window=True)
        stub: registry_pb2_grpc.RegistryServiceAsyncStub = registry_pb2_grpc.RegistryServiceStub(self._channel)
        self._lasting = _Lasting(
            folder=folder,
            defaults=read_defaults(folder),
            tokenizer=tokenizer,
            base_model=base_model,
            source=AdapterSource(stub, base_model, max_lora_bytes=settings.max_lora_bytes),
            grammars=GrammarChecks(folder, vocab_size=engine.info.vocab_size),
            host_cache=HostCache(settings.adapter_cache_bytes),
            ready_unix_s=int(time.time()),
        )
        self._servicer.open(self._make_front(engine, self._lasting))
        await self._announce(Announcer(stub, base_model))
        await self._server.set_serving(True)
        _log.info("inference ready", port=self.port, model=base_model.id, device=engine.info.device)

    async def keep_serving(self) -> None:
        """Put another engine in the place of each that ends; requests that ran on it are told.

        Raises:
            EngineDied: several in a row have generated nothing. Open calls have ended.
            EngineStartError: another cannot be started.
        """
        num_futile = 0
        while True:
            assert self._engine is not None, "start it first"
            # The future is the engine's own: cancelling this wait must not cancel it.
            reason = await asyncio.shield(self._engine.dead)
            await self._server.set_serving(False)
            num_futile = 0 if self._engine.stats.generated_tokens else num_futile + 1
            if num_futile == _MAX_FUTILE_ENGINES:
                _log.error("engines end again and again; this service ends with them", reason=reason)
                self._servicer.close_sessions()
                await self._server.stop(_GRACE_AFTER_ENGINE_DEATH_S)
                raise EngineDied(reason)
            _log.error("the engine has ended; another is started", reason=reason)
            await self._replace_engine()
            await self._server.set_serving(True)
            _log.info("inference ready again", port=self.port)

    async def _replace_engine(self) -> None:
        assert self._engine is not None, "start it first"
        assert self._residency is not None, "start it first"
        assert self._lasting is not None, "start it first"
        await self._engine.stop()
        residency = self._residency
        # Until there is another front, the one whose engine has ended refuses what needs one.
        engine = await self._start_engine(self._settings.engine_config(self._lasting.folder))
        self._servicer.open(self._make_front(engine, self._lasting))
        residency.refuse()

    async def stop(self) -> None:
        """Take no more calls, let running ones end within the grace; also after a start that failed."""
        self._servicer.close_sessions()
        await self._server.stop(self._settings.grace_s)
        if self._announcing is not None:
            self._announcing.cancel()
        if self._residency is not None:
            await self._residency.close()
        if self._engine is not None:
            await self._engine.stop()
        if self._channel is not None:
            await self._channel.close()
        for executor in (self._encoding, self._tokenizing):
            executor.shutdown(wait=False, cancel_futures=True)
        if self._lasting is not None:
            await self._lasting.grammars.close()
        _log.info("inference stopped")

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def _load(self) -> tuple[Path, EngineClient, Tokenizer]:
        """The model's folder, and engine and tokenizer, loaded at the same time.

        The first time that a model is served its files may have to be made, and the engine's kernels too: neither
        waits for the other.
        """
        settings = self._settings
        resolving = asyncio.create_task(asyncio.to_thread(resolve_model, settings.model, None, _log.info))
        starting = asyncio.create_task(self._start_engine(settings.engine_config(), resolving))
        try:
            folder = await resolving
            tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
            return folder, await starting, tokenizer
        except BaseException:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            raise

    async def _start_engine(self, config: EngineConfig, model_path: Awaitable[Path] | None = None) -> EngineClient:
        silence_s = self._settings.engine_silence_s
        self._engine = await EngineClient.start(config, _log.info, model_path=model_path, silence_s=silence_s)
        return self._engine

    async def _announce(self, announcer: Announcer) -> None:
        self._announcing = asyncio.create_task(announcer.run())
        await announcer.announced.wait()

    def _make_front(self, engine: EngineClient, lasting: _Lasting) -> Front:
        settings = self._settings

        def drop(digest: str) -> None:
            with contextlib.suppress(Unavailable):  # an engine that has ended holds nothing
                engine.submit(DropAdapter(digest=digest))

        residency = self._residency = Residency(
            fetch=partial(lasting.source.fetch, steps=engine.steps),
            load=lambda adapter: engine.submit(adapter.load_command()),
            drop=drop,
            max_adapters=settings.max_prompt_adapters,
            max_rows=settings.max_adapter_rows,
            max_key_value_rows=count_key_value_rows(settings.max_key_value_bytes, engine.info),
            max_loras=settings.max_loras,
            host_cache=lasting.host_cache,
            max_wait_s=settings.max_queue_s,
        )
        engine.follow_loads(residency.load_failed)
        make_encoder = partial(
            PromptEncoder,
            lasting.tokenizer,
            vocab_size=engine.info.vocab_size,
            max_tokens=engine.info.max_model_len,
        )
        prompts = make_encoder(executor=self._encoding, num_threads=_ENCODING_THREADS)
        admission = Admission(
            max_open=settings.max_num_sequences + settings.max_queued_requests,
            max_wait_s=settings.max_queue_s,
            load=lambda: engine.stats,
            num_elsewhere=lambda: residency.num_waiting,
        )
        engine.follow_stats(admission.measure)
        generator = Generator(
            engine=engine,
            tokenizer=lasting.tokenizer,
            prompts=prompts,
            source=lasting.source,
            residency=residency,
            grammars=lasting.grammars,
            base_model_id=lasting.base_model.id,
            admission=admission,
        )
        return Front(
            engine=engine,
            tokenizer=lasting.tokenizer,
            prompts=make_encoder(executor=self._tokenizing, num_threads=_TOKENIZING_THREADS),
            generator=generator,
            residency=residency,
            effects=EffectProbe(
                engine,
                prompts,
                residency,
                lasting.source,
                lasting.base_model,
                idle_s=lambda: admission.idle_s,
            ),
            base_model=lasting.base_model,
            ready_unix_s=lasting.ready_unix_s,
            defaults=lasting.defaults,
        )


def count_key_value_rows(max_bytes: int, info: ModelInfo) -> int:
    """How many virtual tokens may be keys and values. InvalidArgument: fewer than those of one adapter."""
    needed_bytes = info.max_virtual_tokens * info.key_value_row_bytes
    if not info.no_key_values and max_bytes < needed_bytes:
        raise InvalidArgument(
            f"max_key_value_bytes {max_bytes} must hold one adapter of max_virtual_tokens "
            f"{info.max_virtual_tokens}, which takes {needed_bytes}",
            field="max_key_value_bytes",
        )
    return max_bytes // info.key_value_row_bytes


def make_base_model(
    model_id: str, info: ModelInfo, tokenizer: Tokenizer, *, max_lora_rank: int
) -> registry_pb2.BaseModel:
    """The fingerprint of what is served."""
    return registry_pb2.BaseModel(
        id=model_id,
        architecture=info.architecture,
        hidden_size=info.hidden_size,
        num_layers=info.num_layers,
        num_kv_heads=info.num_kv_heads,
        head_dim=info.head_dim,
        vocab_size=info.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        max_virtual_tokens=info.max_virtual_tokens,
        dtype=info.dtype,
        no_key_values=info.no_key_values,
        max_lora_rank=max_lora_rank,
        vocabulary_norms=norms_to(info.vocabulary_norms),
    )
