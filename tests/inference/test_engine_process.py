"""The engine in its own process: commands in order, outputs to their owners, an end that everybody notices."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from softprompt_api.errors import Unavailable
from softprompt_api.params import SamplingParams
from softprompt_inference.engine import client as client_module
from softprompt_inference.engine.client import EngineClient, EngineStartError, OutputStream
from softprompt_inference.engine.codec import (
    HEADER,
    Message,
    Progress,
    StartupFailed,
    contents_of,
    decode,
    encode,
)
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.files import MemoryFile
from softprompt_inference.engine.messages import (
    Abort,
    AbortSearch,
    AddRequest,
    Command,
    DropAdapter,
    FindNearest,
    Finish,
    LoadAdapter,
    LoadLora,
    Logprobs,
    LoraModule,
    Nearest,
    NearRow,
    Output,
    Ping,
    SoftPromptPart,
    Stats,
    StepResult,
    TextPart,
)
from softprompt_inference.engine.process import Connection, serve

CONFIG = EngineConfig(model_path="", max_num_sequences=8, max_step_tokens=16)


@contextmanager
def serving(load: Callable[..., object], *prepare: Callable[..., None]) -> Iterator[Connection]:
    """The front's end of a `serve` in a thread."""
    (ours, theirs), (to_files, from_files) = socket.socketpair(), socket.socketpair()
    thread = threading.Thread(target=serve, args=(theirs, from_files, load, *prepare))
    thread.start()
    try:
        with ours, to_files:
            yield Connection(ours, to_files)
    finally:
        thread.join(timeout=10)
        theirs.close()
        from_files.close()
    assert not thread.is_alive()


def receive_until(connection: Connection, wanted: type | None = None, *, last_of: str = "") -> list[Message]:
    """Messages up to one of a type, or up to the last output of a request."""
    messages: list[Message] = []
    while True:
        messages += connection.receive(wait=True)
        for message in messages:
            outputs = message.outputs if isinstance(message, StepResult) else ()
            if wanted and isinstance(message, wanted):
                return messages
            if any(output.request_id == last_of and output.finish for output in outputs):
                return messages


KEY_VALUES = LoadAdapter(
    digest="sha256:k",
    rows=bytes(range(64)),
    dtype="float32",
    num_virtual_tokens=2,
    row_size=8,
    are_key_values=True,
)


@pytest.mark.parametrize(
    "message",
    [
        CONFIG.preparation(),
        CONFIG,
        AddRequest(
            request_id="0",
            prompt=[SoftPromptPart(digest="sha256:a"), TextPart(token_ids=[1, 2]), TextPart(token_ids=[])],
            params=SamplingParams(stop=["x"], stop_token_ids=[3], logit_bias={4: -1.5}, seed=-(2**63), logprobs=2),
            eos_token_ids=[7],
            seed=2**63 - 1,
            salt="tenant",
            lora="sha256:b",
            all_logprobs=True,
        ),
        Abort(request_id="0"),
        LoadAdapter(digest="sha256:a", rows=bytes(range(256)), dtype="float32", num_virtual_tokens=4, row_size=16),
        KEY_VALUES,
        LoadLora(
            digest="sha256:b",
            modules=[LoraModule(name="layers.0.q", rank=2, scale=0.5, a=bytes(range(9)), b=bytes(range(7)))],
            dtype="bfloat16",
        ),
        DropAdapter(digest="sha256:a"),
        FindNearest(search_id=3, digest="sha256:a", top_k=2),
        AbortSearch(search_id=3),
        Ping(),
        Progress(text="loading"),
        StartupFailed(message="no such model"),
        StepResult(
            outputs=[
                Output(
                    request_id="0", token_id=5, logprobs=Logprobs(chosen=-0.5, top=[(5, -0.5)], every=b"\xff\0")
                ),
                Output(request_id="1", finish=Finish.ERROR, error_reason="INTERNAL", error_message="broke"),
            ],
            stats=Stats(running=2, generated_tokens=9),
            found=[
                Nearest(search_id=3, rows=[NearRow(norm=1.5, tokens=[(5, 0.5)])]),
                Nearest(search_id=4, error_reason="INTERNAL"),
            ],
            failed_loads=["sha256:a"],
        ),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_survives_the_wire(message: Message) -> None:
    frame = encode(message)
    assert HEADER.unpack(frame[: HEADER.size])[0] == len(frame) - HEADER.size
    contents = memoryview(b"".join(contents_of(message)))
    assert decode(frame[HEADER.size :], lambda: contents) == message


def test_matrices_that_were_read_from_a_file_go_as_that_file() -> None:
    file = MemoryFile([b"head", bytes(range(16)), b"tail"])
    whole = file.read()
    module = LoraModule(name="layers.0.q", rank=2, scale=0.5, a=whole[12:20], b=whole[4:12])
    message = LoadLora(digest="sha256:b", modules=[module], dtype="bfloat16", file=file)
    assert contents_of(message) is file
    assert decode(encode(message)[HEADER.size :], lambda: whole) == message


def test_keys_and_values_that_were_read_from_a_file_go_as_that_file() -> None:
    file = MemoryFile([b"head", KEY_VALUES.rows, b"tail"])
    message = replace(KEY_VALUES, rows=file.read()[4:68], file=file)
    assert contents_of(message) is file
    assert decode(encode(message)[HEADER.size :], file.read) == KEY_VALUES


def test_keys_and_values_go_beside_their_frame_and_none_have_nothing_there() -> None:
    assert b"".join(contents_of(KEY_VALUES)) == KEY_VALUES.rows
    assert bytes(KEY_VALUES.rows) not in encode(KEY_VALUES)
    with pytest.raises(msgspec.DecodeError, match="64 bytes at 0 of an adapter that came with 63"):
        decode(encode(KEY_VALUES)[HEADER.size :], lambda: memoryview(bytes(63)))
    empty = replace(KEY_VALUES, rows=b"")
    assert contents_of(empty) == ()
    assert decode(encode(empty)[HEADER.size :]) == empty


@pytest.mark.parametrize("size", [0, 8, 23])
def test_matrices_that_are_not_in_what_came_are_refused(size: int) -> None:
    module = LoraModule(name="layers.0.q", rank=2, scale=0.5, a=bytes(8), b=bytes(4))
    frame = encode(LoadLora(digest="sha256:b", modules=[module, module], dtype="bfloat16"))
    assert len(frame) < 200
    with pytest.raises(msgspec.DecodeError, match=f"of an adapter that came with {size}"):
        decode(frame[HEADER.size :], lambda: memoryview(bytes(size)))
    with pytest.raises(msgspec.DecodeError, match="nothing came beside"):
        decode(frame[HEADER.size :])


@pytest.mark.parametrize("place", [[0, -8], [-8, 8]])
def test_places_below_zero_are_refused(place: list[int]) -> None:
    module = LoraModule(name="layers.0.q", rank=2, scale=0.5, a=bytes(8), b=bytes(4))
    body = encode(LoadLora(digest="sha256:b", modules=[module], dtype="bfloat16"))[HEADER.size :]
    below_zero = body.replace(msgspec.msgpack.encode({"a": [0, 8]})[1:], msgspec.msgpack.encode({"a": place})[1:])
    assert below_zero != body
    with pytest.raises(msgspec.DecodeError, match="of an adapter that came with 16"):
        decode(below_zero, lambda: memoryview(bytes(16)))


@pytest.mark.parametrize(
    "body",
    [b"", b"\xc1", msgspec.msgpack.encode(["unknown", {}]), msgspec.msgpack.encode(["abort", {"request_id": 1}])],
)
def test_a_frame_that_is_no_message_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        decode(body)


def test_messages_may_arrive_in_any_pieces() -> None:
    (ours, theirs), (to_files, from_files) = socket.socketpair(), socket.socketpair()
    with ours, theirs, to_files, from_files:
        connection = Connection(theirs, from_files)
        frames = b"".join(encode(Abort(request_id=str(index))) for index in range(3))
        assert connection.receive(wait=False) == []
        ours.sendall(frames[:5])
        assert connection.receive(wait=False) == []
        ours.sendall(frames[5:-1])
        assert connection.receive(wait=True) == [Abort(request_id="0"), Abort(request_id="1")]
        ours.sendall(frames[-1:])
        assert connection.receive(wait=True) == [Abort(request_id="2")]
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            connection.receive(wait=False)


def test_serve_tells_progress_and_the_model_and_then_answers_every_step(fakes) -> None:
    runner = fakes.runner()
    adapter = fakes.adapter("a", 5)
    request = fakes.request("0", "a", [1, 2, 3])

    def load(config: EngineConfig, report: Callable[[str], None]) -> object:
        assert config == CONFIG
        report("loading weights")
        return runner

    with serving(load) as connection:
        connection.send(CONFIG)
        messages = receive_until(connection, type(runner.info))
        assert messages == [Progress(text="loading weights"), runner.info]
        connection.send(adapter)
        connection.send(request)
        answers = receive_until(connection, last_of="0")
    outputs = [output for answer in answers if isinstance(answer, StepResult) for output in answer.outputs]
    assert [output.token_id for output in outputs] == fakes.solo(request, [adapter])


def test_what_can_be_prepared_is_before_the_model_is_known(fakes) -> None:
    runner = fakes.runner()
    with serving(lambda *_: runner, lambda wanted, report: report(f"preparing for {wanted.device}")) as connection:
        connection.send(CONFIG.preparation())
        assert receive_until(connection, Progress) == [Progress(text="preparing for auto")]
        connection.send(CONFIG)
        assert receive_until(connection, type(runner.info)) == [runner.info]
        connection.send(Ping())
        receive_until(connection, StepResult)
    with serving(lambda *_: runner, lambda *_: None) as connection:  # both at once
        connection._stream.sendall(encode(CONFIG.preparation()) + encode(CONFIG))
        assert receive_until(connection, type(runner.info)) == [runner.info]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("the model has no attention interface"), "the model has no attention interface"),
        (KeyError("embed"), "KeyError: 'embed'"),
    ],
)
def test_a_model_that_cannot_be_loaded_is_told_in_words(error: Exception, message: str) -> None:
    def load(config: EngineConfig, report: Callable[[str], None]) -> object:
        raise error

    with serving(load) as connection:
        connection.send(CONFIG)
        assert receive_until(connection, StartupFailed) == [StartupFailed(message=message)]


def test_a_cache_that_is_too_small_is_told_in_words(fakes) -> None:
    with serving(lambda *_: fakes.runner(num_pages=1)) as connection:
        connection.send(CONFIG)
        [failed] = receive_until(connection, StartupFailed)
    assert "less than one sequence of max_model_len, 32" in failed.message


def test_serve_ends_when_the_front_closes_in_the_middle_of_a_request(fakes) -> None:
    runner = fakes.runner(num_pages=5000, max_model_len=20000)
    with serving(lambda *_: runner) as connection:
        connection.send(CONFIG)
        receive_until(connection, type(runner.info))
        connection.send(fakes.request("0", [1], max_tokens=19000))
        receive_until(connection, StepResult)


def test_serve_ends_when_the_front_closes_while_loading() -> None:
    closed = threading.Event()

    def load(config: EngineConfig, report: Callable[[str], None]) -> object:
        closed.wait(10)
        report("nobody listens")
        report("nobody listens")
        raise AssertionError("the report should have failed")

    with serving(load) as connection:
        connection.send(CONFIG)
        connection._stream.close()
        closed.set()


MODEL_VOCAB_SIZE = 1024


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny random Llama."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=MODEL_VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def ignore(_: str) -> None:
    """Report to nobody."""


@pytest.fixture(scope="module")
def config(model_path: str) -> EngineConfig:
    return EngineConfig(
        model_path=model_path,
        device="cpu",
        dtype="float32",
        kv_cache_bytes=2**20,
        max_step_tokens=32,
        num_threads=1,
    )


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client(config: EngineConfig) -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(config, ignore)
    yield client
    await client.stop()


@pytest.fixture
def fixed_steps(with_benchmarks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that compute nothing, in processes that start and end like any other's."""
    monkeypatch.setattr("softprompt_inference.engine.client.ENGINE_MODULE", "benchmarks.stub.engine")
    monkeypatch.setenv("PYTHONPATH", with_benchmarks["PYTHONPATH"])


def greedy(
    request_id: str, *, max_tokens: int, prompt: list[TextPart | SoftPromptPart] | None = None
) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        prompt=prompt or [TextPart(token_ids=[1, 2, 3])],
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True),
    )


async def arrivals(stream: OutputStream) -> AsyncIterator[list[Output]]:
    """What a stream holds, and then what arrives, until its last output."""
    arrived = asyncio.Event()
    stream.follow(arrived.set)
    outputs: list[Output] = []
    while not outputs or outputs[-1].finish is None:
        if outputs := stream.take(1000):
            yield outputs
        else:
            await arrived.wait()
            arrived.clear()


async def collect(stream: OutputStream) -> list[Output]:
    return [output async for outputs in arrivals(stream) for output in outputs]


async def test_a_client_reports_progress_and_knows_the_model(config: EngineConfig) -> None:
    reported: list[str] = []
    client = await EngineClient.start(config, reported.append)
    assert reported[0] == "importing torch"
    assert (client.info.vocab_size, client.info.hidden_size, client.info.device) == (MODEL_VOCAB_SIZE, 32, "cpu")
    await client.stop()
    assert await client.dead == "the engine was stopped"
    await client.stop()
    with pytest.raises(Unavailable):
        client.submit(Abort(request_id="0"))


@pytest.mark.asyncio(loop_scope="module")
async def test_requests_at_once_get_what_they_get_alone(client: EngineClient) -> None:
    rows = bytes(4 * 3 * 32)
    client.submit(LoadAdapter(digest="sha256:a", rows=rows, dtype="float32", num_virtual_tokens=3, row_size=32))
    prompts: list[list[TextPart | SoftPromptPart]] = [
        [TextPart(token_ids=[1, 2, 3])],
        [SoftPromptPart(digest="sha256:a"), TextPart(token_ids=[1, 2, 3])],
        [TextPart(token_ids=list(range(60)))],
    ]
    alone = []
    for prompt in prompts:
        client.submit(greedy("alone", max_tokens=12, prompt=prompt))
        alone.append([output.token_id for output in await collect(client.outputs("alone"))])
    for index, prompt in enumerate(prompts):
        client.submit(greedy(str(index), max_tokens=12, prompt=prompt))
    together = await asyncio.gather(*(collect(client.outputs(str(index))) for index in range(3)))
    assert [[output.token_id for output in outputs] for outputs in together] == alone
    assert alone[0] != alone[1]
    assert all(outputs[-1].finish is Finish.LENGTH for outputs in together)
    assert client.stats.generated_tokens >= 60
    assert client.stats.resident_adapters == 1


@pytest.mark.asyncio(loop_scope="module")
async def test_a_finished_request_is_no_longer_open(client: EngineClient) -> None:
    client.submit(greedy("0", max_tokens=2))
    stream = client.outputs("0")
    assert len(await collect(stream)) == 2
    assert stream.take(1000) == []
    with pytest.raises(KeyError):
        client.outputs("0")


@pytest.mark.asyncio(loop_scope="module")
async def test_outputs_that_arrive_while_nobody_looks_come_at_once(client: EngineClient) -> None:
    client.submit(greedy("0", max_tokens=5))
    client.submit(greedy("1", max_tokens=20))
    await collect(client.outputs("1"))
    stream = client.outputs("0")
    assert [len(stream.take(most)) for most in (2, 1000)] == [2, 3]
    with pytest.raises(KeyError):
        client.outputs("0")


@pytest.mark.asyncio(loop_scope="module")
async def test_an_answer_that_waits_for_its_reader_alone_is_held_up_by_nobody(client: EngineClient) -> None:
    stats = []
    client.follow_stats(lambda: stats.append(client.stats))
    client.submit(greedy("0", max_tokens=2))
    assert client.steps.are_held_up()
    client.submit(greedy("1", max_tokens=9))
    await collect(client.outputs("1"))
    assert not client.steps.are_held_up()
    assert [one.finish for one in client.outputs("0").take(1000)][:1] == [None]
    assert len(stats) >= 9
    assert stats[-1] == client.stats


@pytest.mark.asyncio(loop_scope="module")
async def test_an_open_request_id_cannot_be_submitted_again(client: EngineClient) -> None:
    client.submit(greedy("0", max_tokens=50))
    with client.outputs("0"), pytest.raises(ValueError, match="open already"):
        client.submit(greedy("0", max_tokens=50))


@pytest.mark.asyncio(loop_scope="module")
async def test_leaving_a_stream_aborts_its_request_and_frees_its_pages(client: EngineClient) -> None:
    before = client.stats.generated_tokens
    client.submit(greedy("0", max_tokens=400))
    with client.outputs("0") as stream:
        await anext(arrivals(stream))
    client.submit(greedy("1", max_tokens=1))
    await collect(client.outputs("1"))
    assert (client.stats.running, client.stats.used_pages) == (0, 0)
    assert client.stats.generated_tokens - before < 400


@pytest.mark.asyncio(loop_scope="module")
async def test_leaving_a_search_takes_it_back(client: EngineClient, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Command] = []
    was_sent = asyncio.Event()

    def send(command: Command) -> None:
        sent.append(command)
        was_sent.set()

    monkeypatch.setattr(client._pipe, "send", send)
    searching = asyncio.create_task(client.find_nearest("sha256:a", 1))
    await was_sent.wait()
    searching.cancel()
    await asyncio.gather(searching, return_exceptions=True)
    [asked, taken_back] = sent
    assert isinstance(asked, FindNearest)
    assert taken_back == AbortSearch(search_id=asked.search_id)


@pytest.mark.asyncio(loop_scope="module")
async def test_of_answers_that_nobody_takes_the_largest_is_broken_off(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_MAX_HELD", 100)
    sent: list[Command] = []
    monkeypatch.setattr(client._pipe, "send", sent.append)
    for request_id in ("1-0", "2-0", "2-1", "3-0"):
        client.submit(greedy(request_id, max_tokens=400))
    small, first, second, read = (client.outputs(request_id) for request_id in ("1-0", "2-0", "2-1", "3-0"))
    taken: list[Output] = []
    read.follow(lambda: taken.extend(read.take(1)))
    logprobs = Logprobs(chosen=-1.0, top=[(token_id, -1.0) for token_id in range(9)])

    def step(*request_ids: str) -> None:
        outputs = [Output(request_id=request_id, token_id=1, logprobs=logprobs) for request_id in request_ids]
        client._deliver(StepResult(outputs=outputs, stats=client.stats))

    for _ in range(20):
        step("3-0")  # who reads can have any number
    for _ in range(4):
        step("1-0")
    for _ in range(3):
        step("2-0", "2-1")
    assert len(first.take(1)) == len(second.take(1)) == 1
    step("2-0")
    assert client._num_held == 90
    step("2-0", "2-1")
    assert sent[4:] == [Abort(request_id="2-0"), Abort(request_id="2-1")]
    for stream in (first, second):
        [error] = stream.take(1000)
        assert (error.finish, error.error_reason) == (Finish.ERROR, "OVERLOADED")
    assert (len(taken), len(small.take(1000)), client._num_held) == (20, 4, 0)
    for stream in (small, read):
        stream.close()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_refused_request_gets_its_reason(client: EngineClient) -> None:
    client.submit(greedy("0", max_tokens=1, prompt=[TextPart(token_ids=[MODEL_VOCAB_SIZE])]))
    [output] = await collect(client.outputs("0"))
    assert (output.finish, output.error_reason) == (Finish.ERROR, "INVALID_ARGUMENT")


@pytest.mark.usefixtures("fixed_steps")
async def test_a_killed_engine_ends_every_open_request_as_unavailable(config: EngineConfig) -> None:
    client = await EngineClient.start(config, ignore)
    client.submit(greedy("0", max_tokens=400))
    client.submit(greedy("1", max_tokens=400))
    stream = client.outputs("0")
    await anext(arrivals(stream))
    os.kill(client.pid, signal.SIGKILL)
    for outputs in (await collect(stream), await collect(client.outputs("1"))):
        assert (outputs[-1].finish, outputs[-1].error_reason) == (Finish.ERROR, "UNAVAILABLE")
    assert await client.dead == "the engine was killed by signal 9"
    with pytest.raises(Unavailable):
        client.submit(greedy("2", max_tokens=1))
    await client.stop()


@pytest.mark.usefixtures("fixed_steps")
async def test_an_engine_that_says_nothing_though_it_is_asked_is_ended(config: EngineConfig) -> None:
    client = await EngineClient.start(config, ignore, silence_s=2.0)
    client.submit(greedy("0", max_tokens=400))
    stream = client.outputs("0")
    await anext(arrivals(stream))
    os.kill(client.pid, signal.SIGSTOP)
    outputs = await collect(stream)
    assert (outputs[-1].finish, outputs[-1].error_reason) == (Finish.ERROR, "UNAVAILABLE")
    assert await client.dead == "the engine said nothing for 2 s, and was ended"
    assert (client.stats.running, client.stats.used_pages) == (0, 0)
    assert client.stats.generated_tokens > 0
    await client.stop()


def test_an_engine_with_nothing_to_do_answers_when_it_is_asked(fakes) -> None:
    runner = fakes.runner()
    with serving(lambda *_: runner) as connection:
        connection.send(CONFIG)
        receive_until(connection, type(runner.info))
        for _ in range(3):
            connection.send(Ping())
            [answer] = receive_until(connection, StepResult)
            assert answer == StepResult(outputs=[], stats=Stats(num_pages=runner.info.num_pages))


@pytest.mark.asyncio(loop_scope="module")
async def test_signals_meant_for_the_front_do_not_end_the_engine(client: EngineClient) -> None:
    os.kill(client.pid, signal.SIGINT)
    os.kill(client.pid, signal.SIGTERM)
    client.submit(greedy("0", max_tokens=2))
    assert len(await collect(client.outputs("0"))) == 2


async def test_a_model_that_is_not_there_fails_the_start_in_words(tmp_path: Path) -> None:
    with pytest.raises(EngineStartError) as failure:
        await EngineClient.start(EngineConfig(model_path=str(tmp_path / "none"), device="cpu"), ignore)
    assert "Traceback" not in str(failure.value)


async def test_a_process_prepares_before_it_is_known_what_it_loads(config: EngineConfig) -> None:
    said = asyncio.Event()
    known: asyncio.Future[Path] = asyncio.get_running_loop().create_future()
    unknown = replace(config, model_path="")
    start = asyncio.create_task(EngineClient.start(unknown, lambda _: said.set(), model_path=known))
    await said.wait()
    known.set_result(Path(config.model_path))
    client = await start
    assert client.info.vocab_size == MODEL_VOCAB_SIZE
    await client.stop()


async def test_where_nothing_can_be_loaded_no_process_is_left(config: EngineConfig) -> None:
    before = _children()

    async def not_found() -> Path:
        raise FileNotFoundError("no such model")

    with pytest.raises(FileNotFoundError, match="no such model"):
        await EngineClient.start(config, ignore, model_path=not_found())
    assert not _children() - before


async def test_a_cancelled_start_leaves_no_process(config: EngineConfig) -> None:
    before = _children()
    said = asyncio.Event()
    start = asyncio.create_task(EngineClient.start(config, lambda _: said.set()))
    await said.wait()
    started = _children() - before
    assert len(started) == 1
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    assert not started & _children()


@pytest.mark.usefixtures("fixed_steps")
async def test_the_engine_dies_with_its_parent(config: EngineConfig) -> None:
    script = (
        "import asyncio, sys, msgspec\n"
        "from softprompt_inference.engine import client as client_module\n"
        "from softprompt_inference.engine.client import EngineClient\n"
        "from softprompt_inference.engine.config import EngineConfig\n"
        "client_module.ENGINE_MODULE = 'benchmarks.stub.engine'\n"
        "async def main():\n"
        "    config = msgspec.json.decode(sys.argv[1], type=EngineConfig)\n"
        "    client = await EngineClient.start(config, str)\n"
        "    print(client.pid, flush=True)\n"
        "    await client.dead\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, msgspec.json.encode(config).decode(), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    engine = os.pidfd_open(int(await parent.stdout.readline()))
    parent.kill()
    await parent.wait()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_reader(engine, ended.set)
    await asyncio.wait_for(ended.wait(), 10)
    asyncio.get_running_loop().remove_reader(engine)
    os.close(engine)


async def test_what_breaks_in_the_engine_is_logged_as_one_json_line(config: EngineConfig) -> None:
    (ours, theirs), (to_files, from_files) = socket.socketpair(), socket.socketpair()
    with ours, theirs, to_files, from_files:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "softprompt_inference.engine"),
            *("--fd", str(theirs.fileno()), "--files-fd", str(from_files.fileno())),
            pass_fds=[theirs.fileno(), from_files.fileno()],
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, "SOFTPROMPT_LOG_FORMAT": "json"},
        )
        # torch refuses this with an error that nobody has foreseen.
        ours.sendall(encode(replace(config, num_threads=-1)))
        _, stderr = await process.communicate()
    [line] = [line for line in stderr.decode().splitlines() if "could not start" in line]
    event = msgspec.json.decode(line)
    assert (event["level"], event["process"]) == ("error", "engine")
    assert event["exception"].startswith("Traceback")


def _children() -> set[int]:
    return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
