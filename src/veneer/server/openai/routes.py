"""The routes under ``/v1``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.responses import PlainTextResponse

from veneer.server.access import caller_of
from veneer.server.openai.answering import Answering, JsonAnswer
from veneer.server.openai.answers import (
    AdapterCard,
    AdapterList,
    ChatCompletion,
    ErrorAnswer,
    ForgetReceipt,
    Model,
    ModelList,
    TextCompletion,
)
from veneer.server.openai.chat import answer_chat
from veneer.server.openai.completions import answer_completion
from veneer.server.openai.management import Management
from veneer.server.openai.requests import ChatRequest, CompletionRequest, LoadRequest, Promotion, Rollback, UnloadRequest

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "whole, or in chunks"}}
ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}
TEXT: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "done"},
    "4XX": {"content": ERROR, "description": "a mistake"},
    "5XX": {"content": ERROR, "description": "trouble"},
}
Name = Annotated[str, Path(max_length=256)]


def make_router(answering: Answering, management: Management) -> APIRouter:
    router = APIRouter(prefix="/v1", responses=ERRORS, tags=["OpenAI"])
    _add_answers(router, answering)
    _add_models(router, management)
    _add_adapters(router, management)
    _add_loading(router, management)
    return router


def _add_answers(router: APIRouter, answering: Answering) -> None:
    @router.post("/chat/completions", response_model=ChatCompletion, responses=EVENTS)
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await answer_chat(answering, request, body)

    @router.post("/completions", response_model=TextCompletion, responses=EVENTS)
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await answer_completion(answering, request, body)


def _add_models(router: APIRouter, management: Management) -> None:
    @router.get("/models", response_model=ModelList)
    async def models(request: Request) -> Response:
        return JsonAnswer(await management.models(caller_of(request)))

    @router.get("/models/{name:path}", response_model=Model)
    async def model(request: Request, name: Name) -> Response:
        return JsonAnswer(await management.model(caller_of(request), name))


def _add_adapters(router: APIRouter, management: Management) -> None:
    @router.get("/adapters", response_model=AdapterList)
    async def adapters(request: Request) -> Response:
        return JsonAnswer(await management.adapters(caller_of(request)))

    @router.get("/adapters/{name}", response_model=AdapterCard)
    async def adapter(request: Request, name: Name) -> Response:
        return JsonAnswer(await management.adapter(caller_of(request), name))

    @router.post("/adapters/{name}/promote", response_model=AdapterCard)
    async def promote(request: Request, name: Name, body: Promotion) -> Response:
        """Point a label, "live" unless said otherwise, to a version: the name alone then means it."""
        return JsonAnswer(await management.promote(caller_of(request), name, body))

    @router.post("/adapters/{name}/rollback", response_model=AdapterCard)
    async def rollback(request: Request, name: Name, body: Rollback | None = None) -> Response:
        """Point a label to where it pointed before."""
        return JsonAnswer(await management.rollback(caller_of(request), name, body or Rollback()))

    @router.delete("/adapters/{name}", response_model=ForgetReceipt)
    async def forget(
        request: Request,
        name: Name,
        reason: Annotated[str, Query(max_length=1000)] = "",
        children: Annotated[Literal["forget", "keep"] | None, Query()] = None,
    ) -> Response:
        """Delete NAME@VERSION, or NAME with all its versions: files, index and memory."""
        return JsonAnswer(await management.forget(caller_of(request), name, reason, children))


def _add_loading(router: APIRouter, management: Management) -> None:
    @router.post("/load_lora_adapter", response_class=PlainTextResponse, responses=TEXT)
    async def load(request: Request, body: LoadRequest) -> str:
        return await management.load(caller_of(request), body)

    @router.post("/unload_lora_adapter", response_class=PlainTextResponse, responses=TEXT)
    async def unload(request: Request, body: UnloadRequest) -> str:
        return await management.unload(caller_of(request), body)
