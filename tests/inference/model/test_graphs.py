"""Replayed decodes; on a CPU a replay runs what a graph would hold, over the same static buffers."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_api.params import SamplingParams
from softprompt_inference.engine.config import EngineConfig
from softprompt_inference.engine.engine import Engine
from softprompt_inference.engine.plan import Chunk, Sample, StepPlan
from softprompt_inference.model.attention import CallRecorder, StepBatch, attach, build_step_batch, detach
from softprompt_inference.model.graphs import DecodeGraphs, decode_buckets
from softprompt_inference.model.loader import LoadedModel
from softprompt_inference.model.lora import weights as lora_weights
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.lora.loras import Loras
from softprompt_inference.model.runner import ModelRunner
from softprompt_kernels.lora_tiles import LoraTiles
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

CPU = torch.device("cpu")
PAGE_SIZE, SCRATCH, VOCAB_SIZE = 4, 99, 11
GREEDY = SamplingParams(temperature=0.0, logprobs=0)


def eager(compute: Callable[[], None]) -> Callable[[], None]:
    return compute


def chunk(token_id: int, start: int, page_ids: list[int], *, sampled: bool = True) -> Chunk:
    sample = Sample(params=GREEDY, seed=0, index=0) if sampled else None
    return Chunk(token_ids=[token_id], start=start, page_ids=page_ids, sample=sample)


class Model:
    """Notes what it is asked to compute, and answers every token with logits of its own."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, StepBatch]] = []
        self.tiles: list[LoraTiles | None] = []

    def __call__(self, token_ids: Tensor, batch: StepBatch, tiles: LoraTiles | None) -> Tensor:
        self.tiles.append(tiles)
        copies = [tensor.clone() for tensor in (batch.slots, batch.page_table, batch.query_start)]
        noted = StepBatch(
            positions=batch.positions.clone(),
            slots=copies[0],
            page_table=copies[1],
            query_start=copies[2],
            context_lens=batch.context_lens.clone(),
            page_size=batch.page_size,
        )
        self.calls.append((token_ids.clone(), noted))
        return (token_ids * 1000 + batch.positions)[:, None].float().expand(-1, VOCAB_SIZE)


def make_graphs(model: Model, *, max_sequences: int = 20, max_pages: int = 5, max_loras: int = 0) -> DecodeGraphs:
    graphs = DecodeGraphs(
        model,
        max_sequences=max_sequences,
        max_pages=max_pages,
        page_size=PAGE_SIZE,
        scratch_page=SCRATCH,
        max_loras=max_loras,
        device=CPU,
        capture=eager,
    )
    model.calls.clear()
    return graphs


@pytest.mark.parametrize(
    ("max_sequences", "sizes"),
    [(1, (1,)), (3, (1, 2, 3)), (8, (1, 2, 4, 8)), (20, (1, 2, 4, 8, 16, 20)), (24, (1, 2, 4, 8, 16, 24))],
)
def test_buckets_grow_up_to_the_largest_batch(max_sequences: int, sizes: tuple[int, ...]) -> None:
    assert decode_buckets(max_sequences) == sizes


def test_the_largest_batch_is_captured_first() -> None:
    model, sizes = Model(), []

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        sizes.append(len(model.calls[-1][0]))
        return compute

    DecodeGraphs(model, max_sequences=20, max_pages=2, page_size=4, scratch_page=3, device=CPU, capture=capture)
    assert sizes == [20, 16, 8, 4, 2, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 16, 17, 20])
def test_a_step_takes_the_next_bucket_and_pads_it_with_the_scratch_page(count: int) -> None:
    model = Model()
    graphs = make_graphs(model)
    logits = graphs.run([chunk(3 + i, i, [50 + i] * 5) for i in range(count)])
    assert torch.equal(logits[:, 0], torch.tensor([1000.0 * (3 + i) + i for i in range(count)]))
    [(token_ids, batch)] = model.calls
    size = len(token_ids)
    assert size == min(bucket for bucket in decode_buckets(20) if bucket >= count)
    assert batch.query_start.tolist() == list(range(size + 1))
    padding = slice(count, size)
    assert token_ids[padding].tolist() == batch.positions[padding].tolist() == [0] * (size - count)
    assert batch.slots[padding].tolist() == [SCRATCH * PAGE_SIZE] * (size - count)
    assert batch.context_lens[padding].tolist() == [1] * (size - count)
    assert batch.page_table[padding, 0].tolist() == [SCRATCH] * (size - count)


def test_static_buffers_hold_what_an_eager_step_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences come, go, move up and get other pages, in batches of all sizes."""
    generator, model = random.Random(0), Model()
    graphs = make_graphs(model, max_sequences=12)
    sequences: list[tuple[int, list[int]]] = []
    for _ in range(300):
        sequences = [each for each in sequences if generator.random() < 0.9]
        while not sequences or (len(sequences) < 12 and generator.random() < 0.7):
            start = generator.randrange(19)
            sequences.append((start, [generator.randrange(90) for _ in range(5)]))
        sequences = [((start + 1) % 20, pages) for start, pages in sequences]
        graphs.run([chunk(5, start, pages) for start, pages in sequences])
        _, batch = model.calls.pop()
        expected = build_step_batch([(s, 1, pages) for s, pages in sequences], page_size=PAGE_SIZE, device=CPU)
        count = len(sequences)
        assert torch.equal(batch.positions[:count], expected.positions)
        assert torch.equal(batch.slots[:count], expected.slots)
        assert torch.equal(batch.context_lens[:count], expected.context_lens)
        assert batch.context_lens.dtype == batch.page_table.dtype == torch.int32
        for i, (start, pages) in enumerate(sequences):
            used = start // PAGE_SIZE + 1
            assert batch.page_table[i, :used].tolist() == pages[:used]
        assert (batch.page_table[count:, 0] == SCRATCH).all()


def test_page_tables_follow_lists_that_grow_move_up_and_come_back() -> None:
    """As the scheduler has them: a running sequence keeps its list, and one that was preempted gets another."""
    generator, model = random.Random(1), Model()
    graphs = make_graphs(model, max_sequences=12)
    running: list[tuple[int, list[int]]] = []
    waiting: list[int] = []
    for _ in range(600):
        running = [(start + 1, pages) for start, pages in running if start < 19]
        for leaving in [each for each in running if generator.random() < 0.05]:
            running.remove(leaving)
            waiting.append(leaving[0])
        while not running or (len(running) < 12 and generator.random() < 0.5):
            start = waiting.pop() if waiting and generator.random() < 0.5 else generator.randrange(19)
            running.append((start, [generator.randrange(90) for _ in range(start // PAGE_SIZE)]))
        for start, pages in running:
            missing = start // PAGE_SIZE + 1 - len(pages)
            pages += [generator.randrange(90) for _ in range(missing)]
        graphs.run([chunk(5, start, pages) for start, pages in running])
        _, batch = model.calls.pop()
        count = len(running)
        assert batch.slots[:count].tolist() == [
            pages[-1] * PAGE_SIZE + start % PAGE_SIZE for start, pages in running
        ]
        for row, (_, pages) in zip(batch.page_table.tolist(), running, strict=False):
            assert row[: len(pages)] == pages
        assert (batch.page_table[count:, 0] == SCRATCH).all()
        assert batch.slots[count:].tolist() == [SCRATCH * PAGE_SIZE] * (len(batch.slots) - count)


@pytest.mark.parametrize("count", [1, 3, 4, 7])
def test_token_ids_of_the_device_take_the_place_of_those_of_the_chunks(count: int) -> None:
    model = Model()
    graphs = make_graphs(model)
    chunks = [chunk(3, i, [50 + i] * 5) for i in range(count)]
    graphs.run(chunks, torch.arange(count) + 20)
    token_ids, batch = model.calls[-1]
    assert token_ids.tolist() == [*range(20, 20 + count), *[0] * (len(token_ids) - count)]
    assert batch.positions[:count].tolist() == list(range(count))
    graphs.run(chunks)
    assert model.calls[-1][0][:count].tolist() == [3] * count


def make_engine(lab: Any, path: Path, *, look_ahead: bool = False, **settings: Any) -> tuple[Engine, list[int]]:
    """An engine whose decodes are replayed, and the sizes of its replays as they happen."""
    runner: ModelRunner = lab.runner(path, **settings)
    replays: list[int] = []

    def capture(compute: Any) -> Callable[[], None]:
        def replay() -> None:
            replays.append(compute.args[0])
            compute()

        return replay

    runner.capture_decodes(max_sequences=7, max_model_len=runner.info.max_model_len, capture=capture)
    config = EngineConfig(model_path=str(path), device="cpu", max_num_sequences=7, look_ahead=look_ahead)
    return Engine(runner, config), replays


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt", "gpt_oss"])
def test_replayed_decodes_equal_peft(lab: Any, name: str, look_ahead: bool) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, "prompt_tuning", 20), None, lab.adapter(path, "prompt_tuning", 5)] * 3
    requests = lab.requests(adapters, length=14, max_tokens=20)
    engine, replays = make_engine(lab, path, look_ahead=look_ahead)
    outputs = lab.serve(engine, requests)
    lab.compare(path, requests, outputs).assert_equal()
    assert set(replays) >= {2, 7}


@pytest.mark.parametrize("look_ahead", [False, True])
def test_preempted_requests_are_replayed_rightly(lab: Any, llama: Path, look_ahead: bool) -> None:
    requests = lab.requests([lab.adapter(llama, "prompt_tuning", 20), None, None] * 2, max_tokens=30)
    engine, replays = make_engine(lab, llama, look_ahead=look_ahead, kv_cache_bytes=120 * 256, max_model_len=80)
    outputs = lab.serve(engine, requests)
    assert engine.step().stats.preemptions > 0
    lab.compare(llama, requests, outputs).assert_equal()
    assert replays


def test_padding_that_writes_to_a_page_in_use_is_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    construct = DecodeGraphs.__init__

    def on_page_zero(self: DecodeGraphs, compute: Any, **settings: Any) -> None:
        construct(self, compute, **{**settings, "scratch_page": 0})

    monkeypatch.setattr(DecodeGraphs, "__init__", on_page_zero)
    requests = lab.requests([None] * 3, length=14, max_tokens=20)
    engine, _ = make_engine(lab, llama)
    assert lab.compare(llama, requests, lab.serve(engine, requests)).problems


def test_what_is_no_plain_decode_is_not_replayed(lab: Any, llama: Path) -> None:
    runner: ModelRunner = lab.runner(llama)
    replays: list[None] = []
    runner.capture_decodes(
        max_sequences=2,
        max_model_len=64,
        capture=lambda compute: lambda: (replays.append(None), compute()),
    )
    adapter = lab.adapter(llama, "prompt_tuning", 5)
    runner.load_rows(1000, adapter.load)
    decode = chunk(5, 0, [0])
    list(runner.load_lora(0, lab.lora(llama).load))
    prompt = Chunk(token_ids=[5, 6], start=0, page_ids=[1], sample=decode.sample)
    for chunks in (
        [chunk(1000, 0, [0])],
        [prompt],
        [decode, prompt],
        [chunk(5, 0, [i]) for i in range(3)],
    ):
        assert len(runner.run(StepPlan(chunks=chunks))) == len(chunks)
    assert replays == []
    for plain in (decode, replace(decode, lora=0)):
        assert len(runner.run(StepPlan(chunks=[plain]))) == 1
    assert len(replays) == 2


@pytest.mark.parametrize("max_loras", [1, 3, 16])
def test_tiles_of_a_step_lie_in_buffers_that_stay_where_they_are(max_loras: int) -> None:
    generator, model = random.Random(0), Model()
    graphs = make_graphs(model, max_loras=max_loras)
    addresses: dict[int, tuple[int, int]] = {}
    for _ in range(100):
        slots = [generator.randrange(-1, max_loras) for _ in range(generator.randrange(1, 21))]
        graphs.run([replace(chunk(5, 0, [i]), lora=slot) for i, slot in enumerate(slots)])
        tiles, size = model.tiles[-1], len(model.calls[-1][0])
        expected = build_tiles(slots, CPU)
        if expected is None:
            assert tiles is None
            continue
        assert tiles is not None
        assert tiles.max_tokens == 16
        assert len(tiles.order) == size
        seen: dict[int, int] = {}
        for slot, first, count in tiles.tiles.tolist():
            assert count <= tiles.max_tokens
            seen |= dict.fromkeys(tiles.order[first : first + count].tolist(), slot)
        assert seen == {token: slot for token, slot in enumerate(slots) if slot >= 0}
        address = tiles.order.data_ptr(), tiles.tiles.data_ptr()
        assert addresses.setdefault(size, address) == address


def test_sizes_with_and_without_loras_are_captured_largest_first() -> None:
    model, captured = Model(), []

    def capture(compute: Callable[[], None]) -> Callable[[], None]:
        compute()
        captured.append((len(model.calls[-1][0]), model.tiles[-1] is not None))
        return compute

    DecodeGraphs(
        model,
        max_sequences=5,
        max_pages=2,
        page_size=4,
        scratch_page=3,
        max_loras=2,
        device=CPU,
        capture=capture,
    )
    assert captured == [(size, with_lora) for with_lora in (True, False) for size in (5, 4, 2, 1)]


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_replayed_decodes_with_loras_equal_peft(lab: Any, name: str, look_ahead: bool) -> None:
    path = lab.model(name)
    used = [lab.lora(path, seed=seed, rank=rank) for seed, rank in enumerate((1, 8, 16))]
    soft = lab.adapter(path, "prompt_tuning", 20)
    requests = [
        replace(request, lora=lora)
        for request, lora in zip(
            lab.requests([None, soft] * 4, max_tokens=20), [*used, None, used[0], None, *used[:2]], strict=True
        )
    ]
    engine, replays = make_engine(lab, path, look_ahead=look_ahead)
    outputs = lab.serve(engine, requests)
    lab.compare(path, requests, outputs).assert_equal()
    assert set(replays) >= {1, 7}


def test_a_replay_with_the_tiles_of_another_step_is_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [
        replace(request, lora=lab.lora(llama, seed=seed)) for seed, request in enumerate(lab.requests([None] * 3))
    ]
    engine, _ = make_engine(lab, llama)
    monkeypatch.setattr("softprompt_inference.model.graphs.TileBuffers.fill", lambda *_: None)
    assert lab.compare(llama, requests, lab.serve(engine, requests)).problems


def test_only_rows_with_a_sample_are_answered(lab: Any, llama: Path) -> None:
    runner: ModelRunner = lab.runner(llama)
    chunks = [chunk(5, 0, [0], sampled=False), chunk(6, 0, [1]), chunk(7, 0, [2])]
    expected = runner.run(StepPlan(chunks=chunks))
    runner.capture_decodes(max_sequences=4, max_model_len=64, capture=eager)
    actual = runner.run(StepPlan(chunks=chunks))
    assert [each.token_id for each in actual] == [each.token_id for each in expected]
    assert len(actual) == 2


def test_other_pages_end_what_was_captured(lab: Any, llama: Path) -> None:
    runner: ModelRunner = lab.runner(llama)
    replays: list[None] = []
    runner.capture_decodes(
        max_sequences=2,
        max_model_len=64,
        capture=lambda compute: lambda: (replays.append(None), compute()),
    )
    runner.allocate_pages(4)
    runner.run(StepPlan(chunks=[chunk(5, 0, [0])]))
    assert replays == []


def test_a_model_that_cannot_be_captured_is_served_all_the_same(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner: ModelRunner = lab.runner(llama)

    def refuse(_: object) -> Callable[[], None]:
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        runner.capture_decodes(max_sequences=2, max_model_len=64, capture=refuse)
    assert runner.run(StepPlan(chunks=[chunk(5, 0, [0])]))[0].error == ""


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a value from the device, or makes a shape of one."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten::equal")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        indices = [t for each in args if isinstance(each, list) for t in each if isinstance(t, Tensor)]
        assert not any(word in name for word in self.FORBIDDEN), name
        assert not ("index" in name and any(t.dtype == torch.bool for t in indices)), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen3", "gemma2", "gpt2", "phi3", "opt", "gpt_neox", "gpt_oss"]
)
def test_no_architecture_waits_for_the_device_in_a_decode(lab: Any, name: str) -> None:
    loaded = lab.runner(lab.model(name)).loaded
    for layer in loaded.layers:
        detach(layer.module)
        attach(layer.module, CallRecorder())  # in the place of the CPU's paged attention, which does wait
    with torch.inference_mode(), NoWaiting():
        embeddings = loaded.embedding(torch.tensor([3, 4, 5]))
        loaded.logits(embeddings, torch.tensor([7, 2, 0]), torch.arange(3))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoWaiting():
        torch.ones(1).item()


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "phi3"])
def test_no_linear_waits_for_the_device_in_a_decode_with_loras(
    lab: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two operations for each product, whatever the slots hold: what is captured serves LoRAs that come later."""
    loaded = lab.runner(lab.model(name), dtype="float32").loaded
    loras = Loras(loaded.model, loaded.linears, loaded.lora, max_loras=2, device=CPU, fixed_rank=8)
    for layer in loaded.layers:
        detach(layer.module)
        attach(layer.module, CallRecorder())
    calls: list[str] = []

    def shrink(x: Tensor, a: Tensor, scales: Tensor, ranks: Tensor, tiles: LoraTiles) -> Tensor:
        calls.append("shrink")
        return a.new_zeros(len(tiles.order), *a.shape[1:3])

    # In the place of the CPU's, which do wait.
    monkeypatch.setattr(lora_weights, "lora_shrink", shrink)
    monkeypatch.setattr(lora_weights, "lora_expand", lambda *_: calls.append("expand"))
    loaded.lora.tiles = build_tiles([1, -1, 0], CPU)
    with torch.inference_mode(), NoWaiting():
        embeddings = loaded.embedding(torch.tensor([3, 4, 5]))
        loaded.logits(embeddings, torch.tensor([7, 2, 0]), torch.arange(3))
    assert calls == ["shrink", "expand"] * len(loras.products)


REAL_SHAPES = {
    # SmolLM2-135M, and three layers of Llama-3.2-1B.
    "small": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "large": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 3, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}
# Largest difference of log-probabilities: rounding, in other orders of summation.
LOGPROB_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.05}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOGPROB_TOLERANCE)
@pytest.mark.parametrize("shape", REAL_SHAPES)
def test_graphs_answer_as_eager_steps_do_at_real_shapes(
    lab: Any, tmp_path: Path, shape: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(**REAL_SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path)
    runner: ModelRunner = lab.runner(
        tmp_path, device="cuda", dtype=dtype, kv_cache_bytes=2**30, max_num_sequences=20
    )
    calls: list[None] = []
    compute = LoadedModel.logits

    def count(self: LoadedModel, *inputs: Tensor) -> Tensor:
        calls.append(None)
        return compute(self, *inputs)

    monkeypatch.setattr(LoadedModel, "logits", count)

    def answers() -> list[float]:
        """Prompts of 2 … 300 tokens, then decodes in batches of every size."""
        chosen = []
        for size in (1, 2, 3, 7, 8, 13, 20):
            calls.clear()
            pages = [list(range(20 * i, 20 * (i + 1))) for i in range(size)]
            lengths = [2 + 298 * i // size for i in range(size)]
            for own, length in zip(pages, lengths, strict=True):
                ids = torch.arange(length).mul(7919).remainder(1000).tolist()
                runner.run(StepPlan(chunks=[Chunk(token_ids=ids, start=0, page_ids=own, sample=None)]))
            for step in range(3):
                plan = [
                    chunk(17 + i + step, length + step, own)
                    for i, (own, length) in enumerate(zip(pages, lengths, strict=True))
                ]
                for sampled in runner.run(StepPlan(chunks=plan)):
                    assert sampled.error == ""
                    assert sampled.logprobs is not None
                    chosen.append(sampled.logprobs.chosen)
            num_eager_decodes.append(len(calls) - size)
        return chosen

    num_eager_decodes: list[int] = []
    replayed = answers()
    assert num_eager_decodes == [0] * 7
    runner.allocate_pages(runner.info.num_pages)  # and no graphs
    num_eager_decodes.clear()
    assert answers() == pytest.approx(replayed, abs=LOGPROB_TOLERANCE[dtype])
    assert num_eager_decodes == [3] * 7
