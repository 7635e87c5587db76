"""Bad requests beside streams that must not notice (P4): refused, and no 5xx, hang, restart or fetch.

They are data, `hostile/*.yaml`: one file for each area, one row for each kind. A row says how it is sent (`send`:
bytes on a socket; `get`, `post`, `put`: HTTP; `call`: gRPC; `register`: an adapter, over both) and what the answer
is: its `status`, `code` or `reason`, and where another mistake would be answered alike, the `field` that it names
and a piece of what it `tells`. Of what is `accepted`, `use` says that of a request with it. `each` makes a row of
each value, in place of `$field` or as the field itself, which is `$place`; a value may come with what is told of
it, `{is: …, tells: …}`.
"""

import asyncio
import base64
import copy
import errno
import hashlib
import json
import os
import random
import re
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import yaml
from google.protobuf.json_format import ParseDict
from google.protobuf.message_factory import GetMessageClass
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.registry.v1 import registry_pb2 as reg
from softprompt_api.rpc.channel import CHUNK_BYTES
from softprompt_api.rpc.status import from_rpc_error

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

AREAS = sorted(path.stem for path in Path(__file__).with_name("hostile").glob("*.yaml"))
HANGS_S = 30.0
AT_ONCE = 16
CONFIG = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 5, "token_dim": 64}
ENTRY = {"dtype": "F32", "shape": [5, 64], "data_offsets": [0, 1280]}
ONE = "0000803f"
DEFECTS = {"INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", "DEADLINE_EXCEEDED"}
TELLTALES = ("Traceback", "Error:", "site-packages", "softprompt_", "sp:{")
UNLIMITED = [("grpc.max_send_message_length", -1)]

Row = dict[str, Any]
BytesOf = Callable[[Any], bytes]


def rows_of(area: str, values: dict[str, str]) -> Iterator[Row]:
    """The rows of an area; `$NAME` stands for the value of that name."""
    listed = yaml.safe_load(Path(__file__).with_name("hostile").joinpath(f"{area}.yaml").read_text("utf-8"))
    for row in _filled(listed, values):
        each = row.pop("each", None)
        yield from [row] if each is None else _expanded(row, each)


def _filled(value: Any, values: dict[str, str]) -> Any:
    """The same with `$NAME` replaced in every text."""
    match value:
        case str():
            for name, text in values.items():
                value = value.replace(f"${name}", text)
            return value
        case list():
            return [_filled(one, values) for one in value]
        case dict():
            return {_filled(key, values): _filled(one, values) for key, one in value.items()}
        case _:
            return value


def _expanded(row: Row, each: dict[str, list[Any]]) -> Iterator[Row]:
    for field, listed in each.items():
        for number, value in enumerate(listed):
            told = {}
            if isinstance(value, dict) and value.keys() == {"is", "tells"}:
                value, told = value["is"], {"tells": value["tells"]}
            named = row | told | {"name": f"{row['name']}: {field}={value!a:.60}"}
            # Errors name the fields of `sampling` as HTTP has them.
            told_place = field.removeprefix("sampling.")
            one = _filled(copy.deepcopy(named), {"number": str(number), "place": told_place})
            if f"${field}" in str(row):
                one = _filled(one, {field: value})
            else:
                place = next(one[kind] for kind in ("json", "message", "register") if kind in one)
                *path, last = field.split(".")
                for name in path:
                    place = place.setdefault(name, {})
                place[last] = value
            yield one


def _any_of(expected: Any) -> list[Any]:
    return expected if isinstance(expected, list) else [expected]


def _is_told(row: Row, field: str | None, message: str) -> bool:
    """Whether an error names the row's field, or what is in it, and says what the row tells."""
    fields = _any_of(row.get("field", []))
    is_named = not fields or any(re.match(rf"{re.escape(each)}(?![^.\[])", field or "") for each in fields)
    return is_named and row.get("tells", "") in message


class Attacker:
    """Sends rows, and says what is wrong with their answers."""

    def __init__(self, system: Any, headers: dict[str, str], bytes_of: BytesOf) -> None:
        ports = {"registry": system.registry, "inference": system.inference, "gateway": f"127.0.0.1:{system.port}"}
        self._addresses = {name: address.rpartition(":")[::2] for name, address in ports.items()}
        self._bytes_of = bytes_of
        self._http = httpx.AsyncClient(base_url=system.url, headers=headers, timeout=HANGS_S)
        channels = {"InferenceService": system.inference, "RegistryService": system.registry}
        self._channels = {
            name: grpc.aio.insecure_channel(address, options=UNLIMITED) for name, address in channels.items()
        }
        self._channels["KeyService"] = self._channels["RegistryService"]
        self._places = asyncio.Semaphore(AT_ONCE)

    async def close(self) -> None:
        await self._http.aclose()
        for channel in set(self._channels.values()):
            await channel.close()

    async def complaint(self, row: Row) -> str:
        """What is wrong with the answer to a row; "": nothing."""
        async with self._places:
            try:
                async with asyncio.timeout(HANGS_S):
                    return await self._complaint(row)
            except TimeoutError:
                return "it hangs"

    async def _complaint(self, row: Row) -> str:
        if "send" in row:
            return self._judge_bytes(row, await self._send(row))
        if "call" in row:
            return await self._judge_call(row, self._call(row))
        if "register" in row:
            over_grpc = await self._judge_call(row, self._register(row["register"]))
            if over_grpc or row.get("over") == "grpc":
                return over_grpc
            status = 201 if "accepted" in row else [400, 413, 422]
            over_http = self._judge(row | {"status": status}, await self._post(row))
            return over_http or await self._use(row)
        method = next(name for name in ("get", "post", "put") if name in row)
        content = json.dumps(row["json"]).encode() if "json" in row else self._bytes_of(row.get("raw", ""))
        headers = {"content-type": "application/json"}
        return self._judge(row, await self._http.request(method, row[method], content=content, headers=headers))

    async def _use(self, row: Row) -> str:
        """What is wrong with the answer of what was registered, where the row says what that is."""
        if "use" not in row:
            return ""
        body = {"model": row["use"]["model"], "prompt": "x", "max_tokens": 4}
        return self._judge(row["use"], await self._http.post("/v1/completions", json=body))

    def _judge(self, row: Row, answer: httpx.Response) -> str:
        told = f"{answer.status_code} {answer.text[:300]}"
        if answer.status_code not in _any_of(row["status"]):
            return told
        if answer.is_success:
            return ""
        error = answer.json()["error"]
        if set(error) != {"message", "type", "param", "code"} or error["type"] != "invalid_request_error":
            return told
        if "code" in row and error["code"] not in _any_of(row["code"]):
            return told
        if not _is_told(row, error["param"], error["message"]):
            return f"{told} (at {error['param']})"
        is_plain = error["message"] and len(error["message"]) < 1000 and not any(x in told for x in TELLTALES)
        return "" if is_plain else told

    async def _send(self, row: Row) -> bytes:
        """What comes back to bytes on a socket, until it ends."""
        reader, writer = await asyncio.open_connection(*self._addresses[row.get("to", "gateway")])
        trickling = None
        try:
            writer.write(self._bytes_of(row["send"]))
            if row.get("end"):
                writer.write_eof()
            if "trickle" in row:
                trickling = asyncio.create_task(_trickle(writer, row["trickle"].encode()))
            received = b""
            # A port that did not understand may reset the connection.
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    received += data
            return received
        finally:
            if trickling is not None:
                trickling.cancel()
            writer.transport.abort()

    def _judge_bytes(self, row: Row, received: bytes) -> str:
        told = received[:300].decode(errors="replace")
        if row["status"] == "closed":
            return told if b"HTTP/1.1" in received else ""
        head, _, body = received.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 "):
            return f"no answer: {told!r}"
        if "hides" in row and row["hides"].encode() in received:
            return f"it tells {row['hides']}"
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = httpx.Headers([tuple(line.split(": ", 1)) for line in lines])
        body = body[: int(headers.get("content-length", len(body)))]
        return self._judge(row, httpx.Response(int(first.split()[1]), content=body))

    async def _judge_call(self, row: Row, call: Any) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as failed:
            error = from_rpc_error(failed)
            code, told = failed.code().name, f"{failed.code().name} {error.reason} {error.message[:300]}"
            if "status" in row:
                return "" if code == row["status"] else told
            has_reason = any(key == "grpc-status-details-bin" for key, _ in failed.trailing_metadata() or ())
            is_plain = has_reason and code not in DEFECTS and not any(x in told for x in TELLTALES)
            is_right = error.reason in _any_of(row.get("reason")) and _is_told(row, error.field, error.message)
            return "" if is_plain and is_right else f"{told} (at {error.field})"
        return "" if "accepted" in row else "it was taken"

    async def _call(self, row: Row) -> None:
        service, _, name = row["call"].partition(".")
        module = pb if service == "InferenceService" else reg
        descriptor = module.DESCRIPTOR.services_by_name[service]
        method = descriptor.methods_by_name.get(name)
        if "raw" in row:
            request = self._bytes_of(row["raw"])
        else:
            message = ParseDict(row["message"], GetMessageClass(method.input_type)())
            for field, pieces in row.get("fields", {}).items():
                setattr(message, field, self._bytes_of(pieces).decode())
            request = message.SerializeToString()
        ways = (method is not None and method.client_streaming, method is not None and method.server_streaming)
        kind = "_".join("stream" if streams else "unary" for streams in ways)
        call = getattr(self._channels[service], kind)(f"/{descriptor.full_name}/{name}")
        answer = call(iter([request]) if ways[0] else request)
        if ways[1]:
            async for _ in answer:
                pass
        else:
            await answer

    def _tensors(self, adapter: Row) -> bytes:
        if "tensors" in adapter:
            return self._bytes_of(adapter["tensors"])
        header = json.dumps({"prompt_embeddings": adapter.get("entry", ENTRY)}).encode()
        return struct.pack("<Q", len(header)) + header + bytes.fromhex(adapter.get("value", ONE)) * 320

    def _text(self, adapter: Row, field: str, default: str) -> str:
        value = adapter.get(field, default)
        return value if isinstance(value, str) else self._bytes_of(value).decode()

    def _config(self, adapter: Row) -> str:
        return self._text(adapter, "config_json", json.dumps(CONFIG | adapter.get("config", {})))

    async def _register(self, adapter: Row) -> None:
        data = self._tensors(adapter)
        header = reg.RegisterAdapterHeader(
            name=self._text(adapter, "name", "bad"),
            config_json=self._config(adapter),
            tensors_size_bytes=adapter.get("tensors_size_bytes", len(data)),
            tensors_sha256=adapter.get("tensors_sha256", hashlib.sha256(data).hexdigest()),
            idempotency_key=adapter.get("idempotency_key", ""),
        )
        requests = [reg.RegisterAdapterRequest(header=header)]
        for start in range(0, len(data), CHUNK_BYTES):
            chunk = reg.Chunk(offset=start, data=data[start : start + CHUNK_BYTES])
            requests.append(reg.RegisterAdapterRequest(chunk=chunk))
        service = reg.DESCRIPTOR.services_by_name["RegistryService"].full_name
        call = self._channels["RegistryService"].stream_unary(f"/{service}/RegisterAdapter")
        await call(iter([request.SerializeToString() for request in requests]))

    async def _post(self, row: Row) -> httpx.Response:
        """A registration over HTTP: as a raw upload, or in JSON where a header could not say it."""
        adapter = row["register"]
        data, name = self._tensors(adapter), self._text(adapter, "name", "bad")
        sha256 = adapter.get("tensors_sha256", hashlib.sha256(data).hexdigest())
        if re.fullmatch("[a-z0-9-]+", name) and "idempotency_key" not in adapter:
            headers = {
                "content-type": "application/octet-stream",
                "x-adapter-config": base64.b64encode(self._config(adapter).encode()).decode(),
                "x-adapter-sha256": sha256,
            }
            return await self._http.post(f"/v1/adapters/{name}", content=data, headers=headers)
        body = {
            "name": name,
            "config": self._config(adapter),
            "tensors_base64": base64.b64encode(data).decode(),
            "sha256": sha256,
            "idempotency_key": adapter.get("idempotency_key"),
        }
        return await self._http.post("/v1/adapters", json=body)

    async def forget(self, *names: str) -> None:
        """Delete adapters."""
        for name in names:
            await self._http.delete(f"/v1/adapters/{name}")


async def _trickle(writer: asyncio.StreamWriter, piece: bytes) -> None:
    while True:
        writer.write(piece)
        await asyncio.sleep(0.05)


class Trap:
    """A URL and a file that nobody has any business with."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "trap"
        os.mkfifo(self.file)
        self.num_visitors = 0
        self.url = ""

    @asynccontextmanager
    async def set(self) -> AsyncIterator["Trap"]:
        def visit(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.num_visitors += 1
            writer.close()

        async with await asyncio.start_server(visit, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/trap"
            yield self

    def is_untouched(self) -> bool:
        """Whether nobody came; who has opened the file for reading is still waiting for a writer."""
        try:
            os.close(os.open(self.file, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            return error.errno == errno.ENXIO and not self.num_visitors
        return False


CANARIES = (
    {"model": "first", "prompt": "The canary sings of", "temperature": 0},
    {"model": "tiny", "prompt": "A canary in a mine", "temperature": 1, "seed": 7},
)


async def sing(http: httpx.AsyncClient, canary: dict[str, Any]) -> tuple[str, list[int], Any, Any]:
    """What a canary's stream says: text, ids, why it ended, and what was counted."""
    body = canary | {"max_tokens": 100, "ignore_eos": True, "stream": True, "return_token_ids": True}
    body["stream_options"] = {"include_usage": True}
    text, ids, reason, usage = "", [], None, None
    async with http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]", lines[-1]
    for line in lines[:-1]:
        event = json.loads(line)
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            text += choice["text"]
            ids += choice.get("token_ids") or []
            reason = choice["finish_reason"] or reason
    return text, ids, reason, {key: usage[key] for key in ("prompt_tokens", "completion_tokens")}


@pytest.fixture(scope="module")
def songs() -> list[Any]:
    """What the canaries say alone, once that was heard."""
    return []


@asynccontextmanager
async def canaries(system: Any, headers: dict[str, str], songs: list[Any]) -> AsyncIterator[None]:
    """Streams that are asked for again and again, and must always say what they say alone."""
    stop = asyncio.Event()
    async with httpx.AsyncClient(base_url=system.url, headers=headers, timeout=120) as http:
        if not songs:
            songs += [await sing(http, canary) for canary in CANARIES]

        async def watch(canary: dict[str, Any], expected: Any) -> None:
            assert await sing(http, canary) == expected
            while not stop.is_set():
                assert await sing(http, canary) == expected

        async with asyncio.TaskGroup() as group:
            for canary, expected in zip(CANARIES, songs, strict=True):
                group.create_task(watch(canary, expected))
            yield
            stop.set()


async def digest_of_first(system: Any, headers: dict[str, str]) -> str:
    async with httpx.AsyncClient(base_url=system.url, headers=headers, timeout=HANGS_S) as http:
        return str((await http.get("/v1/adapters/first")).json()["digest"])


@pytest.mark.parametrize(
    ("areas", "times"),
    [
        *(pytest.param([area], 1, id=area) for area in AREAS),
        pytest.param(AREAS, 10, id="all", marks=pytest.mark.chaos),
    ],
)
async def test_bad_requests_are_refused_and_disturb_nobody(
    shared_system: Any, hostile_bytes: BytesOf, songs: list[Any], tmp_path: Path, areas: list[str], times: int
) -> None:
    headers = shared_system.make_key()
    before = shared_system.lasting_pids()
    async with Trap(tmp_path).set() as trap:
        key = headers["authorization"].removeprefix("Bearer ")
        values = {"KEY": f"authorization: Bearer {key}\r\n", "SECRET": key}
        values |= {"TRAP_URL": trap.url, "TRAP_FILE": str(trap.file)}
        values |= {"FIRST": await digest_of_first(shared_system, headers)}
        rows = [row for area in areas * times for row in rows_of(area, values)]
        random.Random(7).shuffle(rows)
        attacker = Attacker(shared_system, headers, hostile_bytes)
        async with canaries(shared_system, headers, songs):
            complaints = await asyncio.gather(*map(attacker.complaint, rows))
        await attacker.forget(*{row["register"]["name"] for row in rows if "accepted" in row})
        await attacker.close()
        assert trap.is_untouched()
    wrong = {row["name"]: told for row, told in zip(rows, complaints, strict=True) if told}
    assert wrong == {}
    assert len(rows) > 10
    assert shared_system.lasting_pids() == before, "something was started again"
    await asyncio.to_thread(shared_system.wait_until_idle)


OPEN = {"/health/live", "/health/ready", "/health", "/version"}


def test_every_route_asks_for_a_key(shared_system: Any) -> None:
    with httpx.Client(base_url=shared_system.url) as http:
        paths = http.get("/openapi.json").json()["paths"]
        routes = [(method, path) for path, methods in paths.items() for method in methods if path not in OPEN]
        answers = {
            route: http.request(route[0].upper(), re.sub(r"\{\w+\}", "first", route[1])).status_code
            for route in routes
        }
    assert len(answers) > 15
    assert {route: status for route, status in answers.items() if status != 401} == {}
