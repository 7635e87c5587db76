"""The app's outermost layer, in plain ASGI: request ids, the access log, metrics, and the last resort for errors.

Plain ASGI, because BaseHTTPMiddleware hides the client's disconnect from the routes.
"""

import re
import time
import uuid

import structlog
from softprompt_api.errors import Overloaded, Unavailable
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from softprompt_gateway.admission import QUIET_PATHS, Admission
from softprompt_gateway.caller import Caller
from softprompt_gateway.errors import ClientGone, Refused, describe
from softprompt_gateway.metrics import Metrics

_PRINTABLE = re.compile(rb"[\x21-\x7e]{1,128}\Z")
_MAX_HEADERS = 128
# What nginx logs for a client that left; nobody receives it.
CLIENT_GONE_STATUS = 499
_log = structlog.get_logger()


def request_id(scope: Scope) -> str:
    """The client's own id if it sent exactly one that is short and printable, otherwise a new one."""
    sent: list[bytes] = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(sent) == 1 and _PRINTABLE.match(sent[0]):
        return sent[0].decode("ascii")
    return uuid.uuid4().hex


def _check_headers(scope: Scope) -> None:
    if len(scope["headers"]) > _MAX_HEADERS:
        raise Refused(f"more than {_MAX_HEADERS} headers", code="invalid_http", status=431)


class Edge:
    """Give every request an id and every error an answer; log and count every answer."""

    def __init__(self, app: ASGIApp, metrics: Metrics, admission: Admission) -> None:
        self._app = app
        self._metrics = metrics
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, request_id(scope), self._admission)
        scope.setdefault("state", {})["request_id"] = answer.request_id
        started_s = time.perf_counter()
        try:
            _check_headers(scope)
            with self._admission.admitted(scope["path"]):
                self._metrics.in_progress.set(self._admission.num_running)
                await self._app(scope, receive, answer.send)
        except ClientGone:
            answer.status = CLIENT_GONE_STATUS
        except (Refused, Overloaded, Unavailable) as error:
            await describe(error).response()(scope, receive, answer.send)
        except Exception as error:
            _log.exception("request failed", request_id=answer.request_id)
            if not answer.started:
                await describe(error).response()(scope, receive, answer.send)
        finally:
            self._metrics.in_progress.set(self._admission.num_running)
            self._tell(scope, answer, time.perf_counter() - started_s)

    def _tell(self, scope: Scope, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"]
        self._metrics.answered(route=route, method=method, status=answer.status, seconds=seconds)
        if route not in QUIET_PATHS:
            caller = Caller.of_scope(scope)
            _log.info(
                "request",
                request_id=answer.request_id,
                method=method,
                route=route,
                status=answer.status,
                seconds=round(seconds, 4),
                **(caller.facts() if caller else {}),
            )


class _Answer:
    """Watches what is sent, and adds the request id to the headers, and that no more are taken."""

    def __init__(self, send: Send, id_: str, admission: Admission) -> None:
        self._send = send
        self._admission = admission
        self.request_id = id_
        self.started = False
        self.status = CLIENT_GONE_STATUS  # until an answer starts

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.request_id.encode())]
            if self._admission.is_stopping:
                message["headers"].append((b"connection", b"close"))
        await self._send(message)
