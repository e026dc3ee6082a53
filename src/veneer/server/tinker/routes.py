"""The routes of the Tinker protocol. Each takes its request apart, asks ``Tinker``, and says what came of it."""

from __future__ import annotations

import json
import secrets
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.responses import FileResponse, JSONResponse

from veneer.server.access import caller_of
from veneer.server.errors import Gone, NotFound
from veneer.server.tinker import requests, wire
from veneer.server.tinker.checkpoints import TYPES, info
from veneer.server.tinker.promises import Promise
from veneer.server.tinker.service import Tinker
from veneer.server.tinker.state import CheckpointRow, RunRow, timestamp
from veneer.types import RequestError

HOLD = 25.0
"""Seconds for which a question for an answer is held: the SDK gives up at 45."""
MOST_ROWS = 1000


def make_router(tinker: Tinker) -> APIRouter:
    router = APIRouter(prefix="/api/v1")
    _add_sampling_routes(router, tinker)  # the busiest first: a request is compared with one route after the other
    _add_training_routes(router, tinker)
    _add_session_routes(router, tinker)
    _add_record_routes(router, tinker)
    _add_checkpoint_routes(router, tinker)
    return router


def _body(kind: type[requests.Body]) -> dict[str, Any]:
    """For the OpenAPI document: handlers read the bytes themselves, as those are what is kept."""
    schema = kind.model_json_schema()
    named = schema.pop("$defs", {})
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": _in_place(schema, named)}}}}}


def _in_place(schema: Any, named: dict[str, Any]) -> Any:
    """A schema with what it refers to written out: its names mean nothing inside of the document."""
    if isinstance(schema, list):
        return [_in_place(part, named) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _in_place(named[schema["$ref"].rpartition("/")[2]], named)
    return {key: _in_place(value, named) for key, value in schema.items()}


async def _read(kind: type[requests.T], request: Request) -> requests.T:
    return requests.parse(kind, await request.body())


def _promised(promise: Promise) -> JSONResponse:
    answer: dict[str, Any] = {"request_id": promise.id, "model_id": promise.facts.get("run")}
    if "sequences" in promise.facts:
        answer["sample_sequence_ids"] = promise.facts["sequences"]
    return JSONResponse({key: value for key, value in answer.items() if value is not None})


# ---------------------------------------------------------------- sessions


def _add_session_routes(router: APIRouter, tinker: Tinker) -> None:
    @router.get("/get_server_capabilities")
    async def capabilities() -> dict[str, Any]:
        models = [
            {"model_name": name, "max_context_length": base.engine.context_length, "trainable": True, "sampleable": True}
            for base in tinker.bases.served
            for name in base.names
        ]
        return {"supported_models": models}

    @router.post("/client/config", **_body(requests.ClientConfig))
    async def client_config(request: Request) -> dict[str, Any]:
        await _read(requests.ClientConfig, request)
        return {"sample_cancel_enabled": True}

    @router.post("/client/dynamic_config", **_body(requests.ClientConfig))
    async def dynamic_config(request: Request) -> dict[str, Any]:
        await _read(requests.ClientConfig, request)
        return {"sample_cancel_enabled": True}

    @router.post("/auth/token")
    async def token() -> dict[str, Any]:
        raise RequestError("this server takes API keys as they are, and gives out no tokens")

    @router.post("/create_session", **_body(requests.CreateSession))
    async def create_session(request: Request) -> dict[str, Any]:
        session = await tinker.create_session(caller_of(request).name, await _read(requests.CreateSession, request))
        return {"type": "create_session", "session_id": session.id}

    @router.post("/session_heartbeat", **_body(requests.Heartbeat))
    async def heartbeat(request: Request) -> dict[str, Any]:
        tinker.heartbeat(caller_of(request).name, (await _read(requests.Heartbeat, request)).session_id)
        return {"type": "session_heartbeat"}

    @router.post("/sessions/{session_id}/finish")
    async def finish(request: Request, session_id: str) -> dict[str, Any]:
        await tinker.finish(caller_of(request).name, session_id)
        return {}

    @router.post("/telemetry")
    async def telemetry() -> dict[str, str]:
        return {"status": "accepted"}

    @router.get("/sessions")
    async def sessions(request: Request, limit: int = 20, offset: int = 0) -> dict[str, Any]:
        owner = caller_of(request).name
        mine = sorted((s for s in tinker.sessions.values() if s.owner == owner), key=lambda s: -s.created)
        return {"sessions": [s.id for s in _page(mine, limit, offset)[0]]}

    @router.get("/sessions/{session_id}")
    async def session(request: Request, session_id: str) -> dict[str, Any]:
        owner = caller_of(request).name
        found = tinker.session(owner, session_id)
        return {
            "training_run_ids": [row.id for row in tinker.rows(owner) if row.session_id == session_id],
            "sampler_ids": [s.id for s in tinker.sampling.samplers.values() if s.session_id == session_id],
            "user_metadata": found.facts.get("user_metadata"),
            "display_name": found.facts.get("display_name"),
        }

    @router.get("/auth/apikey/me")
    async def key(request: Request) -> dict[str, Any]:
        name = caller_of(request).name
        details = {"org_details": {"name": "veneer"}, "user_details": {"email": name}}
        return {"key_id": 0, "name": name, "note": "", "details": details}


# ---------------------------------------------------------------- training


def _add_training_routes(router: APIRouter, tinker: Tinker) -> None:
    @router.post(
        "/forward_backward",
        openapi_extra={"requestBody": {"required": True, "content": {wire.PROTOBUF: {"schema": {"type": "string", "format": "binary"}}}}},
    )
    async def forward_backward(request: Request) -> Response:
        return _promised(await tinker.forward_backward(caller_of(request).name, await request.body()))

    def add(kind: str, model: type[requests.Body]) -> None:
        @router.post(f"/{kind}", name=kind, **_body(model))
        async def operation(request: Request) -> Response:
            raw = await request.body()
            address = requests.parse(requests.Operation, raw)
            return _promised(await tinker.operation(caller_of(request).name, address.model_id, address.seq_id, kind, raw))

    add("optim_step", requests.OptimStep)
    add("save_weights", requests.SaveWeights)
    add("save_weights_for_sampler", requests.SaveWeightsForSampler)
    add("save_weights_external", requests.SaveWeightsExternal)

    @router.post("/create_model", **_body(requests.CreateModel))
    async def create_model(request: Request) -> Response:
        return _promised(await tinker.create_model(caller_of(request).name, await request.body()))

    @router.post("/load_weights", **_body(requests.LoadWeights))
    async def load_weights(request: Request) -> Response:
        return _promised(await tinker.load_weights(caller_of(request).name, await request.body()))

    @router.post("/create_custom_loss", **_body(requests.CreateCustomLoss))
    async def create_custom_loss(request: Request) -> Response:
        return _promised(await tinker.create_custom_loss(caller_of(request).name, await request.body()))

    @router.post("/copy_weights", **_body(requests.CopyWeights))
    async def copy_weights(request: Request) -> dict[str, Any]:
        key = request.headers.get("x-idempotency-key") or secrets.token_hex(16)
        return {"tinker_path": await tinker.copy_weights(caller_of(request).name, await request.body(), key)}

    @router.post("/get_info", **_body(requests.ModelId))
    async def get_info(request: Request) -> dict[str, Any]:
        row = tinker.row(caller_of(request).name, (await _read(requests.ModelId, request)).model_id)
        return {
            "type": "get_info",
            "model_id": row.id,
            "model_data": {"arch": tinker.bases.find(row.base).name, "model_name": row.base},
            "optimizer_config": {"type": "adamw"},
            "is_lora": True,
            "lora_rank": row.lora.rank,
            "model_name": row.base,
        }


# ---------------------------------------------------------------- sampling and answers


def _add_sampling_routes(router: APIRouter, tinker: Tinker) -> None:
    @router.post("/asample", **_body(requests.Sample))
    async def asample(request: Request) -> Response:
        return _promised(await tinker.sample(caller_of(request).name, await request.body()))

    @router.post("/retrieve_future", **_body(requests.RetrieveFuture))
    async def retrieve_future(request: Request) -> Response:
        body = await _read(requests.RetrieveFuture, request)
        promise = await tinker.wait_for(caller_of(request).name, body.request_id, HOLD)
        if not promise.done:
            return JSONResponse({"queue_state": "active", "request_id": promise.id}, 408)
        return Response(promise.answer, media_type=promise.media_type)

    @router.post("/create_sampling_session", **_body(requests.CreateSamplingSession))
    async def create_sampling_session(request: Request) -> dict[str, Any]:
        owner, body = caller_of(request).name, await _read(requests.CreateSamplingSession, request)
        tinker.open_session(owner, body.session_id)
        return {"type": "create_sampling_session", "sampling_session_id": await tinker.sampling.create(owner, body)}

    @router.get("/samplers/{sampler_id}")
    async def sampler(request: Request, sampler_id: str) -> dict[str, Any]:
        row = tinker.sampler(caller_of(request).name, sampler_id)
        return {"sampler_id": row.id, "base_model": row.base, "model_path": row.path}

    @router.post("/retrieve_futures", **_body(requests.RetrieveFutures))
    async def retrieve_futures(request: Request) -> dict[str, Any]:
        body = await _read(requests.RetrieveFutures, request)
        sampler = tinker.sampler(caller_of(request).name, body.target.sampling_session_id)
        return await tinker.sampling.completions(sampler, body, HOLD)

    @router.post("/join_sampling_session", **_body(requests.JoinSamplingSession))
    async def join_sampling_session(request: Request) -> dict[str, Any]:
        body = await _read(requests.JoinSamplingSession, request)
        tinker.sampler(caller_of(request).name, body.sampling_session_id)
        return {"type": "join_sampling_session", "client_counter": 1 + secrets.randbelow(10**9 - 1)}

    @router.post("/cancel_future", **_body(requests.CancelFuture))
    async def cancel_future(request: Request) -> dict[str, Any]:
        tinker.cancel(caller_of(request).name, (await _read(requests.CancelFuture, request)).request_id)
        return {}


# ---------------------------------------------------------------- records


def _page(rows: list[Any], limit: int, offset: int) -> tuple[list[Any], dict[str, int]]:
    if not 0 <= limit <= MOST_ROWS or not 0 <= offset < 2**31:
        raise RequestError(f"limit must be from 0 to {MOST_ROWS} and offset at least 0")
    return rows[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(rows)}


def _checkpoint(row: CheckpointRow) -> dict[str, Any]:
    return {
        "checkpoint_id": row.id,
        "checkpoint_type": TYPES[row.kind],
        "time": timestamp(row.created),
        "tinker_path": row.path,
        "size_bytes": row.size,
        "public": row.public,
        "user_metadata": _texts(row.user_metadata),
        "expires_at": None if row.expires is None else timestamp(row.expires),
    }


def _texts(metadata: dict[str, Any] | None) -> dict[str, str] | None:
    """The protocol gives metadata back as texts."""
    return None if metadata is None else {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}


def _training_run(tinker: Tinker, row: RunRow) -> dict[str, Any]:
    saved = tinker.checkpoints.of_owner(row.owner, row.id)
    newest = {kind: next((_checkpoint(c) for c in saved if c.kind == kind), None) for kind in ("weights", "sampler_weights")}
    return {
        "training_run_id": row.id,
        "base_model": row.base,
        "model_owner": row.owner,
        "is_lora": True,
        "corrupted": tinker.failure(row) is not None,
        "lora_rank": row.lora.rank,
        "last_request_time": timestamp(tinker.last_request(row)),
        "last_checkpoint": newest["weights"],
        "last_sampler_checkpoint": newest["sampler_weights"],
        "user_metadata": _texts(row.user_metadata),
    }


def _add_record_routes(router: APIRouter, tinker: Tinker) -> None:
    @router.get("/training_runs")
    async def training_runs(request: Request, limit: int = 20, offset: int = 0) -> dict[str, Any]:
        rows, cursor = _page(tinker.rows(caller_of(request).name), limit, offset)
        return {"training_runs": [_training_run(tinker, row) for row in rows], "cursor": cursor}

    @router.get("/training_runs/{run_id}")
    async def training_run(request: Request, run_id: str) -> dict[str, Any]:
        return _training_run(tinker, tinker.row(caller_of(request).name, run_id))

    @router.get("/training_runs/{run_id}/checkpoints")
    async def checkpoints_of_run(request: Request, run_id: str) -> dict[str, Any]:
        owner = caller_of(request).name
        tinker.row(owner, run_id)
        rows = tinker.checkpoints.of_owner(owner, run_id)
        return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": {"offset": 0, "limit": len(rows), "total_count": len(rows)}}

    @router.get("/checkpoints")
    async def checkpoints(request: Request, limit: int = 20, offset: int = 0) -> dict[str, Any]:
        rows, cursor = _page(tinker.checkpoints.of_owner(caller_of(request).name), limit, offset)
        return {"checkpoints": [_checkpoint(row) for row in rows], "cursor": cursor}

    @router.post("/weights_info", **_body(requests.WeightsInfo))
    async def weights_info(request: Request) -> dict[str, Any]:
        body = await _read(requests.WeightsInfo, request)
        return info(tinker.checkpoints.find(body.tinker_path, caller_of(request).name))


# ---------------------------------------------------------------- checkpoints


def _add_checkpoint_routes(router: APIRouter, tinker: Tinker) -> None:
    one = "/training_runs/{run_id}/checkpoints/{kind}/{name}"

    def own(request: Request, run_id: str, kind: str, name: str) -> CheckpointRow:
        """The caller's own: what is public may be read by others, not changed."""
        owner = caller_of(request).name
        row = tinker.checkpoints.find(f"tinker://{run_id}/{kind}/{name}", owner)
        if row.owner != owner:
            raise NotFound(f"there is no checkpoint {row.path!r} of yours")
        return row

    @router.delete(one, status_code=204)
    async def delete(request: Request, run_id: str, kind: str, name: str) -> Response:
        await tinker.checkpoints.delete(own(request, run_id, kind, name))
        return Response(status_code=204)

    @router.post(f"{one}/publish", status_code=204)
    async def publish(request: Request, run_id: str, kind: str, name: str) -> Response:
        await tinker.checkpoints.change(own(request, run_id, kind, name), public=True)
        return Response(status_code=204)

    @router.delete(f"{one}/publish", status_code=204)
    async def unpublish(request: Request, run_id: str, kind: str, name: str) -> Response:
        await tinker.checkpoints.change(own(request, run_id, kind, name), public=False)
        return Response(status_code=204)

    @router.put(f"{one}/ttl", status_code=204, **_body(requests.SetTtl))
    async def set_ttl(request: Request, run_id: str, kind: str, name: str) -> Response:
        body = await _read(requests.SetTtl, request)
        await tinker.checkpoints.set_ttl(own(request, run_id, kind, name), body.ttl_seconds)
        return Response(status_code=204)

    @router.get("/training_runs/{run_id}/checkpoints/external_weights/{name}/external_weights_urls")
    async def external_urls(request: Request, run_id: str, name: str) -> dict[str, Any]:
        token, files, expires = await tinker.checkpoints.link(own(request, run_id, "external_weights", name))
        here = str(request.base_url).rstrip("/")
        return {"urls": {file: f"{here}/api/v1/files/{token}/{file}" for file in files}, "expires": timestamp(expires)}

    @router.get("/files/{token}/{name}")
    async def file(token: str, name: str) -> Response:
        path = tinker.checkpoints.linked_file(token, name)
        if path is None:
            raise Gone("this link is over, or never was; ask for external_weights_urls again")
        return FileResponse(path, media_type="application/octet-stream")
