"""One inference service: whether it takes requests, what it serves, and the streams to it."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from softprompt_api.inference.v1.inference_pb2 import GetModelRequest, GetModelResponse
from softprompt_api.inference.v1.inference_pb2_grpc import InferenceServiceStub
from softprompt_api.rpc.channel import MAX_CALL_S

from softprompt_gateway.bases import Fingerprint, fingerprint
from softprompt_gateway.disconnect import stop
from softprompt_gateway.session import Session

_MODEL_TIMEOUT_S = 2.0
# A call keeps to its connection, also where gRPC ends that for its age: the next call is on a new one.
_MAX_WATCH_S = 120.0
# One that does not serve may be starting, and tells when it serves, or stopping, and waits for the call's end.
_PATIENCE_S = 1.0
# One that serves may be busy, but one that is stuck is seen by this alone: gRPC's own threads answer its pings.
_FIRST_ANSWER_S = 5.0
_MIN_PAUSE_S = 0.1
_MAX_PAUSE_S = 0.5
_log = structlog.get_logger()


class Replica:
    """A service that is followed from the start: it tells when it serves, and its connection when it is gone.

    Args:
        name: its address.
        channel: to that.
        notify: called when something below changes.

    Attributes:
        is_up: it serves: requests may be sent to it.
        served: what it said last that it serves; None: nothing yet.
        looked_at: set once it is known whether it serves.
    """

    def __init__(self, name: str, channel: grpc.aio.Channel, notify: Callable[[], None]) -> None:
        self.name = name
        self.channel = channel
        self.stub = InferenceServiceStub(channel)
        self.is_up = False
        self.served: GetModelResponse | None = None
        self.fingerprint: Fingerprint = ()
        self.looked_at = asyncio.Event()
        self._notify = notify
        self._session: Session | None = None
        self._sessions: set[Session] = set()
        self._following = asyncio.create_task(self._follow())

    @property
    def load(self) -> int:
        """How many choices run there, of those that this gateway has asked for."""
        return sum(session.load for session in self._sessions)

    def session(self) -> Session:
        """The stream for what is started now."""
        if self._session is None or not self._session.takes_calls:
            self._finish()
            self._session = session = Session(self.stub)
            self._sessions.add(session)
            session.reading.add_done_callback(lambda _: self._sessions.discard(session))
        return self._session

    async def retire(self) -> None:
        """Take nothing more, and close when what runs has ended."""
        await stop(self._following)
        self._change(is_up=False)
        self._finish()
        await asyncio.gather(*[session.reading for session in self._sessions], return_exceptions=True)
        await self.channel.close(MAX_CALL_S)  # each call ends by its own deadline

    async def close(self) -> None:
        """Abort what runs, and close."""
        await stop(self._following)
        await asyncio.gather(*[session.close() for session in self._sessions])
        await self.channel.close()

    def _finish(self) -> None:
        if self._session is not None:
            self._session.finish()
            self._session = None

    async def _follow(self) -> None:
        pause_s = _MIN_PAUSE_S
        while True:
            if await self._watch():
                continue
            pause_s = _MIN_PAUSE_S if self.is_up else min(2 * pause_s, _MAX_PAUSE_S)
            self._change(is_up=False)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))

    async def _watch(self) -> bool:
        """Hear of its health; True: until the time for a call was over, which is short where it does not serve."""
        health: Any = health_pb2_grpc.HealthStub(self.channel)  # makes its methods as it is made: no types
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=_MAX_WATCH_S)
        answers = aiter(watch)
        has_answered = False
        try:
            while True:
                patience_s = None if has_answered else _FIRST_ANSWER_S
                async with asyncio.timeout(patience_s if self.is_up else _PATIENCE_S):
                    answer = await anext(answers)
                has_answered = True
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    if not await self._ask():
                        return False
                elif self.is_up:
                    return False
                else:
                    self._change(is_up=False)
        except TimeoutError:
            self._change(is_up=False)
            return True
        except StopAsyncIteration:
            return False
        except grpc.aio.AioRpcError as error:
            return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        finally:
            watch.cancel()  # a service that stops waits for it

    async def _ask(self) -> bool:
        """Find out what it serves: since it was heard of last, that may have changed."""
        try:
            self.served = await self.stub.GetModel(GetModelRequest(), timeout=_MODEL_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        self.fingerprint = fingerprint(self.served.base_model)
        self._change(is_up=True)
        return True

    def _change(self, *, is_up: bool) -> None:
        if is_up != self.is_up and self.looked_at.is_set():
            log = _log.info if is_up else _log.warning
            log("inference replica serves" if is_up else "inference replica serves no more", replica=self.name)
        self.is_up = is_up
        self.looked_at.set()
        self._notify()
