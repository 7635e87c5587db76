"""Adapters put together are computed as by hand: float32, greedy, ids equal and logprobs within 1e-4."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from softprompt_inference.engine import engine as engine_module
from softprompt_inference.engine import sequence as sequence_module
from softprompt_inference.engine.keys import page_key, partial_key
from softprompt_inference.engine.messages import SoftPromptPart
from softprompt_inference.engine.prompt import make_sequence
from softprompt_inference.model import runner as runner_module
from softprompt_inference.model.errors import ModelSourceError
from softprompt_inference.model.loader import LoadedModel
from softprompt_inference.model.lora.context import build_tiles
from softprompt_inference.model.source import DEFAULT_MODEL, resolve_model
from softprompt_kernels import native
from torch import Tensor

ARCHITECTURES = ["llama", "mistral", "qwen3", "gemma2", "gpt2", "phi3", "opt", "gpt_neox"]
# Without sliding windows, so that keys and values may be given.
FULL_ATTENTION = ["llama", "qwen3", "gpt2", "gpt_neox"]
# Inside a page, to its end, and over several pages of 16.
COUNTS = [3, 5, 13, 16, 20]


def text(lab: Any, *lengths: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Texts of these lengths."""
    [request] = lab.requests([None], length=sum(lengths), seed=seed)
    ids, texts = request.prompt_ids, []
    for length in lengths:
        texts.append(ids[:length])
        ids = ids[length:]
    return texts


def request_of(lab: Any, *parts: Any, lora: Any = None, max_tokens: int = 12) -> Any:
    [request] = lab.requests([None], max_tokens=max_tokens)
    return replace(request, prompt_ids=(), parts=parts, lora=lora)


def mixed(lab: Any, path: Path, *, with_given: bool = True, max_tokens: int = 12) -> list[Any]:
    """Every composition, and the base model and single adapters between them."""
    a, b, c, d, e = (
        lab.adapter(path, kind, count, seed=1)
        for kind, count in zip(
            ["prompt_tuning", "cpt", "p_tuning_mlp", "prompt_tuning", "multitask"], COUNTS, strict=True
        )
    )
    targets = ["q_proj", "v_proj"] if path.name == "opt" else "all-linear"  # others of OPT's cannot be served
    one, two = (lab.lora(path, seed=seed, rank=rank, targets=targets) for seed, rank in ((0, 8), (1, 3)))
    x, y, z = text(lab, 9, 4, 17)
    compositions: list[tuple[Any, ...]] = [
        (a, b, x),
        (b, a, x),
        (e, d, c, y),
        (x, a, y),
        (x, a, y, b, z),
        (y, c, c, z),
        (x, e),
        (a, z, a),
        (d, x, d, y, d, z),
    ]
    if with_given:
        given = [lab.adapter(path, kind, count) for kind, count in (("prefix", 20), ("cartridge", 5))]
        compositions += [(given[0], a, x), (given[1], x, b, y), (given[0], e, x, e, z)]
    requests = [request_of(lab, *parts, max_tokens=max_tokens) for parts in compositions]
    requests += [replace(request, lora=lora) for request, lora in zip(requests, [one, two] * 6, strict=False)]
    singles = lab.requests([None, a, None, b], max_tokens=max_tokens)
    return [*requests, *singles, replace(singles[1], lora=two), replace(singles[2], lora=one)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_composition_in_one_batch_with_the_base_model(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = mixed(lab, path, with_given=name in FULL_ATTENTION)
    lab.compare(path, requests, lab.serve(lab.engine(path), requests)).assert_equal()


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("front", COUNTS)
def test_soft_prompts_that_end_anywhere_in_a_page(lab: Any, llama: Path, front: int, count: int) -> None:
    a, b = lab.adapter(llama, "prompt_tuning", front), lab.adapter(llama, "prompt_tuning", count, seed=1)
    x, y = text(lab, 7, 5)
    requests = [request_of(lab, *parts) for parts in ((a, b, x), (x, a, y, b, x), (a, x, b))]
    lab.compare(llama, requests, lab.serve(lab.engine(llama), requests)).assert_equal()


@pytest.mark.parametrize("max_step_tokens", [3, 7, 16, 20])
def test_chunks_that_end_anywhere(lab: Any, llama: Path, max_step_tokens: int) -> None:
    requests = mixed(lab, llama)
    engine = lab.engine(llama, max_step_tokens=max_step_tokens)
    lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


@pytest.mark.parametrize("page_size", [4, 5, 16])
def test_preempted_requests_go_on_as_if_nothing_had_happened(lab: Any, llama: Path, page_size: int) -> None:
    requests = mixed(lab, llama, max_tokens=30)
    engine = lab.engine(llama, page_size=page_size, kv_cache_bytes=160 * 256, max_model_len=128)
    outputs = lab.serve(engine, requests)
    assert engine.step().stats.preemptions > 0
    lab.compare(llama, requests, outputs).assert_equal()


@pytest.mark.parametrize("settings", [{"look_ahead": True}, {"share": False}, {"enable_prefix_caching": False}])
def test_with_other_settings_nothing_differs(lab: Any, llama: Path, settings: dict[str, bool]) -> None:
    requests = mixed(lab, llama)
    engine = lab.engine(llama, **settings)
    for _ in range(2):
        lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


def test_without_native_kernels(lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = lab.engine(llama)
    monkeypatch.setattr(native, "_library", None)
    requests = mixed(lab, llama)
    lab.compare(llama, requests, lab.serve(engine, requests)).assert_equal()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_gpu_computes_the_same_in_float32(lab: Any, name: str) -> None:
    path = lab.model(name)
    requests = mixed(lab, path)
    lab.compare(path, requests, lab.serve(lab.engine(path, device="cuda"), requests)).assert_equal()


@pytest.mark.parametrize("page_size", [4, 16, 64])
def test_a_warm_composition_is_found_to_its_last_soft_prompt(lab: Any, llama: Path, page_size: int) -> None:
    a, b = lab.adapter(llama, "prompt_tuning", 20), lab.adapter(llama, "cpt", 5)
    x, y, z = text(lab, 6, 9, 4)
    engine = lab.engine(llama, page_size=page_size)
    rounds = [
        ([(a, b, x), (x, a, y)], [0, 0]),
        ([(a, b, y), (x, a, z), (a, z)], [25, 26, 20]),
    ]
    for compositions, cached in rounds:
        requests = [request_of(lab, *parts) for parts in compositions]
        outputs = lab.serve(engine, requests)
        assert [own[0].cached_tokens for own in outputs] == cached
        lab.compare(llama, requests, outputs).assert_equal()


def test_given_keys_and_values_are_shared_under_every_lora_and_what_follows_them_under_none(
    lab: Any, llama: Path
) -> None:
    given, soft = lab.adapter(llama, "prefix", 20), lab.adapter(llama, "prompt_tuning", 16)
    loras = [None, *(lab.lora(llama, seed=seed) for seed in (0, 1))]
    x, y = text(lab, 9, 8)
    engine = lab.engine(llama)
    for lora, cached in zip(loras, (0, 20, 20), strict=True):
        request = request_of(lab, given, soft, x, lora=lora)
        [outputs] = lab.serve(engine, [request])
        assert outputs[0].cached_tokens == cached
        lab.compare(llama, [request], [outputs]).assert_equal()
    for lora in loras:
        request = request_of(lab, given, soft, y, lora=lora)
        [outputs] = lab.serve(engine, [request])
        assert outputs[0].cached_tokens == 36
        lab.compare(llama, [request], [outputs]).assert_equal()


def test_the_default_model(lab: Any) -> None:
    try:
        path = resolve_model(DEFAULT_MODEL)
    except ModelSourceError as error:
        pytest.skip(str(error))
    a, b = (lab.adapter(path, "text_prompt", 20, seed=seed) for seed in (0, 1))
    lora = lab.lora(path, lora_alpha=1, targets=["q_proj", "v_proj", "down_proj"])
    x, y = text(lab, 12, 8)
    requests = [
        request_of(lab, *parts, lora=lora, max_tokens=8)
        for parts, lora in (((a, b, x), None), ((x, a, y), None), ((b, x, a, y), lora), ((x,), None))
    ]
    outputs = lab.serve(lab.engine(path, kv_cache_bytes=64 * 2**20), requests)
    lab.compare(path, requests, outputs).assert_equal()


def test_the_oracle_tells_all_compositions_apart(lab: Any, llama: Path) -> None:
    a, b = lab.adapter(llama, "prompt_tuning", 20), lab.adapter(llama, "cpt", 20)
    given, lora = lab.adapter(llama, "prefix", 20), lab.lora(llama)
    x, y = text(lab, 9, 8)
    compositions = [(a, b, x, y), (b, a, x, y), (a, x, b, y), (x, a, b, y), (x, a, y), (x, y, a), (given, a, x, y)]
    requests = [request_of(lab, *parts, lora=each) for parts in compositions for each in (None, lora)]
    answers = [lab.oracle(llama).greedy(request) for request in requests]
    assert len(set(map(tuple, answers))) == len(answers)
    assert all(map(lab.oracle(llama).check, requests, answers))


# From here on something is broken on purpose: the comparison must notice.


def compositions(lab: Any, path: Path) -> list[Any]:
    """Two soft prompts of one length in front, one inside a text, and both with a LoRA."""
    a, b = lab.adapter(path, "prompt_tuning", 20), lab.adapter(path, "prompt_tuning", 20, seed=1)
    x, y = text(lab, 9, 8)
    plain = [request_of(lab, a, b, x), request_of(lab, x, b, y)]
    return [*plain, *(replace(request, lora=lab.lora(path)) for request in plain)]


def noticed(lab: Any, path: Path, expected: Sequence[Any], served: Sequence[Any]) -> set[str]:
    comparison = lab.compare(path, expected, lab.serve(lab.engine(path), served))
    return {problem.split(":")[0] for problem in comparison.problems}


def test_another_order_is_noticed(lab: Any, llama: Path) -> None:
    requests = compositions(lab, llama)
    served = [
        replace(request, parts=(request.parts[1], request.parts[0], *request.parts[2:])) for request in requests
    ]
    assert noticed(lab, llama, requests, served) == {f"request {i}" for i in range(4)}


def test_a_soft_prompt_one_token_further_on_is_noticed(lab: Any, llama: Path) -> None:
    requests = compositions(lab, llama)[1::2]
    served = []
    for request in requests:
        before, soft_prompt, after = request.parts
        served.append(replace(request, parts=((*before, after[0]), soft_prompt, after[1:])))
    assert noticed(lab, llama, requests, served) == {"request 0", "request 1"}


def test_a_soft_prompt_inside_that_is_left_out_is_noticed(lab: Any, llama: Path) -> None:
    requests = compositions(lab, llama)
    served = [replace(request, parts=(request.parts[0], request.parts[2])) for request in requests]
    assert noticed(lab, llama, requests, served) == {f"request {i}" for i in range(4)}


@pytest.mark.parametrize(("name", "first_shifted"), [("llama", 29), ("gpt2", 29), ("gpt2", 9)])
def test_positions_shifted_by_one_behind_a_soft_prompt_inside_are_noticed(
    lab: Any, monkeypatch: pytest.MonkeyPatch, name: str, first_shifted: int
) -> None:
    path = lab.model(name)
    [request] = compositions(lab, path)[1:2]
    engine = lab.engine(path)
    compute = LoadedModel.logits

    def shifted(self: LoadedModel, embeddings: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        return compute(self, embeddings, positions + (positions >= first_shifted), rows)

    monkeypatch.setattr(LoadedModel, "logits", shifted)
    assert lab.compare(path, [request], lab.serve(engine, [request])).problems


def test_virtual_tokens_inside_that_pass_the_lora_by_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = compositions(lab, llama)[3]
    engine = lab.engine(llama)

    def without_virtual(slots: list[int], device: Any) -> Any:
        return build_tiles([*slots[:9], *[-1] * 20, *slots[29:]] if len(slots) > 29 else slots, device)

    monkeypatch.setattr(runner_module, "build_tiles", without_virtual)
    assert lab.compare(llama, [request], lab.serve(engine, [request])).problems


def test_a_lora_that_is_left_out_or_another_is_noticed(lab: Any, llama: Path) -> None:
    requests = compositions(lab, llama)[2:]
    for lora in (None, lab.lora(llama, seed=5)):
        served = [replace(request, lora=lora) for request in requests]
        assert noticed(lab, llama, requests, served) == {"request 0", "request 1"}


def test_pages_behind_given_ones_under_another_lora_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the chain forgot the LoRA once keys and values are given in front."""
    monkeypatch.setattr(sequence_module, "under_lora", lambda key, _: key)
    given, soft = lab.adapter(llama, "prefix", 20), lab.adapter(llama, "prompt_tuning", 16)
    [x] = text(lab, 9)
    engine = lab.engine(llama)
    plain = request_of(lab, given, soft, x)
    lab.compare(llama, [plain], lab.serve(engine, [plain])).assert_equal()
    under_lora = replace(plain, lora=lab.lora(llama))
    assert lab.compare(llama, [under_lora], lab.serve(engine, [under_lora])).problems


def test_keys_that_do_not_tell_soft_prompts_apart_are_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if virtual tokens were hashed as one token, as servers did that shared pages of equal lengths."""

    def blind(key: Any) -> Any:
        def make(parent: bytes, token_ids: list[int], virtual_ids: Any) -> bytes:
            return key(parent, [min(token_id, 255) for token_id in token_ids], virtual_ids)

        return make

    monkeypatch.setattr(sequence_module, "page_key", blind(page_key))
    monkeypatch.setattr(sequence_module, "partial_key", blind(partial_key))
    a, b = lab.adapter(llama, "prompt_tuning", 20), lab.adapter(llama, "prompt_tuning", 20, seed=1)
    x, y = text(lab, 9, 20)
    engine = lab.engine(llama)
    first, second = request_of(lab, x, a, y), request_of(lab, x, b, y)
    lab.compare(llama, [first], lab.serve(engine, [first])).assert_equal()
    assert lab.compare(llama, [second], lab.serve(engine, [second])).problems


def test_a_prompt_put_together_with_its_text_first_is_noticed(
    lab: Any, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = compositions(lab, llama)[:1]

    def text_first(request: Any, **options: Any) -> Any:
        prompt = sorted(request.prompt, key=lambda part: isinstance(part, SoftPromptPart))
        return make_sequence(replace(request, prompt=prompt), **options)

    monkeypatch.setattr(engine_module, "make_sequence", text_first)
    assert noticed(lab, llama, requests, requests) == {"request 0"}
