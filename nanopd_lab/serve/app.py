"""The endpoints: OpenAI's completions and chat, and what operators ask for.

POST /v1/completions   POST /v1/chat/completions   GET /v1/models   GET /health   GET /metrics
"""

from __future__ import annotations

import asyncio
import hmac
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from nanopd_lab.cluster.actions import ClusterBusyError, ClusterDownError
from nanopd_lab.cluster.cluster import Cluster
from nanopd_lab.cluster.outputs import ClusterOutput
from nanopd_lab.core import SamplingParams
from nanopd_lab.engine.prompts import Prompt, render_chat, tokenize
from nanopd_lab.errors import InvalidRequestError
from nanopd_lab.serve.bridge import Bridge
from nanopd_lab.serve.events import events_of, following
from nanopd_lab.serve.replies import Reply, error_body
from nanopd_lab.serve.schema import ChatRequest, CompletionRequest, Sampled, StreamOptions
from nanopd_lab.serve.telemetry import Telemetry

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics")
RETRY_AFTER_S = 1
GONE = 499  # nginx's "client closed request"; nobody reads it
T = TypeVar("T")


class _Unauthorized(Exception):  # noqa: N818
    pass


def create_app(
    cluster: Cluster, name: str | None = None, api_key: str | None = None, per_request_metrics: bool = False
) -> FastAPI:
    """The server in front of a cluster, which the caller closes.

    Args:
        name: that clients call the model by; default: the cluster's
        api_key: that clients must send as `Authorization: Bearer …`; None: anybody may ask
        per_request_metrics: answers say how long things took, see `replies.timing`

    Raises:
        ValueError: see `Bridge`.
    """
    name = name or cluster.config.model
    telemetry = Telemetry()
    bridge = Bridge(cluster, telemetry.ended)
    telemetry.watch(bridge)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        bridge.close()

    app = FastAPI(title="nanopd_lab", lifespan=lifespan)
    app.state.bridge = bridge  # for `Server`

    def refuse(status: int, message: str, kind: str, param: str | None = None) -> JSONResponse:
        telemetry.refused(status)
        headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
        return JSONResponse(error_body(message, kind, status, param), status, headers)

    def answer_for(error: Exception) -> JSONResponse:
        if isinstance(error, ClusterBusyError):
            return refuse(503, str(error), "overloaded_error")
        if isinstance(error, ClusterDownError):
            return refuse(503, str(error), "service_unavailable_error")
        if isinstance(error, InvalidRequestError):
            return refuse(400, str(error), "invalid_request_error")
        return refuse(500, str(error), "server_error")

    @app.exception_handler(RequestValidationError)
    async def wrong(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        if found["type"] == "json_invalid" or (found["loc"] == ("body",) and found["type"] != "value_error"):
            reason = found.get("ctx", {}).get("error", "")
            return refuse(
                400,
                f"the body is no JSON object{reason and ': '}{reason}; send one, with Content-Type: application/json",
                "invalid_request_error",
            )
        message = found["msg"].removeprefix("Value error, ")
        place = ".".join(str(part) for part in found["loc"] if part != "body") or None
        return refuse(400, f"{place}: {message}" if place else message, "invalid_request_error", place)

    @app.exception_handler(_Unauthorized)
    async def unauthorized(request: Request, error: _Unauthorized) -> JSONResponse:
        return refuse(401, str(error), "authentication_error")

    @app.exception_handler(404)
    async def elsewhere(request: Request, error: Exception) -> JSONResponse:
        asked = f"{request.method} {request.url.path}"
        return refuse(404, f"{asked} is not served here; there are {', '.join(ENDPOINTS)}", "not_found_error")

    @app.exception_handler(405)
    async def otherwise(request: Request, error: Exception) -> JSONResponse:
        headers = getattr(error, "headers", None) or {}
        asked, allowed = f"{request.method} {request.url.path}", headers.get("Allow", "another method")
        found = refuse(405, f"{asked} is not allowed; use {allowed}", "invalid_request_error")
        found.headers.update(headers)
        return found

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return refuse(500, f"{type(error).__name__}: {error}", "server_error")  # the log has the rest

    def guard(request: Request) -> None:
        if api_key is None:
            return
        sent = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(sent, f"Bearer {api_key}".encode()):
            raise _Unauthorized("the API key is missing or wrong; send Authorization: Bearer KEY")

    def wrong_model(asked: Sampled) -> JSONResponse | None:
        if asked.model in (None, name):
            return None
        return refuse(
            404, f"model {asked.model!r} is not served here; ask for {name!r}", "not_found_error", "model"
        )

    async def serve(
        request: Request, asked: Sampled, prompts: Sequence[Prompt], params: SamplingParams, chat: bool
    ) -> Response:
        reply = Reply(
            f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            name,
            chat,
            params.logprobs or 0,
            per_request_metrics,
        )
        if asked.stream:
            events = events_of(bridge, reply, prompts, params, asked.stream_options or StreamOptions())
            try:  # what is refused is refused with a status
                first = await _unless_gone(request, asyncio.ensure_future(anext(events)))
            except Exception as error:
                return answer_for(error)
            if first is None:
                return Response(status_code=GONE)
            return StreamingResponse(following(first, events), media_type="text/event-stream")
        try:
            outputs = await _unless_gone(request, asyncio.ensure_future(_all(bridge, prompts, params)))
        except Exception as error:
            return answer_for(error)
        if outputs is None:
            return Response(status_code=GONE)
        if failed := [sample.error for output in outputs for sample in output.outputs if sample.error]:
            return refuse(500, failed[0], "server_error")
        return JSONResponse(reply.whole(outputs))

    @app.post("/v1/completions", dependencies=[Depends(guard)])
    async def completions(request: Request, asked: CompletionRequest) -> Response:
        if refusal := wrong_model(asked):
            return refusal
        try:
            return await serve(request, asked, asked.prompts(), asked.sampling(), chat=False)
        except InvalidRequestError as error:
            return answer_for(error)

    @app.post("/v1/chat/completions", dependencies=[Depends(guard)])
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        if refusal := wrong_model(asked):
            return refusal
        try:
            messages = [message.rendered() for message in asked.messages]
            prompt = await asyncio.to_thread(render_chat, messages, cluster.tokenizer, name)
            room = cluster.longest - len(tokenize(prompt, cluster.tokenizer, cluster.vocab_size, name)[1])
            return await serve(request, asked, [prompt], asked.sampling(room), chat=True)
        except (InvalidRequestError, ClusterDownError) as error:
            return answer_for(error)

    @app.get("/v1/models", dependencies=[Depends(guard)])
    async def models() -> dict[str, Any]:
        card = {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "nanopd_lab",
            "max_model_len": cluster.longest,
        }
        return {"object": "list", "data": [card]}

    @app.get("/health")
    async def health() -> Response:
        try:
            workers = cluster.workers()
            cluster.longest  # noqa: B018 - asks whether anybody is left
        except (RuntimeError, ValueError) as error:
            return JSONResponse(error_body(str(error), "service_unavailable_error", 503), 503)
        return JSONResponse({"status": "ok", "workers": {view.name: view.role.value for view in workers}})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(telemetry.text(), media_type=CONTENT_TYPE_LATEST)

    return app


async def _all(bridge: Bridge, prompts: Sequence[Prompt], params: SamplingParams) -> list[ClusterOutput]:
    """Of every prompt; if one fails, the others are cancelled."""
    tasks = [asyncio.ensure_future(bridge.result(prompt, params)) for prompt in prompts]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _unless_gone(request: Request, work: asyncio.Future[T]) -> T | None:
    """The result, or None if the client has gone, which cancels the work."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.create_task(gone())
    try:
        both: list[asyncio.Future[Any]] = [work, watcher]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        return await work if work.done() else None
    finally:
        for task in (work, watcher):
            if not task.done():
                task.cancel()
        await asyncio.gather(work, watcher, return_exceptions=True)
