"""A prompt put together with its adapters: what stands where, and how much of it is text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from softprompt_api.composition import Part, check_front, check_inside, check_number
from softprompt_api.errors import ContextLengthExceeded
from softprompt_api.formats import Role

from softprompt_inference.adapters.adapter import AdapterInfo
from softprompt_inference.engine.messages import SoftPromptPart, TextPart
from softprompt_inference.prompts import text_ids_of
from softprompt_inference.text import Encoded, SoftPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundAdapter:
    """A version that a request is computed with. `name` and `version` are "" and 0 when it named a digest.

    `digest` has the task behind it where the adapter has tasks. `spelling` is the request's.
    """

    spelling: str
    name: str
    version: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The adapters of a request.

    Attributes:
        front: in front of the prompt, in order; one of them may be a LoRA.
        inside: those that the prompt names, by their spelling there.
    """

    front: Sequence[BoundAdapter] = ()
    inside: Mapping[str, BoundAdapter]

    @property
    def every(self) -> list[BoundAdapter]:
        """Those in front, then each further one inside."""
        in_front = {adapter.digest for adapter in self.front}
        further = {one.digest: one for one in self.inside.values() if one.digest not in in_front}
        return [*self.front, *further.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Composed:
    """A prompt as the engine takes it.

    Attributes:
        parts: texts and soft prompts, in order.
        lora: digest of the LoRA that computes it; "": none.
        text_ids: the ids of all text.
        virtual_tokens: of all soft prompts.
        lengths: positions of each part.
    """

    parts: list[TextPart | SoftPromptPart]
    lora: str
    text_ids: list[int]
    virtual_tokens: int
    lengths: Sequence[int]

    def count_text(self, num_positions: int) -> int:
        """How many of the first positions are text."""
        num_text = 0
        for part, length in zip(self.parts, self.lengths, strict=True):
            if isinstance(part, TextPart):
                num_text += min(length, num_positions)
            num_positions -= length
            if num_positions <= 0:
                break
        return num_text


def compose(prompt: Encoded, bound: Bound, adapters: Sequence[AdapterInfo]) -> Composed:
    """Put a prompt together with its adapters, which are those of `bound.every`, in that order.

    Raises InvalidArgument where one of them cannot stand where it is named.
    """
    found = {adapter.digest: adapter for adapter in adapters}
    _check(bound, found)
    front = [SoftPromptPart(digest=one.digest) for one in bound.front if not found[one.digest].is_lora]
    loras = [one.digest for one in bound.front if found[one.digest].is_lora]
    parts: list[TextPart | SoftPromptPart] = [*front, *(_part(part, bound) for part in prompt)]
    lengths = [
        len(part.token_ids) if isinstance(part, TextPart) else found[part.digest].num_virtual_tokens
        for part in parts
    ]
    text_ids = text_ids_of(prompt)
    return Composed(
        parts=parts,
        lora=loras[0] if loras else "",
        text_ids=text_ids,
        virtual_tokens=sum(lengths) - len(text_ids),
        lengths=lengths,
    )


def check_context(composed: Composed, *, max_tokens: int | None, limit: int) -> None:
    """Raise ContextLengthExceeded, with numbers, where prompt, virtual tokens and output have no room."""
    num_text = len(composed.text_ids)
    num_prompt = num_text + composed.virtual_tokens
    least = 1 if max_tokens is None else max_tokens
    if num_prompt + least <= limit:
        return
    output = "at least 1 token of output" if max_tokens is None else f"max_tokens {max_tokens}"
    raise ContextLengthExceeded(
        f"the prompt has {num_text} tokens + {composed.virtual_tokens} virtual tokens + {output}, "
        f"the limit is {limit}",
        field="prompt" if num_prompt + min(least, 1) > limit else "max_tokens",
    )


def _check(bound: Bound, found: Mapping[str, AdapterInfo]) -> None:
    check_number(len(bound.every), field="adapter")
    check_front([_named(one, found) for one in bound.front], field="adapter")
    check_inside([_named(one, found) for one in bound.inside.values()], field="prompt")


def _named(bound: BoundAdapter, found: Mapping[str, AdapterInfo]) -> Part:
    adapter = found[bound.digest]
    role = Role.LORA if adapter.is_lora else Role.KEY_VALUES if adapter.are_key_values else Role.EMBEDDINGS
    return Part(name=bound.spelling, role=role)


def _part(part: list[int] | SoftPrompt, bound: Bound) -> TextPart | SoftPromptPart:
    if isinstance(part, SoftPrompt):
        return SoftPromptPart(digest=bound.inside[part.adapter].digest)
    return TextPart(token_ids=part)
