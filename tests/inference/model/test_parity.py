"""What is served equals what PEFT computes: float32, greedy, ids equal and logprobs within 1e-4."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from softprompt_inference.engine.plan import PageCopy, StepPlan
from softprompt_inference.model import attention
from softprompt_inference.model.errors import ModelSourceError
from softprompt_inference.model.kv_pages import KVPages
from softprompt_inference.model.loader import LoadedModel
from softprompt_inference.model.runner import ModelRunner
from softprompt_inference.model.sampler import Choices
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_kernels import native
from softprompt_kernels.kv_write import kv_write
from softprompt_kernels.paged_attention import reference
from softprompt_kernels.paged_attention.reference import NativePrefix
from torch import Tensor

KINDS = ["prompt_tuning", "p_tuning_mlp", "p_tuning_lstm", "cpt"]
KEY_VALUES = ["prefix", "prefix_projected", "cartridge"]
# Not a multiple of the page size (16), one page, between, two pages.
COUNTS = [5, 16, 20, 32]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", [*KINDS, "multitask", *KEY_VALUES])
def test_every_kind_alone(lab: Any, llama: Path, kind: str, count: int) -> None:
    requests = lab.requests([lab.adapter(llama, kind, count)])
    outputs = lab.serve(lab.engine(llama), requests)
    lab.compare(llama, requests, outputs).assert_equal()


def test_every_kind_and_the_base_model_in_one_batch_of_sixteen(lab: Any, llama: Path) -> None:
    adapters = [lab.adapter(llama, kind, count) for kind, count in zip(KINDS, COUNTS, strict=True)]
    adapters += [lab.adapter(llama, kind, count) for kind, count in zip(KEY_VALUES, COUNTS, strict=False)]
    adapters += [lab.adapter(llama, "multitask", 20, task=task) for task in (0, 2)]
    adapters += [lab.adapter(llama, "prefix", count, seed=1) for count in (5, 16)]
    requests = lab.requests([*adapters, *([None] * 4), adapters[0]])
    assert len(requests) == 16
    outputs = lab.serve(lab.engine(llama), requests)
    lab.compare(llama, requests, outputs).assert_equal()


def test_weights_that_are_kept_in_bfloat16(lab: Any) -> None:
    path = lab.model("llama", torch.bfloat16)
    engine = lab.engine(path)
    adapters = [lab.adapter(path, kind, count) for kind, count in zip([*KINDS, *KEY_VALUES], COUNTS, strict=False)]
    requests = lab.requests([*adapters, None, *adapters, None])
    lab.compare(path, requests, lab.serve(engine, requests)).assert_equal()


def test_without_native_kernels(lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(llama)
    monkeypatch.setattr(native, "_library", None)
    requests = lab.requests(
        [lab.adapter(llama, kind, count) for kind, count in zip([*KINDS, *KEY_VALUES], COUNTS * 2, strict=False)]
    )
    lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


@pytest.mark.parametrize("max_step_tokens", [3, 5, 7, 16, 20])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix"])
def test_chunks_that_end_inside_and_just_after_the_virtual_tokens(
    lab: Any, llama: Path, kind: str, count: int, max_step_tokens: int
) -> None:
    adapter = lab.adapter(llama, kind, count)
    requests = lab.requests([adapter, None, adapter])
    outputs = lab.serve(lab.engine(llama, max_step_tokens=max_step_tokens), requests)
    lab.compare(llama, requests, outputs).assert_equal()


def test_a_long_soft_prompt_that_decodes_share_gives_each_of_them_what_it_gets_alone(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, where another order of sums would show."""
    shared: list[int] = []  # how many sequences had each beginning
    find = reference._find_prefixes

    def found(*args: Any) -> tuple[NativePrefix, ...]:
        prefixes = find(*args)
        shared.extend(len(prefix.rows) for prefix in prefixes)
        return prefixes

    monkeypatch.setattr(reference, "_MIN_PREFIX", 64)
    monkeypatch.setattr(reference, "_find_prefixes", found)
    path = lab.model("llama_wide")
    engine = lab.engine(path, dtype="bfloat16")
    if not native.supports_linear(torch.zeros(2, 2, dtype=torch.bfloat16)):
        pytest.skip("this processor does not multiply pairs of bfloat16")
    first, second = (lab.adapter(path, "prompt_tuning", 70, seed=seed) for seed in (0, 1))
    requests = lab.requests([first, second, first, None, first, second])
    lab.serve(engine, requests)  # so that all find the same pages from now on
    together = lab.serve(engine, requests)
    assert max(shared) == 3
    shared.clear()
    for request, outputs in zip(requests, together, strict=True):
        [alone] = lab.serve(engine, [request])
        assert [(one.token_id, one.logprobs) for one in alone] == [(one.token_id, one.logprobs) for one in outputs]
    assert set(shared) == {1}


@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_preempted_requests_go_on_as_if_nothing_had_happened(lab: Any, llama: Path, page_size: int) -> None:
    adapters = [lab.adapter(llama, kind, 20) for kind in ("prompt_tuning", "multitask", "cartridge")]
    adapters += [lab.adapter(llama, kind, 5) for kind in ("prompt_tuning", "prefix")]
    requests = lab.requests([*adapters, None, *adapters, None], max_tokens=30)
    # 2 layers of 2 heads of 8 float32 keys and values: 256 bytes per position, 120 positions in all.
    settings = {"page_size": page_size, "kv_cache_bytes": 120 * 256, "max_model_len": 80}
    engine = lab.engine(llama, **settings)
    outputs = lab.serve(engine, requests)
    assert engine.step().stats.preemptions > 0
    lab.compare(llama, requests, outputs).assert_equal()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["prompt_tuning", "multitask", "prefix", "cartridge"])
def test_a_prefix_hit_changes_nothing(lab: Any, llama: Path, kind: str, count: int) -> None:
    requests = lab.requests([lab.adapter(llama, kind, count), None], length=40)
    engine = lab.engine(llama)
    first, second = lab.serve(engine, requests), lab.serve(engine, requests)
    assert all(outputs[0].cached_tokens == 0 for outputs in first)
    assert all(outputs[0].cached_tokens >= 32 for outputs in second)
    lab.compare(llama, requests, first).assert_equal()
    lab.compare(llama, requests, second).assert_equal()


@pytest.mark.parametrize("page_size", [4, 16, 64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_a_warm_adapter_leaves_only_the_text_to_compute(
    lab: Any, monkeypatch: pytest.MonkeyPatch, name: str, page_size: int
) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, "prompt_tuning", count, seed=seed) for count, seed in ((20, 0), (20, 1), (5, 0))]
    engine = lab.engine(path, page_size=page_size)
    first = lab.requests(adapters)
    lab.compare(path, first, lab.serve(engine, first)).assert_equal()
    computed: list[int] = []
    compute = ModelRunner.launch

    def count(self: ModelRunner, plan: StepPlan) -> Choices:
        computed.extend(token_id for chunk in plan.chunks for token_id in chunk.token_ids)
        return compute(self, plan)

    monkeypatch.setattr(ModelRunner, "launch", count)
    second = lab.requests([*adapters, *adapters], seed=1)
    outputs = lab.serve(engine, second)
    lab.compare(path, second, outputs).assert_equal()
    assert max(computed) < engine.info.vocab_size
    num_text = sum(len(request.prompt_ids) for request in second)
    assert len(computed) == num_text + sum(len(own) - 1 for own in outputs)
    assert [own[0].cached_tokens for own in outputs] == [20, 20, 5] * 2


def test_a_copied_page_whose_owner_goes_on_changes_nothing(lab: Any, llama: Path) -> None:
    adapter = lab.adapter(llama, "prompt_tuning", 20)
    requests = lab.requests([adapter] * 5, max_tokens=30)
    # Two at a time, in small steps: the others copy while the owner of the page writes on.
    engine = lab.engine(llama, max_num_sequences=2, max_step_tokens=7)
    outputs = lab.serve(engine, requests)
    assert [own[0].cached_tokens for own in outputs][2:] == [20] * 3
    lab.compare(llama, requests, outputs).assert_equal()


def test_without_prefix_caching_nothing_is_shared_and_nothing_differs(lab: Any, llama: Path) -> None:
    requests = lab.requests([lab.adapter(llama, "prompt_tuning", 20), None] * 2, length=40)
    engine = lab.engine(llama, enable_prefix_caching=False)
    for _ in range(2):
        outputs = lab.serve(engine, requests)
        assert all(own[0].cached_tokens == 0 for own in outputs)
        lab.compare(llama, requests, outputs).assert_equal()


def test_without_sharing_soft_prompts_are_computed_each_time_and_nothing_differs(lab: Any, llama: Path) -> None:
    requests = lab.requests([lab.adapter(llama, "prompt_tuning", 20), None] * 2, length=40)
    engine = lab.engine(llama, share=False)
    for round_ in range(2):
        outputs = lab.serve(engine, requests)
        for request, own in zip(requests, outputs, strict=True):
            assert own[0].cached_tokens == 0 if request.adapter or not round_ else own[0].cached_tokens > 0
        lab.compare(llama, requests, outputs).assert_equal()


def test_adapters_of_one_length_and_one_text_do_not_share_keys(lab: Any, llama: Path) -> None:
    one, other = (lab.adapter(llama, "prompt_tuning", 32, seed=seed) for seed in (0, 1))
    [request] = lab.requests([one], length=40)
    requests = [request, replace(request, adapter=other), replace(request, adapter=None)]
    engine = lab.engine(llama)
    for each in (requests, list(reversed(requests))):
        outputs = lab.serve(engine, each)
        lab.compare(llama, each, outputs).assert_equal()


@pytest.mark.parametrize("kind", KEY_VALUES)
@pytest.mark.parametrize("name", ["qwen3", "gpt2", "opt", "gpt_neox"])
def test_given_keys_and_values_for_other_models(lab: Any, name: str, kind: str) -> None:
    path = lab.model(name)
    adapters = [lab.adapter(path, kind, count) for count in (5, 16, 20)]
    requests = lab.requests([*adapters, None, lab.adapter(path, "prompt_tuning", 20)])
    lab.compare(path, requests, lab.serve(lab.engine(path), requests)).assert_equal()


@pytest.mark.parametrize("name", ["gemma2", "mistral", "gpt_oss"])
def test_models_with_sliding_windows_take_no_keys_and_values(lab: Any, name: str) -> None:
    path = lab.model(name)
    engine = lab.engine(path)
    adapter = lab.adapter(path, "prefix", 5)
    assert f"{engine.info.architecture} has sliding-window layers" == engine.info.no_key_values
    lab.submit(engine, lab.requests([adapter]))
    [output] = engine.step().outputs
    assert output.error_reason == "ADAPTER_INVALID"
    assert "sliding-window" in output.error_message


def test_tasks_of_one_adapter_do_not_share_keys(lab: Any, llama: Path) -> None:
    adapters = [lab.adapter(llama, "multitask", 20, task=task) for task in range(3)]
    [request] = lab.requests(adapters[:1], length=20)
    requests = [replace(request, adapter=adapter) for adapter in adapters]
    engine = lab.engine(llama)
    for each in (requests, list(reversed(requests))):
        lab.compare(llama, each, lab.serve(engine, each)).assert_equal()


@pytest.mark.parametrize("look_ahead", [False, True])
def test_given_keys_and_values_in_front_of_steps_that_are_launched_ahead(
    lab: Any, llama: Path, look_ahead: bool
) -> None:
    adapters = [lab.adapter(llama, kind, count) for kind, count in zip(KEY_VALUES, COUNTS, strict=False)]
    requests = lab.requests([*adapters, None] * 2, max_tokens=20)
    settings = {"kv_cache_bytes": 200 * 256, "max_model_len": 80, "look_ahead": look_ahead}
    engine = lab.engine(llama, max_num_sequences=4, **settings)
    lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


@pytest.fixture(scope="module")
def default_model() -> Path:
    try:
        return resolve_model(DEFAULT_MODEL)
    except ModelSourceError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def default_engine(lab: Any, default_model: Path) -> Any:
    """Loaded once, which takes longer than its answers."""
    return lab.engine(default_model, kv_cache_bytes=64 * 2**20)


def test_the_default_model_with_given_keys_and_values(lab: Any, default_model: Path, default_engine: Any) -> None:
    path = default_model
    one, other = (lab.adapter(path, kind, 20) for kind in ("prefix_from_text", "cartridge_from_text"))
    requests = lab.requests([one, other, None, one], length=20, max_tokens=8)
    outputs = lab.serve(default_engine, requests)
    lab.compare(path, requests, outputs).assert_equal()
    assert len({tuple(output.token_id for output in own) for own in outputs[:3]}) == 3


def test_the_default_model_with_adapters_made_from_text(
    lab: Any, default_model: Path, default_engine: Any
) -> None:
    path = default_model
    one, other = (lab.adapter(path, "text_prompt", 20, seed=seed) for seed in (0, 1))
    requests = lab.requests([one, other, None, one], length=20, max_tokens=8, seed=2)
    fillers = lab.requests([None, one, other] * 4, length=4, max_tokens=4, seed=1)
    outputs = lab.serve(default_engine, [*requests, *fillers])
    lab.compare(path, requests, outputs[: len(requests)]).assert_equal()


def test_the_oracle_tells_all_requests_apart(lab: Any, llama: Path) -> None:
    # A cartridge made with the seed of a prefix would be the same.
    adapters = [lab.adapter(llama, kind, 20, seed=kind == "cartridge") for kind in [*KINDS, *KEY_VALUES]] + [None]
    adapters += [lab.adapter(llama, "multitask", 20, task=task) for task in range(3)]
    [request] = lab.requests([None])
    requests = [replace(request, adapter=adapter) for adapter in adapters]
    answers = [lab.oracle(llama).greedy(request) for request in requests]
    assert len(set(map(tuple, answers))) == len(adapters)
    assert all(map(lab.oracle(llama).check, requests, answers))


# From here on something is broken on purpose: the comparison must notice.


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix"])
def test_swapped_adapters_are_noticed(lab: Any, llama: Path, kind: str) -> None:
    requests = lab.requests([lab.adapter(llama, kind, 20, seed=seed) for seed in (0, 1)])
    rows = [request.adapter.load.rows for request in requests]
    swapped = [with_rows(request, own) for request, own in zip(requests, reversed(rows), strict=True)]
    comparison = lab.compare(llama, requests, lab.serve(lab.engine(llama), swapped))
    assert {problem.split(":")[0] for problem in comparison.problems} == {"request 0", "request 1"}


@pytest.mark.parametrize("row", [0, 10, 19])
@pytest.mark.parametrize("kind", ["prompt_tuning", "cartridge"])
def test_a_dropped_virtual_token_is_noticed(lab: Any, llama: Path, kind: str, row: int) -> None:
    [request] = lab.requests([lab.adapter(llama, kind, 20)])
    rows = bytes(request.adapter.load.rows)
    row_bytes = len(rows) // 20
    shorter = with_rows(request, rows[: row * row_bytes] + rows[(row + 1) * row_bytes :])
    assert lab.compare(llama, [request], lab.serve(lab.engine(llama), [shorter])).problems


# Rotary positions are relative: only a gap between virtual tokens and text can show. Learned ones are absolute.
@pytest.mark.parametrize(("name", "first_shifted"), [("llama", 20), ("gpt2", 20), ("gpt2", 0)])
@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix"])
def test_positions_shifted_by_one_are_noticed(
    lab: Any, monkeypatch: pytest.MonkeyPatch, kind: str, name: str, first_shifted: int
) -> None:
    path = lab.model(name)
    requests = lab.requests([lab.adapter(path, kind, 20)])
    engine = lab.engine(path)
    compute = LoadedModel.logits

    def shifted(self: LoadedModel, embeddings: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return compute(self, embeddings, positions + (positions >= first_shifted), rows)

    monkeypatch.setattr(LoadedModel, "logits", shifted)
    assert lab.compare(path, requests, lab.serve(engine, requests)).problems


def test_pages_used_again_without_writing_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = lab.requests([lab.adapter(llama, "prompt_tuning", 20, seed=seed) for seed in (0, 1)] * 2)
    engine = lab.engine(llama, kv_cache_bytes=80 * 256, max_model_len=80)
    written: dict[int, set[int]] = {}

    def write_only_once(keys: Tensor, values: Tensor, k: Tensor, v: Tensor, slots: Tensor) -> None:
        seen = written.setdefault(keys.data_ptr(), set())
        fresh = [i for i, slot in enumerate(slots.tolist()) if slot not in seen]
        seen.update(slots.tolist())
        kv_write(keys, values, k[fresh], v[fresh], slots[fresh])

    monkeypatch.setattr(attention, "kv_write", write_only_once)
    assert lab.compare(llama, requests, lab.serve(engine, requests)).problems


@pytest.mark.parametrize("missing", [1, 4])
def test_rows_of_a_shared_soft_prompt_that_were_not_copied_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, missing: int
) -> None:
    [request] = lab.requests([lab.adapter(llama, "prompt_tuning", 20)])
    engine = lab.engine(llama)
    lab.serve(engine, [request])
    copy = KVPages.copy

    def copy_less(self: KVPages, copies: Sequence[PageCopy]) -> None:
        assert [each.num_positions for each in copies] in ([], [4])
        copy(self, [replace(each, num_positions=each.num_positions - missing) for each in copies])

    monkeypatch.setattr(KVPages, "copy", copy_less)
    again = replace(request, prompt_ids=request.prompt_ids[::-1])
    assert lab.compare(llama, [again], lab.serve(engine, [again])).problems


def _swap_keys_and_values(rows: Tensor) -> Tensor:
    return rows.flip(1)


def _swap_layers(rows: Tensor) -> Tensor:
    return rows.flip(0)


def _swap_heads(rows: Tensor) -> Tensor:
    return rows.flip(3)


def _rotate_keys(rows: Tensor) -> Tensor:
    """As if they were keys of tokens, before their rotary embedding at their positions."""
    _, _, num_rows, _, head_dim = rows.shape
    half = head_dim // 2
    angles = torch.arange(num_rows)[:, None] / 10000 ** (torch.arange(half) / half)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    first, second = rows[:, 0, ..., :half], rows[:, 0, ..., half:]
    keys = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.stack([keys, rows[:, 1]], dim=1)


@pytest.mark.parametrize("change", [_swap_keys_and_values, _swap_layers, _swap_heads, _rotate_keys])
def test_keys_and_values_written_otherwise_than_given_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]
) -> None:
    [request] = lab.requests([lab.adapter(llama, "prefix", 20)])
    write = KVPages.write
    monkeypatch.setattr(KVPages, "write", lambda self, rows, slots: write(self, change(rows), slots))
    assert lab.compare(llama, [request], lab.serve(lab.engine(llama), [request])).problems


def test_keys_and_values_that_were_not_written_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = lab.requests([lab.adapter(llama, "prefix", 20, seed=seed) for seed in (0, 1)])
    engine = lab.engine(llama)
    lab.serve(engine, requests[:1])
    monkeypatch.setattr(KVPages, "write", lambda *_: None)
    assert lab.compare(llama, requests[1:], lab.serve(engine, requests[1:])).problems


def test_another_task_is_noticed(lab: Any, llama: Path) -> None:
    one, other = lab.requests([lab.adapter(llama, "multitask", 20, task=task) for task in (0, 1)])
    swapped = replace(one, adapter=replace(one.adapter, load=other.adapter.load))
    assert lab.compare(llama, [one], lab.serve(lab.engine(llama), [swapped])).problems


def test_cached_keys_of_another_adapter_are_noticed(lab: Any, llama: Path) -> None:
    one, other = lab.requests([lab.adapter(llama, "prompt_tuning", 32, seed=seed) for seed in (0, 1)])
    engine = lab.engine(llama)
    digest = one.adapter.load.digest
    lab.compare(llama, [one], lab.serve(engine, [one])).assert_equal()
    engine.drop_adapter(digest)
    # As if the cache did not look at the digest: both adapters go by one.
    under_one_digest = replace(
        other, adapter=replace(other.adapter, load=replace(other.adapter.load, digest=digest))
    )
    assert lab.compare(llama, [other], lab.serve(engine, [under_one_digest])).problems


def with_rows(request: Any, rows: bytes) -> Any:
    """The same request for an adapter with other rows of the same size, and fewer or more of them."""
    load = request.adapter.load
    row_bytes = len(load.rows) // load.num_virtual_tokens
    changed = replace(load, rows=rows, num_virtual_tokens=len(rows) // row_bytes)
    return replace(request, adapter=replace(request.adapter, load=changed))
