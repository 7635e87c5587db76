"""Protobuf messages to what the service works with, and back."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from softprompt_api.errors import InvalidArgument
from softprompt_api.inference.v1 import inference_pb2 as pb
from softprompt_api.params import SamplingParams
from softprompt_api.structured import FIELD as STRUCTURED
from softprompt_api.structured import StructuredOutputsParams
from softprompt_api.tenants import check_tenant

from softprompt_inference.adapters.residency import Resident, Tier
from softprompt_inference.choice import Delta, Finished, PromptLogprobs
from softprompt_inference.composed import BoundAdapter
from softprompt_inference.engine.messages import Finish, Logprobs, Nearest
from softprompt_inference.generation import Accepted, Event, GenerateCall, Usage
from softprompt_inference.prompts import ChatPrompt, IdsPrompt, PartsPrompt, Prompt, TextPrompt
from softprompt_inference.text import ChatMessage, SoftPrompt, Tokenizer, ToolCall

MAX_REQUEST_ID_CHARACTERS = 128
MAX_CACHE_SALT_CHARACTERS = 512
DEFAULT_NEAREST = 5
MAX_NEAREST = 20

_OPTIONAL = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "skip_special_tokens",
)
_KINDS = {"json_schema": "json", "regex": "regex", "lark": "grammar"}
_REASONS = {Finish.STOP: pb.FINISH_REASON_STOP, Finish.LENGTH: pb.FINISH_REASON_LENGTH}


def to_call(request: pb.GenerateRequest, defaults: Mapping[str, Any]) -> GenerateCall:
    """The request, checked as far as it can be without the model; InvalidArgument names the field.

    Args:
        defaults: sampling parameters where it does not say.
    """
    request_id = request.request_id
    if len(request_id) > MAX_REQUEST_ID_CHARACTERS or not request_id.isprintable():
        raise InvalidArgument(
            f"request_id must be at most {MAX_REQUEST_ID_CHARACTERS} printable characters", field="request_id"
        )
    if len(request.cache_salt) > MAX_CACHE_SALT_CHARACTERS:
        raise InvalidArgument(f"cache_salt has at most {MAX_CACHE_SALT_CHARACTERS} characters", field="cache_salt")
    return GenerateCall(
        prompt=to_prompt(request),
        params=to_params(request.sampling, defaults),
        adapter=request.adapter,
        salt=request.cache_salt,
        tenant=check_tenant(request.tenant) if request.tenant else "",
    )


def to_params(sampling: pb.SamplingParams, defaults: Mapping[str, Any]) -> SamplingParams:
    """Sampling parameters; InvalidArgument names the field that is out of range."""
    return SamplingParams(
        **{"max_tokens": None, **defaults, **_given(sampling)},
        stop=tuple(sampling.stop),
        stop_token_ids=tuple(sampling.stop_token_ids),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
        logit_bias=dict(sampling.logit_bias),
        n=sampling.n or 1,
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        structured_outputs=_to_structured(sampling.grammar) if sampling.HasField("grammar") else None,
    )


def _to_structured(grammar: pb.Grammar) -> StructuredOutputsParams:
    match grammar.WhichOneof("kind"):
        case "choice":
            return StructuredOutputsParams(choice=tuple(grammar.choice.texts))
        case "json_object":
            return StructuredOutputsParams(json_object=grammar.json_object)
        case None:
            raise InvalidArgument("a grammar needs a kind", field=STRUCTURED)
        case kind:
            return StructuredOutputsParams(**{_KINDS[kind]: getattr(grammar, kind)})


def _given(sampling: Message) -> dict[str, Any]:
    return {name: getattr(sampling, name) for name in _OPTIONAL if sampling.HasField(name)}


def to_prompt(request: pb.GenerateRequest | pb.TokenizeRequest) -> Prompt:
    """The prompt; InvalidArgument when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            return TextPrompt(text=request.text, add_special_tokens=_or_true(request, "add_special_tokens"))
        case "chat":
            return _to_chat(request.chat)
        case "token_ids":
            assert isinstance(request, pb.GenerateRequest)
            return IdsPrompt(token_ids=request.token_ids.ids)
        case "parts":
            parts = [_to_part(part) for part in request.parts.parts]
            return PartsPrompt(parts=parts, add_special_tokens=_or_true(request, "add_special_tokens"))
        case _:
            raise InvalidArgument("the prompt is missing", field="prompt")


def _to_chat(chat: pb.ChatPrompt) -> ChatPrompt:
    return ChatPrompt(
        messages=[
            ChatMessage(
                role=message.role,
                content=_to_content(message, number),
                name=message.name,
                tool_calls=tuple(
                    ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
                ),
                tool_call_id=message.tool_call_id,
            )
            for number, message in enumerate(chat.messages)
        ],
        tools=tuple(chat.tools),
        add_generation_prompt=_or_true(chat, "add_generation_prompt"),
        continue_final_message=chat.continue_final_message,
        chat_template_kwargs=chat.chat_template_kwargs,
    )


def _to_part(part: pb.PromptPart) -> str | Sequence[int] | SoftPrompt:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "token_ids":
            return part.token_ids.ids
        case "soft_prompt":
            return SoftPrompt(adapter=part.soft_prompt)
        case _:
            raise InvalidArgument("a part of the prompt is neither text nor ids nor a soft prompt", field="prompt")


def _to_content(message: pb.ChatMessage, number: int) -> str | Sequence[str | SoftPrompt]:
    if not message.parts:
        return message.content
    field = f"messages[{number}].parts"
    if message.content:
        raise InvalidArgument("give content or parts, not both", field=field)
    return [_to_content_part(part, field) for part in message.parts]


def _to_content_part(part: pb.ContentPart, field: str) -> str | SoftPrompt:
    match part.WhichOneof("part"):
        case "text":
            return part.text
        case "soft_prompt":
            return SoftPrompt(adapter=part.soft_prompt)
        case _:
            raise InvalidArgument("a part is neither text nor a soft prompt", field=field)


def _or_true(message: Message, field: str) -> bool:
    return bool(getattr(message, field)) if message.HasField(field) else True


_TIERS = {"host": pb.RESIDENT_TIER_HOST, "device": pb.RESIDENT_TIER_DEVICE}


def to_resident(resident: Resident) -> pb.ResidentAdapter:
    """An adapter in memory."""
    return pb.ResidentAdapter(
        digest=resident.adapter.digest,
        adapter=resident.adapter.spelling,
        tier=_TIERS[resident.tier],
        size_bytes=resident.adapter.size_bytes,
        num_virtual_tokens=resident.adapter.num_virtual_tokens,
        idle_s=resident.idle_s,
        hits=resident.hits,
        in_use=resident.users,
        pinned=resident.is_pinned,
    )


def to_tier(tier: Tier) -> pb.AdapterTier:
    """What a tier of adapters holds."""
    return pb.AdapterTier(
        tier=_TIERS[tier.name], num_adapters=tier.num_adapters, size_bytes=tier.size_bytes, hits=tier.hits
    )


def to_top_k(request: pb.NearestTokensRequest) -> int:
    """How many tokens are wanted for each virtual token."""
    if not 0 <= request.top_k <= MAX_NEAREST:
        raise InvalidArgument(f"top_k must be 1 to {MAX_NEAREST}", field="top_k")
    return request.top_k or DEFAULT_NEAREST


def to_nearest(bound: BoundAdapter, found: Nearest, tokenizer: Tokenizer) -> pb.NearestTokensResponse:
    """The tokens nearest to each virtual token of an adapter."""
    return pb.NearestTokensResponse(
        adapter_name=bound.name,
        adapter_version=bound.version,
        adapter_digest=bound.digest,
        virtual_tokens=[
            pb.VirtualToken(
                norm=row.norm,
                nearest=[
                    pb.NearToken(token_id=token_id, cosine=cosine, token=tokenizer.token_text(token_id))
                    for token_id, cosine in row.tokens
                ],
            )
            for row in found.rows
        ],
    )


def to_response(event: Event, tokenizer: Tokenizer) -> pb.GenerateResponse:
    """One event of a generation."""
    response = pb.GenerateResponse()
    write_response(event, response, tokenizer)
    return response


def write_response(event: Event, response: pb.GenerateResponse, tokenizer: Tokenizer) -> None:
    """Write one event into an empty message, which may be part of another: copying takes longer than writing."""
    match event:
        case Delta():
            delta = response.delta
            delta.index = event.index
            delta.text = event.text
            delta.token_ids.extend(event.token_ids)
            if event.logprobs:
                delta.logprobs.extend(_to_logprobs(event.token_ids, event.logprobs, tokenizer))
        case PromptLogprobs():
            response.prompt_logprobs.tokens.extend(_to_logprobs(event.token_ids, event.logprobs, tokenizer))
            response.prompt_logprobs.starts_unpredicted = event.logprobs[0] is None
        case Finished():
            finished = pb.Finished(
                index=event.index,
                reason=_REASONS[event.reason],
                stop_string=event.stop_string,
                stop_token_id=event.stop_token_id,
            )
            response.finished.CopyFrom(finished)
        case Accepted():
            response.accepted.CopyFrom(_to_accepted(event))
        case Usage():
            usage = pb.Usage(
                prompt_tokens=event.prompt_tokens,
                completion_tokens=event.completion_tokens,
                virtual_tokens=event.virtual_tokens,
                cached_tokens=event.cached_tokens,
            )
            response.usage.CopyFrom(usage)


def _to_accepted(event: Accepted) -> pb.Accepted:
    accepted = pb.Accepted(
        prompt_token_ids=event.prompt_token_ids,
        virtual_tokens=event.virtual_tokens,
        adapters=map(_to_bound, event.adapters),
    )
    if event.adapters:
        first = event.adapters[0]
        accepted.adapter_name = first.name
        accepted.adapter_version = first.version
        accepted.adapter_digest = first.digest
    return accepted


def _to_bound(adapter: BoundAdapter) -> pb.BoundAdapter:
    return pb.BoundAdapter(name=adapter.name, version=adapter.version, digest=adapter.digest)


def _to_logprobs(
    token_ids: Sequence[int], logprobs: Sequence[Logprobs | None], tokenizer: Tokenizer
) -> list[pb.TokenLogprob]:
    return [
        pb.TokenLogprob(
            chosen=_to_entry(token_id, entry.chosen if entry else 0.0, tokenizer),
            top=[_to_entry(top_id, logprob, tokenizer) for top_id, logprob in entry.top] if entry else (),
        )
        for token_id, entry in zip(token_ids, logprobs, strict=True)
    ]


def _to_entry(token_id: int, logprob: float, tokenizer: Tokenizer) -> pb.LogprobEntry:
    return pb.LogprobEntry(
        token_id=token_id,
        logprob=logprob,
        token=tokenizer.token_text(token_id),
        token_bytes=tokenizer.token_bytes(token_id),
        is_special=tokenizer.is_special(token_id),
    )
