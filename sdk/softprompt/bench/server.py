"""The server under load: what it serves, and one timed completion."""

import json
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx
from softprompt_api.errors import AdapterNotFound, InternalError, SoftpromptError, Unauthenticated, Unavailable

from softprompt.bench.workload import Request
from softprompt.gateway import authorization, tls_problem

if TYPE_CHECKING:
    from softprompt_api.rpc.tls import ClientTls

# Far above any answer: a run is to be measured, not cut.
_READ_TIMEOUT_S = 3600.0
_CONNECT_TIMEOUT_S = 60.0
_QUICK_TIMEOUT_S = 10.0


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What became of one request. Times are in seconds and count from its scheduled sending.

    Attributes:
        event_s: when each event with text came, the first token's first.
        end_s: when the last event of the answer came, as vLLM counts it, or the error.
        error: why there is no whole answer; "": there is.
    """

    request: Request
    event_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        """Time to the first token; to the end where no event had text."""
        return self.event_s[0] if self.event_s else self.end_s

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first; None for a single one."""
        return (self.end_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """Times between events."""
        return [later - earlier for earlier, later in zip(self.event_s, self.event_s[1:], strict=False)]


class Server:
    """A connection to an OpenAI-compatible server; use it in an `async with`.

    Args:
        url: the server, with or without `/v1`.
        api_key: sent as a bearer token where given.
        tls: authorities to believe beside the public ones, and a certificate where the server asks for one.
    """

    def __init__(self, url: str, api_key: str = "", *, tls: "ClientTls | None" = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._http = httpx.AsyncClient(
            # Events are read as they come: nothing is to be unpacked, nor to wait until a proxy has packed it.
            headers={**authorization(api_key), "accept-encoding": "identity"},
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # Requests wait for the server, never for a connection of ours.
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            verify=True if tls is None else tls.extend(httpx.create_ssl_context()),
        )

    async def __aenter__(self) -> "Server":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[dict[str, Any]]:
        """The model cards of `/v1/models`.

        Raises Unavailable where no such server answers, and Unauthenticated where it asks for another key.
        """
        try:
            answer = await self._http.get(f"{self.url}/v1/models", timeout=_QUICK_TIMEOUT_S)
            cards = answer.raise_for_status().json()["data"]
        except (httpx.TransportError, httpx.InvalidURL) as error:
            nobody = f"no server answers at {self.url}: start one, or give --base-url"
            raise Unavailable(tls_problem(self.url, error) or nobody) from error
        except (httpx.HTTPStatusError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
                raise Unauthenticated(
                    f"{self.url} asks for an API key that may infer: give it with --api-key or SOFTPROMPT_API_KEY"
                ) from error
            raise Unavailable(
                f"what answers at {self.url} is no OpenAI-compatible server: no /v1/models"
            ) from error
        return [card for card in cards if isinstance(card, dict) and "id" in card]

    async def check_model(self, model: str) -> None:
        """Raise AdapterNotFound where the server does not know a model that it does not list."""
        try:
            answer = await self._http.get(f"{self.url}/v1/models/{model}", timeout=_QUICK_TIMEOUT_S)
        except httpx.TransportError as error:
            raise Unavailable(f"the server at {self.url} does not answer") from error
        if answer.is_error:
            raise AdapterNotFound(f"the server at {self.url} has no model {model!r}")

    async def token_ids(self, text: str, *, model: str) -> list[int]:
        """The ids of a text; none where the server does not tell: OpenAI has no `/tokenize`."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            answer = await self._http.post(f"{self.url}/tokenize", json=body, timeout=_QUICK_TIMEOUT_S)
            return [int(token_id) for token_id in answer.raise_for_status().json()["tokens"]]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return []

    async def complete(self, request: Request, began_s: float) -> Outcome:
        """Complete a prompt; never raises for what the server does.

        Args:
            began_s: the run's beginning on `time.perf_counter`.
        """
        outcome = Outcome(request=request)
        scheduled_s = began_s + request.send_at_s
        try:
            async for event in self._events(request):
                now_s = time.perf_counter() - scheduled_s
                if event.get("choices"):
                    outcome.end_s = now_s
                if usage := event.get("usage"):
                    outcome.input_tokens = int(usage["prompt_tokens"])
                    outcome.output_tokens = int(usage["completion_tokens"])
                if any(choice.get("text") for choice in event.get("choices", ())):
                    outcome.event_s.append(now_s)
            if not outcome.output_tokens:
                raise InternalError("the stream ended without its usage")
        except (httpx.HTTPError, SoftpromptError, ValueError, KeyError, TypeError, AttributeError) as error:
            outcome.error = str(error) or type(error).__name__
            outcome.end_s = time.perf_counter() - scheduled_s
        return outcome

    async def _events(self, request: Request) -> AsyncIterator[Mapping[str, Any]]:
        body = {
            "model": request.model,
            "prompt": request.prompt,
            "max_tokens": request.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._http.stream("POST", f"{self.url}/v1/completions", json=body) as answer:
            if answer.is_error:
                await answer.aread()
                raise InternalError(_message_of(answer))
            buffer = b""
            async for piece in answer.aiter_raw():
                *lines, buffer = (buffer + piece).split(b"\n")
                for line in lines:
                    data = line.removeprefix(b"data:").strip()
                    if not data.startswith(b"{"):  # blank lines, comments, and the end mark
                        continue
                    event: dict[str, Any] = json.loads(data)
                    if "error" in event:
                        raise InternalError(_words_of(event))
                    yield event


def _message_of(answer: httpx.Response) -> str:
    try:
        return f"{answer.status_code}: {_words_of(answer.json())}"
    except (ValueError, TypeError, AttributeError):
        return f"the server answered {answer.status_code}"


def _words_of(body: Mapping[str, Any]) -> str:
    error = body.get("error") or body
    return str(error.get("message") or error) if isinstance(error, Mapping) else str(error)
