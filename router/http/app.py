"""The FastAPI application: routes, and one form for every error."""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, Counter
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from core.errors import InvalidRequest, ServingError
from core.version import tandem_version
from router.hints import DESCRIPTIONS, TENANT
from router.http import reply_types as replies
from router.http.chat_request import ChatRequest
from router.http.completion_request import CompletionRequest
from router.http.door import Door, RequestIdentity
from router.http.errors import HttpProblem, error_object, error_reply
from router.http.fields import path_of
from router.http.generation_routes import GenerationRoutes
from router.http.model_routes import DetokenizeRequest, ModelRoutes, TokenizeRequest
from router.http.openapi import (
    ACCESS_ERRORS,
    BODY_ERRORS,
    CONNECTION_ERRORS,
    GENERATION_ERRORS,
    SECURITY,
    Responses,
    body_of,
    errors,
    header,
    install,
    success,
)
from router.http.probe_routes import ProbeRoutes
from router.http.stream_routes import StreamRoutes
from router.http.while_connected import json_response

_log = logging.getLogger(__name__)
_BODIES: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest)
_Endpoint = Callable[[Request], Awaitable[Response]]
_TEXT = {"type": "string"}
_HEADERS = [header(name, description, _TEXT) for name, description in DESCRIPTIONS.items()]


def create_app(door: Door, registry: CollectorRegistry) -> FastAPI:
    """Return the application of one gateway.

    Args:
        registry: what `/metrics` tells; responses are counted in it.
    """
    app = FastAPI(
        title="Tandem",
        description="OpenAI's API over a disaggregated cluster.",
        version=tandem_version(),
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    responses = Counter(
        "tandem_gateway_http_responses", "Responses by route and status.", ["route", "status"], registry=registry
    )
    app.add_middleware(RequestIdentity, responses=responses)
    app.add_exception_handler(ServingError, _on_serving_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(Exception, _on_defect)
    _add_generation(app, GenerationRoutes(door))
    _add_streams(app, StreamRoutes(door))
    _add_model(app, ModelRoutes(door))
    _add_probes(app, ProbeRoutes(door, registry), door)
    access = door.gatekeeper.config
    chunks = (replies.ChatCompletionChunk,)
    install(app, (*_BODIES, *chunks), is_guarded=access.enabled)

    async def openapi_document(request: Request) -> Response:
        if not access.open_reflection:
            await door.identify(request)
        return json_response(app.openapi())

    app.add_api_route("/openapi.json", openapi_document, include_in_schema=False)
    return app


def _add_generation(app: FastAPI, routes: GenerationRoutes) -> None:
    chat = success(replies.ChatCompletion, "The next message", chunk=replies.ChatCompletionChunk)
    _post(app, "/v1/chat/completions", routes.chat, ChatRequest, chat | errors(GENERATION_ERRORS), _HEADERS)
    text = success(replies.Completion, "The prompts, continued", chunk=replies.Completion)
    _post(app, "/v1/completions", routes.completion, CompletionRequest, text | errors(GENERATION_ERRORS), _HEADERS)


def _add_streams(app: FastAPI, routes: StreamRoutes) -> None:
    event = {"type": "object", "properties": {"id": _NUMBER, "data": _TEXT}, "required": ["data"]}
    told: Responses = {
        200: {"description": "The events that follow", "content": {"text/event-stream": {"schema": event}}},
        204: {"description": "Nothing follows"},
    }
    last = header("last-event-id", "the id of the last event that arrived; absent: from the beginning", _NUMBER)
    tenant = header(TENANT[0], DESCRIPTIONS[TENANT[0]], _TEXT)
    told = told | errors(GENERATION_ERRORS, (410,))
    _get(app, "/v1/streams/{request_id}", routes.resume, told, [_REQUEST_ID, last, tenant])


_REQUEST_ID = {"name": "request_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
_NUMBER = {"type": "string", "pattern": "^[0-9]{1,15}$"}


def _add_model(app: FastAPI, routes: ModelRoutes) -> None:
    _get(app, "/v1/models", routes.list_models, success(replies.ModelList, "The model served"))
    one = success(replies.Model, "The model") | errors((404,))
    _get(app, "/v1/models/{model:path}", routes.get_model, one, [_MODEL])
    busy = errors((404, 429))
    tokenized = success(replies.Tokenized, "Token ids") | busy
    _post(app, "/tokenize", routes.tokenize, TokenizeRequest, tokenized)
    detokenized = success(replies.Detokenized, "Text") | busy
    _post(app, "/detokenize", routes.detokenize, DetokenizeRequest, detokenized)


_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _add_probes(app: FastAPI, routes: ProbeRoutes, door: Door) -> None:
    access = door.gatekeeper.config
    readiness = success(replies.Status, "It serves") | {503: {"model": replies.Status, "description": "Not now"}}
    for path, endpoint, told in (
        ("/live", routes.live, success(replies.Status, "The process lives")),
        ("/ready", routes.ready, readiness),
        ("/health", routes.ready, readiness),
        ("/version", routes.version, success(replies.Version, "Which version this is")),
    ):
        _get(app, path, endpoint, told, is_open=access.open_health)
        app.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    text: Responses = {
        200: {
            "description": "Prometheus' or OpenMetrics' text format",
            "content": {name: {"schema": _TEXT} for name in ("text/plain", "application/openmetrics-text")},
        }
    }
    _get(app, "/metrics", routes.metrics, text, is_open=access.open_metrics)


def _get(
    app: FastAPI,
    path: str,
    endpoint: _Endpoint,
    told: Responses,
    parameters: list[dict[str, Any]] | None = None,
    *,
    is_open: bool = False,
) -> None:
    _add(app, "GET", path, endpoint, told | errors(CONNECTION_ERRORS), parameters, {}, is_open=is_open)


def _post(
    app: FastAPI,
    path: str,
    endpoint: _Endpoint,
    model: type[BaseModel],
    told: Responses,
    parameters: list[dict[str, Any]] | None = None,
) -> None:
    told = told | errors(CONNECTION_ERRORS, BODY_ERRORS)
    _add(app, "POST", path, endpoint, told, parameters, body_of(model), is_open=False)


def _add(
    app: FastAPI,
    method: str,
    path: str,
    endpoint: _Endpoint,
    told: Responses,
    parameters: list[dict[str, Any]] | None,
    extra: Mapping[str, Any],
    *,
    is_open: bool,
) -> None:
    if not is_open:
        told = told | errors(ACCESS_ERRORS)
    extra = {**extra, "parameters": parameters or [], "security": [] if is_open else [{SECURITY: []}]}
    app.add_api_route(path, endpoint, methods=[method], responses=told, openapi_extra=extra, response_class=Response)


async def _on_serving_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, ServingError)
    reply = error_reply(error)
    return json_response(reply.body, reply.status, reply.headers)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing's own: no such path, no such method."""
    assert isinstance(error, HTTPException)
    allow = {name.lower(): value for name, value in (error.headers or {}).items()}.get("allow", "")
    what = f"{request.method} {request.url.path[:200]}"
    message, code = {
        404: (f"there is no {what}", "unknown_url"),
        405: (f"{what} is not allowed: use {allow}", "method_not_allowed"),
    }.get(error.status_code, (str(error.detail), None))
    return await _on_serving_error(request, HttpProblem(error.status_code, message, code, allow=allow))


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    return await _on_serving_error(request, InvalidRequest(path_of(first["loc"]), first["msg"]))


async def _on_defect(_request: Request, error: Exception) -> Response:
    _log.error("defect: %s", type(error).__name__, exc_info=error)
    return json_response(error_object(500, "internal error"), 500)
