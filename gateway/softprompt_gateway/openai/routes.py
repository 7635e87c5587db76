"""Routes under /v1 that OpenAI's clients call, and vLLM's /tokenize and /detokenize."""

from collections.abc import Callable, Coroutine
from functools import partial
from itertools import chain
from typing import Any

import structlog
from fastapi import APIRouter
from softprompt_api.access import Scope
from softprompt_api.names import shown
from softprompt_api.structured import FIELD as STRUCTURED
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from softprompt_gateway.bases import check_size, is_served
from softprompt_gateway.caller import Caller
from softprompt_gateway.disconnect import unless_gone
from softprompt_gateway.documented import answered, generated, json_body, link
from softprompt_gateway.errors import Refused, fields_spelled
from softprompt_gateway.gateway import Gateway
from softprompt_gateway.guard import GuardedRoute
from softprompt_gateway.openai.answering import Answering
from softprompt_gateway.openai.answers import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Detokenized,
    ModelCard,
    ModelList,
    ResponseAnswer,
    ResponseEvent,
    Tokenized,
)
from softprompt_gateway.openai.chat import ChatRequest, ChatStyle
from softprompt_gateway.openai.completions import CompletionRequest, CompletionStyle
from softprompt_gateway.openai.fields import GenerationFields
from softprompt_gateway.openai.generation import all_of
from softprompt_gateway.openai.job import Job
from softprompt_gateway.openai.models import adapter_card, adapter_cards, base_card, composed_card, listing
from softprompt_gateway.openai.parts import Parts
from softprompt_gateway.openai.responses.request import ResponsesRequest
from softprompt_gateway.openai.responses.responding import Responding
from softprompt_gateway.openai.starting import Starting
from softprompt_gateway.openai.structured import OLD_NAMES
from softprompt_gateway.openai.tokens import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    parse_tokenize,
    tokenized,
)
from softprompt_gateway.openai.tool_style import ToolStyle
from softprompt_gateway.rates import Meter
from softprompt_gateway.resolve import Named, Target

_log = structlog.get_logger()

REQUEST_MODELS = (
    CompletionRequest,
    ChatRequest,
    ResponsesRequest,
    TokenizeCompletionRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)


def openai_router(gateway: Gateway) -> APIRouter:
    """The routes, over one gateway's parts."""
    infers = gateway.route(Scope.INFER)
    answers_itself = gateway.route(Scope.INFER, _PlainRoute)
    router = APIRouter(route_class=infers)
    routes = _Routes(gateway)
    completes, chats = generated(Completion, CompletionChunk), generated(ChatCompletion, ChatChunk)
    responds, tokenizes = generated(ResponseAnswer, ResponseEvent), answered(Tokenized)
    for path, handler, models, answer, kind in (
        ("/v1/completions", routes.complete, (CompletionRequest,), completes, answers_itself),
        ("/v1/chat/completions", routes.chat, (ChatRequest,), chats, answers_itself),
        ("/v1/responses", routes.respond, (ResponsesRequest,), responds, answers_itself),
        ("/tokenize", routes.tokenize, (TokenizeCompletionRequest, TokenizeChatRequest), tokenizes, infers),
        ("/detokenize", routes.detokenize, (DetokenizeRequest,), answered(Detokenized), infers),
    ):
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            openapi_extra=json_body(*models) | answer,
            response_class=JSONResponse,
            route_class_override=kind,
        )
    for method in ("GET", "DELETE"):  # each on its own: an operation has an id of its own
        router.add_api_route(
            "/v1/responses/{id_}", routes.stored_response, methods=[method], openapi_extra=answered(ResponseAnswer)
        )
    first = link("GET", "/v1/models/{id_}", id_="$response.body#/data/0/id")
    lists = answered(ModelList, links={"first": first})
    router.add_api_route("/v1/models", routes.models, methods=["GET"], openapi_extra=lists)
    router.add_api_route("/v1/models/{id_:path}", routes.model, methods=["GET"], openapi_extra=answered(ModelCard))
    return router


class _PlainRoute(GuardedRoute):
    """A route whose handler takes the request and makes the response: FastAPI has nothing to work out."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The handler itself."""
        return self.endpoint


class _Routes:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._max_choices = gateway.settings.max_choices
        self._resolver = gateway.resolver
        self._inference = gateway.clients.inference
        starting = Starting(self._resolver, self._inference, gateway.metrics)
        self._answering = Answering(starting, gateway.metrics)
        self._responding = Responding(starting, gateway.metrics)

    async def complete(self, request: Request) -> Response:
        """Complete one or more prompts."""
        body = await self._gateway.body(request, CompletionRequest)
        return await unless_gone(request, self._complete(body, request))

    async def _complete(self, body: CompletionRequest, request: Request) -> Response:
        _warn_of_old_names(body, request.state.request_id)
        with fields_spelled(**body.spelled):
            return await self._answering.answer(
                _named(body, request), partial(self._completion_with, body, request)
            )

    async def _completion_with(self, body: CompletionRequest, request: Request, target: Target) -> Job:
        calls = body.calls(target, request_id=request.state.request_id, max_choices=self._max_choices)
        echoes = (
            await all_of([self._text_of(prompt, target) for prompt in body.prompt])
            if body.echo
            else [""] * len(calls)
        )
        return Job(
            target=target,
            calls=calls,
            choices_per_prompt=body.generated_per_prompt,
            kept_per_prompt=body.choices_per_prompt,
            style=CompletionStyle(body, echoes),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            include_usage_so_far=body.include_usage_so_far,
            silent=body.logprobs is None and body.prompt_logprobs is None and not body.return_token_ids,
            meter=Meter.of(request.scope),
        )

    async def _text_of(self, prompt: str | list[int] | Parts, target: Target) -> str:
        """What is echoed; where a soft prompt stands, nothing: virtual tokens have no text."""
        if isinstance(prompt, Parts):
            return prompt.text
        return prompt if isinstance(prompt, str) else await self._inference.detokenize(target.place, prompt)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        body = await self._gateway.body(request, ChatRequest)
        return await unless_gone(request, self._chat(body, request))

    async def _chat(self, body: ChatRequest, request: Request) -> Response:
        _warn_of_old_names(body, request.state.request_id)
        with fields_spelled(**body.spelled):
            return await self._answering.answer(
                _named(body, request, prompt_field="messages"), partial(self._conversation_with, body, request)
            )

    async def _conversation_with(self, body: ChatRequest, request: Request, target: Target) -> Job:
        return Job(
            target=target,
            calls=body.calls(target, request_id=request.state.request_id, max_choices=self._max_choices),
            choices_per_prompt=body.choices_per_prompt,
            style=ToolStyle(body) if body.callable else ChatStyle(body),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            include_usage_so_far=body.include_usage_so_far,
            silent=not body.logprobs and not body.return_token_ids and not body.callable,
            meter=Meter.of(request.scope),
        )

    async def respond(self, request: Request) -> Response:
        """Answer an input, in the shape of OpenAI's Responses API."""
        body = await self._gateway.body(request, ResponsesRequest)
        return await unless_gone(request, self._respond(body, request))

    async def _respond(self, body: ResponsesRequest, request: Request) -> Response:
        request_id: str = request.state.request_id
        _warn_of_old_names(body, request_id)
        with fields_spelled(**body.spelled):
            return await self._responding.respond(
                body,
                _named(body, request, prompt_field="input"),
                request_id=request_id,
                meter=Meter.of(request.scope),
            )

    async def stored_response(self, id_: str) -> dict[str, Any]:
        """A response that was stored: there is none."""
        message = f"there is no response {shown(id_)}: responses are not stored; send the earlier items as input"
        raise Refused(message, code="not_found", status=404, param="response_id")

    async def models(self, request: Request) -> Response:
        """List the base models and every adapter of theirs."""
        caller, bases = Caller.of(request), await self._resolver.bases()
        adapters = (
            card
            for version in self._gateway.catalog.versions(caller.may_use)
            if (served := bases.find(version)) is not None and is_served(version, served.base_model)
            for card in adapter_cards(caller.told(version), served)
        )
        return StreamingResponse(listing(chain(map(base_card, bases), adapters)), media_type="application/json")

    async def model(self, request: Request, id_: str) -> dict[str, Any]:
        """Describe one model: a base model, or an adapter by name, name@version or digest."""
        target = await self._resolver.resolve(Named(model=id_, caller=Caller.of(request)))
        if not target.front:
            return base_card(target.served)
        for bound in target.front:
            check_size(bound.version, target.served.base_model)
        if len(target.front) > 1:
            return composed_card(target.front, target.served, id_=id_)
        [bound] = target.front
        return adapter_card(bound.version, target.served, task=bound.task, id_=id_)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Show the token ids of a text or a conversation."""
        body = await self._gateway.json(request, parse_tokenize)
        named = Named(
            model=await self._model_of(body.model),
            caller=Caller.of(request),
            adapters=tuple(body.adapters or ()),
            inside=tuple(body.soft_prompts),
            prompt_field=body.prompt_field,
        )
        target = await self._resolver.resolve(named)
        answer = await unless_gone(request, self._inference.tokenize(target.place, body.call(target)))
        return tokenized(answer, with_strings=bool(body.return_token_strs))

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """Turn token ids into text."""
        body = await self._gateway.json(request, DetokenizeRequest.checked)
        named = Named(model=await self._model_of(body.model), caller=Caller.of(request))
        target = await self._resolver.resolve(named)
        with fields_spelled(ids="tokens"):
            return {"prompt": await unless_gone(request, self._inference.detokenize(target.place, body.tokens))}

    async def _model_of(self, model: str | None) -> str:
        """The base model where none is named."""
        return model if model is not None else (await self._resolver.served()).base_model.id


def _named(
    body: CompletionRequest | ChatRequest | ResponsesRequest, request: Request, *, prompt_field: str = "prompt"
) -> Named:
    return Named(
        model=body.model,
        caller=Caller.of(request),
        adapters=tuple(body.adapters or ()),
        inside=tuple(body.soft_prompts),
        prompt_field=prompt_field,
    )


def _warn_of_old_names(body: GenerationFields, request_id: str) -> None:
    for name, member in OLD_NAMES.items():
        if getattr(body, name) is not None:
            _log.warning("old field name", field=name, instead=f"{STRUCTURED}.{member}", request_id=request_id)
