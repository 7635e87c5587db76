"""Learn a model's attention layers by watching it at work, and prove that serving computes what the model means.

Source code and configs say too little about an architecture: some bypass the attention interface, drop a sliding
window on the way, make masks of their own or share layers. So a few tokens are run through the model: once with a
recorder in the place of attention, once with paged attention over scattered pages in several steps, and once with
the model's own eager attention in one piece. The logits of the last two must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from softprompt_api.errors import Unsupported
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_inference.model.attention import (
    ATTENTION,
    CallRecorder,
    LayerSpec,
    StepContext,
    attach,
    attach_pages,
    build_step_batch,
    detach,
)
from softprompt_inference.model.errors import one_line
from softprompt_inference.model.masks import MaskRecorder, recorded_masks

if TYPE_CHECKING:
    from softprompt_inference.model.loader import LoadedModel

NO_INTERFACE = "its attention bypasses transformers' attention interface"

PROBE_TOKENS = 4
_CHECK_TOKENS = 24
_CHECK_VIRTUAL_TOKENS = 5
_CHECK_PAGE_SIZE = 4
# Differences of the logits are relative to how much they vary between positions. Rounding gives some 1e-6 in
# float32 and 0.02 to 0.1 in 16 bits, more in deeper models; wrong positions, masks or heads give 0.2 to 1.
_CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}
_SENSITIVITY_FACTOR = 4.0
# Both sides compute the same, but for the order of sums on a GPU.
_IDS_TOLERANCE = {torch.float32: 1e-5, torch.float16: 0.005, torch.bfloat16: 0.01}
_LARGEST_TOLERANCE = 0.5


def find_layers(model: PreTrainedModel) -> tuple[LayerSpec, ...]:
    """The attention layers in the order of their calls. Raises Unsupported."""
    with recorded_masks() as masks, refused("its forward fails without a mask and attention of its own"):
        recorder = run_once(model)
    layers = tuple(
        LayerSpec(
            module=module,
            num_heads=call.q.shape[1],
            num_kv_heads=call.k.shape[1],
            head_dim=call.k.shape[2],
            sliding_window=call.sliding_window,
        )
        for module, call in recorder.calls
    )
    _check_calls(model, recorder)
    _check_windows(model, layers)
    _check_masks(layers, masks)
    return layers


@contextmanager
def refused(reason: str) -> Iterator[None]:
    """Raise Unsupported with this reason where a model fails: whatever it is, it needs what it is not given."""
    try:
        yield
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(f"{reason} ({one_line(error)})") from error


def run_once(model: PreTrainedModel, **chosen: Tensor) -> CallRecorder:
    """Run PROBE_TOKENS through the model and note its calls for attention; leaves nothing behind.

    Args:
        chosen: the rows whose logits are wanted, as its forward calls them; none: all.
    """
    recorder = CallRecorder()
    for module in model.modules():
        attach(module, recorder)
    embeddings = _embed(model, torch.arange(PROBE_TOKENS, device=model.device))
    try:
        with torch.inference_mode():
            model(inputs_embeds=embeddings[None], use_cache=False, **chosen)
    finally:
        for module in model.modules():
            detach(module)
    return recorder


def _check_calls(model: PreTrainedModel, recorder: CallRecorder) -> None:
    num_layers = model.config.get_text_config().num_hidden_layers
    if not recorder.calls:
        raise Unsupported(NO_INTERFACE)
    if len(recorder.calls) != num_layers or len({id(module) for module, _ in recorder.calls}) != num_layers:
        raise Unsupported(f"it attends {len(recorder.calls)} times in {num_layers} layers, and not once in each")
    for _, call in recorder.calls:
        if call.unsupported:
            raise Unsupported(f"it {call.unsupported}")
        if call.q.shape[0] != PROBE_TOKENS or call.q.shape[2] != call.k.shape[2]:
            raise Unsupported(f"its queries {list(call.q.shape)} do not fit its keys {list(call.k.shape)}")
        if call.k.shape != call.v.shape:
            raise Unsupported(f"its keys have {call.k.shape[2]} dimensions and its values {call.v.shape[2]}")


def _check_windows(model: PreTrainedModel, layers: tuple[LayerSpec, ...]) -> None:
    """A window that the config asks for must reach the attention: nothing else would apply it."""
    layer_types = getattr(model.config.get_text_config(), "layer_types", None)
    if layer_types is None:
        return
    for index, (layer_type, layer) in enumerate(zip(layer_types, layers, strict=True)):
        if (layer_type == "sliding_attention") != (layer.sliding_window is not None):
            raise Unsupported(
                f"layer {index} is {layer_type}, but its attention gets window {layer.sliding_window}"
            )


def _check_masks(layers: tuple[LayerSpec, ...], masks: MaskRecorder) -> None:
    """The windows of its attention must be those of its masks; a model that asks for no mask has its own way."""
    if masks.sees_later:
        raise Unsupported("it attends to later tokens")
    for index, layer in enumerate(layers):
        if masks.windows and layer.sliding_window not in masks.windows:
            shown = ", ".join(sorted(map(str, masks.windows)))
            raise Unsupported(
                f"the attention of layer {index} gets window {layer.sliding_window}, and its masks have {shown}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EagerReference:
    """What the model's own attention answers to two sequences.

    sequences  2 * [_CHECK_TOKENS, hidden]
    logits     [2 * _CHECK_TOKENS, vocabulary] float32
    nudged     the same after the last bit of the input was shaken
    """

    sequences: list[Tensor]
    logits: Tensor
    nudged: Tensor


def eager_reference(loaded: LoadedModel) -> EagerReference:
    """Ask the model as it was loaded, before anything in it is replaced. Raises Unsupported."""
    generator = torch.Generator().manual_seed(0)
    sequences = [_sequence(loaded, generator) for _ in range(2)]
    nudged = [_nudge(sequence, generator) for sequence in sequences]
    with refused("its forward fails on rows that are no token's embedding"):
        # All at once: reading the weights takes longer than computing with them.
        logits = _eager_logits(loaded, inputs_embeds=torch.stack([*sequences, *nudged]))
        if logits.shape[2] != loaded.vocab_size:
            raise Unsupported(f"it embeds {loaded.vocab_size} tokens and has logits for {logits.shape[2]}")
    _check_ids(loaded, generator)
    return EagerReference(
        sequences=sequences, logits=logits[:2].flatten(end_dim=1), nudged=logits[2:].flatten(end_dim=1)
    )


def _check_ids(loaded: LoadedModel, generator: torch.Generator) -> None:
    """A token must be to the model what its embedding is: nothing else of it is served."""
    ids = _random_ids(loaded, generator)
    [by_ids] = _eager_logits(loaded, input_ids=ids[None])
    [by_embeddings] = _eager_logits(loaded, inputs_embeds=_embed(loaded.model, ids)[None])
    difference = _difference(by_embeddings, by_ids)
    if not difference <= _IDS_TOLERANCE[loaded.dtype]:
        raise Unsupported(f"it looks at token ids beside their embeddings (relative {difference:.2g})")


def check_against_eager(loaded: LoadedModel, reference: EagerReference) -> None:
    """Compare two sequences, served in pieces, with the model's own attention.

    Allowed is what rounding explains: a fixed tolerance or, where the model itself answers more strongly to the
    last bit of its input, a multiple of that.

    Raises:
        Unsupported: the logits differ by more.
    """
    difference = _difference(torch.cat(_served_logits(loaded, reference.sequences)), reference.logits)
    if not difference <= _tolerance(loaded, reference):
        raise Unsupported(f"paged attention gives other logits than its own attention (relative {difference:.2g})")


def _difference(actual: Tensor, expected: Tensor) -> float:
    """Of logits, relative to how much they vary between positions."""
    return float((actual - expected).norm() / (expected - expected.mean(0)).norm())


def _tolerance(loaded: LoadedModel, reference: EagerReference) -> float:
    sensitivity = _difference(reference.nudged, reference.logits)
    return min(max(_CHECK_TOLERANCE[loaded.dtype], _SENSITIVITY_FACTOR * sensitivity), _LARGEST_TOLERANCE)


def _nudge(sequence: Tensor, generator: torch.Generator) -> Tensor:
    """The sequence with the last bit of its values shaken."""
    noise = torch.rand(sequence.shape, generator=generator) * 2 - 1
    return (sequence.float() * (1 + torch.finfo(sequence.dtype).eps * noise.to(sequence.device))).to(
        sequence.dtype
    )


def _sequence(loaded: LoadedModel, generator: torch.Generator) -> Tensor:
    """Text with rows of no vocabulary after its first token: [_CHECK_TOKENS, hidden].

    Not before it: many models take their first position for a sink and lose all precision over a strange one.
    """
    embeddings = _embed(loaded.model, _random_ids(loaded, generator))
    virtual = torch.randn(_CHECK_VIRTUAL_TOKENS, loaded.hidden_size, generator=generator)
    virtual = virtual.to(embeddings) * embeddings.std()
    return torch.cat([embeddings[:1], virtual, embeddings[1 + _CHECK_VIRTUAL_TOKENS :]])


def _random_ids(loaded: LoadedModel, generator: torch.Generator) -> Tensor:
    return torch.randint(loaded.vocab_size, (_CHECK_TOKENS,), generator=generator).to(loaded.device)


def _embed(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        embeddings: Tensor = model.get_input_embeddings()(ids)
        return embeddings


def _eager_logits(loaded: LoadedModel, **batch: Tensor) -> Tensor:
    """Logits of sequences by `inputs_embeds` or `input_ids`: [sequences, _CHECK_TOKENS, vocabulary] float32."""
    config = loaded.model.config
    config._attn_implementation = "eager"
    try:
        with torch.inference_mode():
            # Without position_ids: the model's own idea of positions is part of what is compared.
            logits: Tensor = loaded.model(**batch, use_cache=False).logits
            return logits.float()
    finally:
        config._attn_implementation = ATTENTION


def _served_logits(loaded: LoadedModel, sequences: list[Tensor]) -> list[Tensor]:
    """Both sequences through pages that alternate between them: chunks that end inside a page, then decodes."""
    context = StepContext()
    num_pages = -(-_CHECK_TOKENS // _CHECK_PAGE_SIZE)
    page_lists = [range(2 * num_pages - 2, -1, -2), range(1, 2 * num_pages, 2)]
    attach_pages(
        loaded.layers,
        context,
        num_pages=2 * num_pages,
        page_size=_CHECK_PAGE_SIZE,
        dtype=loaded.dtype,
        device=loaded.device,
    )
    pieces: list[list[Tensor]] = [[], []]
    # (first, end) of each sequence's piece per step.
    steps = [((0, 14), (0, 3)), ((14, 15), (3, 22)), ((15, 23), (22, 23)), ((23, 24), (23, 24))]
    for step in steps:
        spans = [(first, end - first, pages) for (first, end), pages in zip(step, page_lists, strict=True)]
        context.batch = build_step_batch(spans, page_size=_CHECK_PAGE_SIZE, device=loaded.device)
        embeddings = torch.cat([s[first:end] for s, (first, end) in zip(sequences, step, strict=True)])
        positions = torch.cat([torch.arange(first, end) for first, end in step]).to(loaded.device)
        with torch.inference_mode():
            logits = loaded.logits(embeddings, positions, torch.arange(len(positions), device=loaded.device))
        first_count = step[0][1] - step[0][0]
        pieces[0].append(logits[:first_count].float())
        pieces[1].append(logits[first_count:].float())
    for layer in loaded.layers:
        detach(layer.module)
    return [torch.cat(parts) for parts in pieces]
