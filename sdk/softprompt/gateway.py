"""The gateway from Python: text as it is generated, for the command line and for scripts without an OpenAI SDK."""

import contextlib
import json
import ssl
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import httpx
from softprompt_api import errors

if TYPE_CHECKING:
    from softprompt_api.rpc.tls import ClientTls

DEFAULT_URL = "http://127.0.0.1:2242"
_CONNECT_TIMEOUT_S = 5.0
# The first token may have to wait for others' prompts.
_READ_TIMEOUT_S = 600.0

_BY_STATUS: Mapping[int, type[errors.SoftpromptError]] = {
    401: errors.Unauthenticated,
    403: errors.PermissionDenied,
    404: errors.AdapterNotFound,
    409: errors.AdapterConflict,
    429: errors.RateLimited,
    500: errors.InternalError,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}


def authorization(api_key: str | None) -> dict[str, str]:
    """The header that shows an API key, where there is one; InvalidArgument for what cannot stand in a header."""
    if not api_key:
        return {}
    if not api_key.isascii() or not api_key.isprintable():
        raise errors.InvalidArgument("an API key consists of printable ASCII characters", field="api_key")
    return {"authorization": f"Bearer {api_key}"}


def tls_problem(url: str, error: BaseException | None) -> str:
    """Why there is no TLS connection, and what to do; "" where an error has another reason."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {url} is refused: {error.verify_message}. It must be for this host, and of an "
            "authority that is known here: --tls-ca or SOFTPROMPT_TLS_CA names one"
        )
    return "" if error is None else f"no TLS with {url}: {error}; without TLS its address begins with http://"


class GatewayClient:
    """A connection to a gateway; close it, or use it in a `with`. Failures raise errors of softprompt_api.errors.

    Args:
        url: the gateway, with or without `/v1`.
        api_key: where the gateway asks for one.
        tls: authorities to believe beside the public ones, and a certificate where the gateway asks for one.
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, tls: "ClientTls | None" = None
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        with self._translated():
            self._http = httpx.Client(
                base_url=self._url,
                headers=authorization(api_key),
                timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
                verify=True if tls is None else tls.extend(httpx.create_ssl_context()),
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """The base model, then the adapters, as `/v1/models` tells them."""
        with self._translated():
            answer = self._http.get("/v1/models")
        _raise_for_error(answer)
        try:
            models: list[dict[str, Any]] = answer.json()["data"]
        except (ValueError, KeyError, TypeError) as error:
            raise errors.Unavailable(f"what answers at {self._url} is no gateway: no /v1/models") from error
        return models

    def base_model(self) -> str:
        """The base model's id."""
        base = next((str(model["id"]) for model in self.models() if not model.get("parent")), None)
        if base is None:
            raise errors.Unavailable(f"the gateway at {self._url} has no base model to name; name a model")
        return base

    def complete(self, prompt: str, **body: Any) -> Iterator[str]:
        """Pieces of a completion. `body` holds further fields of `/v1/completions`, such as `model`."""
        for event in self._stream("/v1/completions", {"prompt": prompt, **body}):
            for choice in event.get("choices", ()):
                yield choice.get("text") or ""

    def chat(self, messages: Sequence[Mapping[str, Any]], **body: Any) -> Iterator[str]:
        """Pieces of the assistant's answer. `body` holds further fields of `/v1/chat/completions`."""
        for event in self._stream("/v1/chat/completions", {"messages": list(messages), **body}):
            for choice in event.get("choices", ()):
                yield choice.get("delta", {}).get("content") or ""

    def _stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        with self._translated(), self._http.stream("POST", path, json={**body, "stream": True}) as answer:
            if answer.is_error:
                answer.read()
            _raise_for_error(answer)
            for line in _lines(answer.iter_bytes()):
                data = line.removeprefix(b"data: ")
                if data == line or data == b"[DONE]":
                    continue
                event: dict[str, Any] = json.loads(data)
                if "error" in event:
                    raise errors.InternalError(str(event["error"].get("message")))
                yield event

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            nobody = f"no gateway answers at {self._url}: start one with `softprompt run`, or give its address"
            raise errors.Unavailable(tls_problem(self._url, error) or nobody) from error
        except httpx.HTTPError as error:
            raise errors.Unavailable(f"the gateway at {self._url} broke off: {error}") from error
        except UnicodeError as error:  # bytes among the arguments that no text has, or a host that no name can be
            raise errors.InvalidArgument(f"what was given cannot be sent to {self._url!a}: {error}") from error


def _lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """What line feeds end; httpx's own lines end at U+2028 too, which stands in texts as it is."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines


def _raise_for_error(answer: httpx.Response) -> None:
    if not answer.is_error:
        return
    try:
        error = answer.json()["error"]
        message, field = str(error["message"]), str(error.get("param") or "")
    except (ValueError, KeyError, TypeError):
        message, field = f"the gateway answered {answer.status_code} without saying why", ""
    raise _BY_STATUS.get(answer.status_code, errors.InvalidArgument)(message, field=field)
