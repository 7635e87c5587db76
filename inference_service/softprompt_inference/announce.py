"""Keeps the registry knowing which base model is served here."""

import asyncio

import grpc
import structlog
from softprompt_api.registry.v1 import registry_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2_grpc as pb_grpc

RETRY_S = 1.0
TIMEOUT_S = 10.0

_log = structlog.get_logger()


class Announcer:
    """Tells the registry of the base model, and again from time to time: it may have lost its store.

    Args:
        stub: the registry.
        base_model: what is served.
        interval_s: between announcements.
    """

    def __init__(
        self, stub: "pb_grpc.RegistryServiceAsyncStub", base_model: pb.BaseModel, *, interval_s: float = 15.0
    ) -> None:
        self._stub = stub
        self._request = pb.PutBaseModelRequest(base_model=base_model)
        self._interval_s = interval_s
        self.announced = asyncio.Event()

    async def run(self) -> None:
        """Announce for ever; `announced` is set after the first success."""
        is_known = False
        while True:
            try:
                await self._stub.PutBaseModel(self._request, timeout=TIMEOUT_S, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                if is_known or not self.announced.is_set():
                    _log.warning("the registry does not take the base model; trying on", cause=error.code().name)
                is_known = False
                await asyncio.sleep(RETRY_S)
                continue
            if not is_known:
                _log.info("the registry knows the base model", model=self._request.base_model.id)
            is_known = True
            self.announced.set()
            await asyncio.sleep(self._interval_s)
