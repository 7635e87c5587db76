"""Routes under /v1 that OpenAI's clients call, and vLLM's /tokenize and /detokenize."""

from collections.abc import Callable, Coroutine
from typing import Any

import structlog
from fastapi import APIRouter
from fastapi.routing import APIRoute
from softprompt_api.structured import FIELD as STRUCTURED
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from softprompt_gateway.disconnect import unless_gone
from softprompt_gateway.documented import json_body
from softprompt_gateway.errors import fields_spelled
from softprompt_gateway.gateway import Gateway
from softprompt_gateway.openai.answering import Answering
from softprompt_gateway.openai.chat import ChatRequest, ChatStyle
from softprompt_gateway.openai.completions import CompletionRequest, CompletionStyle
from softprompt_gateway.openai.fields import GenerationFields
from softprompt_gateway.openai.generation import all_of
from softprompt_gateway.openai.job import Job
from softprompt_gateway.openai.models import adapter_card, adapter_cards, base_card
from softprompt_gateway.openai.structured import OLD_NAMES
from softprompt_gateway.openai.tokens import (
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeCompletionRequest,
    parse_tokenize,
    tokenized,
)
from softprompt_gateway.openai.tool_style import ToolStyle

_log = structlog.get_logger()

REQUEST_MODELS = (
    CompletionRequest,
    ChatRequest,
    TokenizeCompletionRequest,
    TokenizeChatRequest,
    DetokenizeRequest,
)


def openai_router(gateway: Gateway) -> APIRouter:
    """The routes, over one gateway's parts."""
    router = APIRouter()
    routes = _Routes(gateway)
    for path, handler, models, kind in (
        ("/v1/completions", routes.complete, (CompletionRequest,), _PlainRoute),
        ("/v1/chat/completions", routes.chat, (ChatRequest,), _PlainRoute),
        ("/tokenize", routes.tokenize, (TokenizeCompletionRequest, TokenizeChatRequest), APIRoute),
        ("/detokenize", routes.detokenize, (DetokenizeRequest,), APIRoute),
    ):
        router.add_api_route(
            path,
            handler,
            methods=["POST"],
            openapi_extra=json_body(*models),
            response_class=JSONResponse,
            route_class_override=kind,
        )
    router.add_api_route("/v1/models", routes.models, methods=["GET"])
    router.add_api_route("/v1/models/{id_:path}", routes.model, methods=["GET"])
    return router


class _PlainRoute(APIRoute):
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
        self._answering = Answering(self._inference, gateway.metrics)

    async def complete(self, request: Request) -> Response:
        """Complete one or more prompts."""
        body = CompletionRequest.checked(await self._gateway.json(request))
        return await unless_gone(request, self._complete(body, request.state.request_id))

    async def _complete(self, body: CompletionRequest, request_id: str) -> Response:
        _warn_of_old_names(body, request_id)
        target = await self._resolver.resolve(body.model)
        calls = body.calls(target, request_id=request_id, max_choices=self._max_choices)
        echoes = (
            await all_of([self._text_of(prompt) for prompt in body.prompt]) if body.echo else [""] * len(calls)
        )
        job = Job(
            target=target,
            calls=calls,
            choices_per_prompt=body.choices_per_prompt,
            style=CompletionStyle(body, echoes),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            silent=body.logprobs is None and not body.return_token_ids,
        )
        with fields_spelled(**{STRUCTURED: body.form_field}):
            return await self._answering.answer(job)

    async def _text_of(self, prompt: str | list[int]) -> str:
        return prompt if isinstance(prompt, str) else await self._inference.detokenize(prompt)

    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        body = ChatRequest.checked(await self._gateway.json(request))
        return await unless_gone(request, self._chat(body, request.state.request_id))

    async def _chat(self, body: ChatRequest, request_id: str) -> Response:
        _warn_of_old_names(body, request_id)
        target = await self._resolver.resolve(body.model)
        job = Job(
            target=target,
            calls=body.calls(target, request_id=request_id, max_choices=self._max_choices),
            choices_per_prompt=body.choices_per_prompt,
            style=ToolStyle(body) if body.callable else ChatStyle(body),
            stream=bool(body.stream),
            include_usage=body.include_usage,
            silent=not body.logprobs and not body.return_token_ids and not body.callable,
        )
        with fields_spelled(**{STRUCTURED: body.form_field}):
            return await self._answering.answer(job)

    async def models(self) -> dict[str, Any]:
        """List the base model and every adapter."""
        served = await self._resolver.served()
        adapters = [
            card for version in self._gateway.catalog.versions() for card in adapter_cards(version, served)
        ]
        return {"object": "list", "data": [base_card(served), *adapters]}

    async def model(self, id_: str) -> dict[str, Any]:
        """Describe one model: the base model, or an adapter by name, name@version or digest."""
        target = await self._resolver.resolve(id_)
        if target.adapter is None:
            return base_card(target.served)
        return adapter_card(target.adapter, target.served, task=target.task, id_=id_)

    async def tokenize(self, request: Request) -> dict[str, Any]:
        """Show the token ids of a text or a conversation."""
        body = parse_tokenize(await self._gateway.json(request))
        digest = await self._digest_of(body.model)
        answer = await unless_gone(request, self._inference.tokenize(body.call(digest)))
        return tokenized(answer, with_strings=bool(body.return_token_strs))

    async def detokenize(self, request: Request) -> dict[str, Any]:
        """Turn token ids into text."""
        body = DetokenizeRequest.checked(await self._gateway.json(request))
        await self._digest_of(body.model)
        with fields_spelled(ids="tokens"):
            return {"prompt": await unless_gone(request, self._inference.detokenize(body.tokens))}

    async def _digest_of(self, model: str | None) -> str:
        return (await self._resolver.resolve(model)).digest if model is not None else ""


def _warn_of_old_names(body: GenerationFields, request_id: str) -> None:
    for name, member in OLD_NAMES.items():
        if getattr(body, name) is not None:
            _log.warning("old field name", field=name, instead=f"{STRUCTURED}.{member}", request_id=request_id)
