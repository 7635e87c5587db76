"""From a request to a sequence: every id is checked here, before it can become an index."""

from softprompt_api.errors import AdapterNotFound, ContextLengthExceeded, InvalidArgument

from softprompt_inference.engine.keys import VirtualIds
from softprompt_inference.engine.lora import LoraSlots
from softprompt_inference.engine.messages import AddRequest, TextPart
from softprompt_inference.engine.sequence import Sequence


def make_sequence(
    request: AddRequest, *, virtual_ids: VirtualIds, lora_slots: LoraSlots, max_model_len: int
) -> Sequence:
    """Put the parts of a prompt into one list of ids.

    Raises:
        InvalidArgument: the prompt is empty, an id lies outside the vocabulary, or keys and values that an adapter
            gives do not stand at the front, with something behind them.
        AdapterNotFound: the adapter of a part, or the LoRA, is not loaded.
        ContextLengthExceeded: prompt and output can never fit.
    """
    vocab_size = virtual_ids.vocab_size
    prompt_ids: list[int] = []
    text_ids: list[int] = []
    adapters: set[str] = set()
    soft_prompt_ends: list[int] = []
    num_given = 0
    for part in request.prompt:
        if isinstance(part, TextPart):
            _check_ids("prompt", part.token_ids, vocab_size)
            prompt_ids += part.token_ids
            text_ids += part.token_ids
        elif part.digest in virtual_ids:
            if virtual_ids.are_key_values(part.digest):
                _check_front(prompt_ids)
                num_given = len(virtual_ids.ids(part.digest))
            prompt_ids += virtual_ids.ids(part.digest)
            adapters.add(part.digest)
            soft_prompt_ends.append(len(prompt_ids))
        else:
            raise AdapterNotFound(f"adapter {part.digest} is not loaded", field="adapter")
    lora_slot = -1
    if request.lora:
        if request.lora not in lora_slots:
            raise AdapterNotFound(f"adapter {request.lora} is not loaded", field="adapter")
        adapters.add(request.lora)
        lora_slot = lora_slots.find(request.lora)
    if len(prompt_ids) == num_given:
        raise InvalidArgument("the prompt is empty; it needs at least one token", field="prompt")
    _check_ids("eos_token_ids", request.eos_token_ids, vocab_size)
    request.params.check_vocabulary(vocab_size)
    return Sequence(
        request,
        prompt_ids=prompt_ids,
        text_ids=text_ids,
        adapters=frozenset(adapters),
        soft_prompt_ends=tuple(soft_prompt_ends),
        prefix_len=soft_prompt_ends[0] if prompt_ids[0] >= vocab_size else 0,
        num_given=num_given,
        max_outputs=_max_outputs(request, len(prompt_ids), len(text_ids), max_model_len),
        virtual_ids=virtual_ids,
        lora_slot=lora_slot,
    )


def _check_front(ids_before: list[int]) -> None:
    if ids_before:
        raise InvalidArgument(
            "an adapter of keys and values can stand at the front of a prompt alone: its positions are fixed",
            field="prompt",
        )


def _check_ids(field: str, token_ids: list[int], vocab_size: int) -> None:
    # Virtual ids lie above the vocabulary: no caller can name another's virtual tokens.
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        raise InvalidArgument(
            f"{field} has token id {wrong}; the vocabulary has ids 0 to {vocab_size - 1}", field=field
        )


def _max_outputs(request: AddRequest, num_positions: int, num_text: int, max_model_len: int) -> int:
    room = max_model_len - num_positions
    wanted = request.params.max_tokens
    least = 1 if wanted is None else wanted
    if room >= least:
        return room if wanted is None else wanted
    output = "at least 1 output token" if wanted is None else f"max_tokens of {wanted}"
    raise ContextLengthExceeded(
        f"the context holds {max_model_len} tokens, but this request needs {num_positions + least}: "
        f"{num_text} prompt tokens, {num_positions - num_text} virtual tokens and {output}; "
        "shorten the prompt or lower max_tokens",
        field="prompt" if room < min(least, 1) else "max_tokens",
        details={
            "max_model_len": str(max_model_len),
            "prompt_tokens": str(num_text),
            "virtual_tokens": str(num_positions - num_text),
            "max_tokens": "" if wanted is None else str(wanted),
        },
    )
