import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_api.errors import InvalidArgument
from softprompt_api.params import SamplingParams
from softprompt_inference.engine.messages import LoadAdapter
from softprompt_inference.engine.plan import Chunk, Sample, Sampled, StepPlan
from softprompt_inference.model.runner import ModelRunner
from transformers import AutoModelForCausalLM

GREEDY = SamplingParams(temperature=0.0, logprobs=0)


def chunk(
    token_ids: Sequence[int], page_ids: Sequence[int], *, start: int = 0, params: SamplingParams | None = GREEDY
) -> Chunk:
    sample = params and Sample(params=params, seed=0, index=0)
    return Chunk(token_ids=token_ids, start=start, page_ids=page_ids, sample=sample)


def run(runner: ModelRunner, *chunks: Chunk) -> list[Sampled]:
    return list(runner.run(StepPlan(chunks=chunks)))


def adapter(value: float, num_virtual_tokens: int = 3, hidden_size: int = 32) -> LoadAdapter:
    rows = torch.randn(num_virtual_tokens, hidden_size, generator=torch.Generator().manual_seed(0)) * value
    return LoadAdapter(
        digest="sha256:0",
        rows=rows.numpy().tobytes(),
        dtype="float32",
        num_virtual_tokens=num_virtual_tokens,
        row_size=hidden_size,
    )


@pytest.fixture(scope="module")
def runner(lab: Any, llama: Path) -> ModelRunner:
    return lab.runner(llama)


def test_it_tells_what_it_serves(runner: ModelRunner) -> None:
    info = runner.info
    assert (info.architecture, info.device, info.dtype) == ("LlamaForCausalLM", "cpu", "float32")
    assert (info.hidden_size, info.num_layers, info.num_kv_heads, info.head_dim) == (32, 2, 2, 8)
    assert (info.vocab_size, info.max_model_len, info.page_size) == (256, 256, 16)
    # 2 layers of 2 key heads of 8 float32 numbers, keys and values, 16 positions.
    assert info.num_pages == 8 * 2**20 // (2 * 2 * 2 * 8 * 4 * 16)
    assert info.kv_cache_bytes == 8 * 2**20


def test_only_chunks_with_a_sample_are_answered_in_order(runner: ModelRunner) -> None:
    first, second = [5, 6, 7], [8, 9]
    alone = [run(runner, chunk(ids, [3]))[0] for ids in (first, second)]
    together = run(
        runner,
        chunk(first, [0]),
        chunk([10, 11, 12, 13], [1], params=None),
        chunk(second, [2]),
    )
    assert [result.token_id for result in together] == [result.token_id for result in alone]


def test_a_step_without_samples_answers_nothing(runner: ModelRunner) -> None:
    assert run(runner, chunk([1, 2], [0], params=None)) == []
    assert run(runner) == []


@pytest.mark.parametrize("follows", [[0, 1, 2], [0, 2], [1], [2, 0]])
@pytest.mark.parametrize("replayed", [False, True])
def test_a_step_that_follows_computes_the_tokens_of_the_one_before(
    lab: Any, llama: Path, follows: list[int], replayed: bool
) -> None:
    runner = lab.runner(llama)
    if replayed:
        runner.capture_decodes(max_sequences=3, max_model_len=64, capture=lambda compute: compute)
    prompts = [chunk([5 + i, 6, 7 + i], [i]) for i in range(3)]
    first = run(runner, *prompts)
    known = [chunk([first[i].token_id], [i], start=3) for i in follows]
    expected = run(runner, *known)
    step = runner.launch(StepPlan(chunks=prompts))
    unknown = [replace(each, token_ids=(0,)) for each in known]
    following = runner.launch(StepPlan(chunks=unknown, follows=follows))
    assert step.result() == first
    assert [each.token_id for each in following.result()] == [each.token_id for each in expected]
    # And once more, behind a step that followed itself.
    second = [each.token_id for each in expected]
    expected = run(runner, *(chunk([second[i]], [row], start=4) for i, row in enumerate(follows)))
    runner.launch(StepPlan(chunks=prompts))
    runner.launch(StepPlan(chunks=unknown, follows=follows))
    last = [chunk((0,), [row], start=4) for row in follows]
    results = runner.launch(StepPlan(chunks=last, follows=range(len(last)))).result()
    assert [each.token_id for each in results] == [each.token_id for each in expected]


@pytest.mark.parametrize("replayed", [False, True])
def test_what_follows_a_row_that_is_not_finite_harms_nobody(lab: Any, llama: Path, replayed: bool) -> None:
    runner = lab.runner(llama)
    if replayed:
        runner.capture_decodes(max_sequences=3, max_model_len=64, capture=lambda compute: compute)
    runner.load_rows(2000, adapter(math.inf))
    healthy = chunk([5, 6, 7], [1])
    token_id = run(runner, healthy)[0].token_id
    expected = run(runner, chunk([token_id], [1], start=3))[0]
    broken = chunk([2000, 2001, 8], [0])
    step = runner.launch(StepPlan(chunks=[broken, healthy]))
    decodes = [chunk((0,), [page], start=3) for page in range(2)]
    following = runner.launch(StepPlan(chunks=decodes, follows=[0, 1]))
    assert [bool(each.error) for each in step.result()] == [True, False]
    assert following.result()[1].token_id == expected.token_id


def test_a_sequence_in_chunks_ends_like_the_whole(runner: ModelRunner) -> None:
    ids = list(range(10, 50))
    whole = run(runner, chunk(ids, [4, 5, 6]))[0]
    run(runner, chunk(ids[:17], [9, 7, 8], params=None))
    last = run(runner, chunk(ids[17:], [9, 7, 8], start=17))[0]
    assert last.token_id == whole.token_id
    assert last.logprobs is not None
    assert whole.logprobs is not None
    assert last.logprobs.chosen == pytest.approx(whole.logprobs.chosen, abs=1e-5)


def test_virtual_rows_go_in_raw_and_text_through_the_embedding(lab: Any) -> None:
    """Gemma scales what its embedding gives, and nothing else."""
    path = lab.model("gemma2")
    runner = lab.runner(path)
    loaded = adapter(1.0)
    first_id = runner.info.vocab_size + 7
    runner.load_rows(first_id, loaded)
    token_ids = [first_id, first_id + 1, first_id + 2, 20, 21, first_id + 1, 22]
    got = run(runner, chunk(token_ids, [0]))[0]

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    rows = torch.frombuffer(bytearray(loaded.rows), dtype=torch.float32).view(3, 32)
    embed = model.get_input_embeddings()
    with torch.inference_mode():
        text = embed(torch.tensor([20, 21, 22]))
        embeddings = torch.cat([rows, text[:2], rows[1:2], text[2:]])
        logits = model(inputs_embeds=embeddings[None]).logits[0, -1]
    assert got.token_id == int(logits.argmax())
    assert got.logprobs is not None
    assert got.logprobs.chosen == pytest.approx(float(torch.log_softmax(logits, -1).max()), abs=1e-4)


def test_ids_of_dropped_rows_are_unknown(runner: ModelRunner) -> None:
    runner.load_rows(1000, adapter(1.0))
    runner.drop_rows(1000)
    with pytest.raises(KeyError):
        run(runner, chunk([1000, 5], [0]))
    assert run(runner, chunk([5], [0]))[0].error == ""


def test_a_request_whose_numbers_overflow_fails_alone(runner: ModelRunner) -> None:
    healthy = chunk([5, 6, 7], [1])
    alone = run(runner, healthy)[0]
    runner.load_rows(2000, adapter(math.inf))
    together = run(runner, chunk([2000, 2001, 8], [0]), healthy)
    runner.drop_rows(2000)
    assert together[0].error == "the model's logits are not finite"
    assert (together[1].token_id, together[1].error) == (alone.token_id, "")


def test_pages_that_held_numbers_that_overflowed_are_clean_for_the_next(runner: ModelRunner) -> None:
    expected = run(runner, chunk([5, 6, 7], [3]))[0]
    runner.load_rows(3000, adapter(math.inf, num_virtual_tokens=14))
    run(runner, chunk([*range(3000, 3014)], [3], params=None))
    runner.drop_rows(3000)
    after = run(runner, chunk([5, 6, 7], [3]))[0]
    assert after == expected


def test_settings_that_do_not_fit_the_model_are_refused(lab: Any, llama: Path) -> None:
    with pytest.raises(InvalidArgument, match="at most 256 positions") as caught:
        lab.runner(llama, max_model_len=257)
    assert caught.value.field == "max_model_len"
    with pytest.raises(InvalidArgument, match="pages hold 32 positions"):
        lab.runner(llama, max_model_len=33, kv_cache_bytes=32 * 256)
    with pytest.raises(InvalidArgument, match="one KV page takes 4096 bytes"):
        lab.runner(llama, kv_cache_bytes=4095)


def test_the_longest_sequence_is_what_the_pages_hold(lab: Any, llama: Path) -> None:
    assert lab.runner(llama, kv_cache_bytes=100 * 256).info.max_model_len == 96
    assert lab.runner(llama, max_model_len=50).info.max_model_len == 50


def test_rows_are_kept_apart_from_text_of_the_same_step(runner: ModelRunner) -> None:
    runner.load_rows(4000, adapter(1.0))
    runner.load_rows(5000, replace(adapter(3.0), digest="sha256:1"))
    requests = [[4000, 4001, 9], [5000, 5001, 9], [9]]
    alone = [run(runner, chunk(ids, [0]))[0] for ids in requests]
    together = run(runner, *(chunk(ids, [i]) for i, ids in enumerate(requests)))
    chosen = [result.logprobs.chosen for result in together if result.logprobs]
    assert chosen == pytest.approx([result.logprobs.chosen for result in alone if result.logprobs], abs=1e-5)
    assert len({round(value, 3) for value in chosen}) == 3
