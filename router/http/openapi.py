"""The OpenAPI document: FastAPI's, with the request bodies that we read ourselves and the errors that we send."""

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from router.http.reply_types import Error
from router.http.sse import DONE_WORD

_REF = "#/components/schemas/{model}"
SECURITY = "bearer"
Responses = dict[int | str, dict[str, Any]]

CONNECTION_ERRORS = (400, 408, 431)
ACCESS_ERRORS = (401, 403)
BODY_ERRORS = (413, 415)
GENERATION_ERRORS = (404, 409, 429, 499, 500, 502, 503, 504)
_REASONS = {499: "The request was aborted", 431: "The headers are too large"}
_REQUEST_ID = {
    "description": "the id of the request: the client's own, or a new one",
    "schema": {"type": "string"},
}
_RETRY_AFTER = {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}


def errors(*groups: Iterable[int]) -> Responses:
    """Document error statuses."""
    told: Responses = {}
    for status in sorted(one for group in groups for one in group):
        headers: dict[str, Any] = {"x-request-id": _REQUEST_ID}
        if status in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE):
            headers["retry-after"] = _RETRY_AFTER
        description = _REASONS.get(status) or HTTPStatus(status).phrase
        told[status] = {"model": Error, "description": description, "headers": headers}
    return told


def success(model: type[BaseModel], description: str, *, chunk: type[BaseModel] | None = None) -> Responses:
    """Document a reply, and the events of its streamed form."""
    told: dict[str, Any] = {
        "model": model,
        "description": description,
        "headers": {"x-request-id": _REQUEST_ID},
    }
    if chunk is not None:
        told["content"] = {"text/event-stream": {"schema": _event_of(chunk)}}
    return {200: told}


def _event_of(chunk: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream. A stream that fails ends with an Error and without `[DONE]`."""
    said = [{"$ref": _REF.format(model=chunk.__name__)}, {"$ref": _REF.format(model=Error.__name__)}]
    told = {
        "type": "string",
        "description": f"a {chunk.__name__}, or an Error, which is the last",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": said},
    }
    end = {"const": DONE_WORD, "description": "after the last chunk"}
    return {"type": "object", "properties": {"data": {"anyOf": [end, told]}}, "required": ["data"]}


def body_of(model: type[BaseModel]) -> dict[str, Any]:
    """Document a request body."""
    schema = {"$ref": _REF.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def header(name: str, description: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Document a request header."""
    return {"name": name, "in": "header", "required": False, "description": description, "schema": dict(schema)}


def install(app: FastAPI, models: Iterable[type[BaseModel]], *, is_guarded: bool) -> None:
    """Make `app` tell its document.

    Args:
        models: of request bodies and chunks, which no route's signature names.
        is_guarded: callers must be known.
    """
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not document:
            document.update(_build(app, models, is_guarded=is_guarded))
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to replace it


def _build(app: FastAPI, models: Iterable[type[BaseModel]], *, is_guarded: bool) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for model in models:
        schema = model.model_json_schema(ref_template=_REF)
        schemas |= schema.pop("$defs", {})
        schemas[model.__name__] = schema
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form of an error, which is never sent
        schemas.pop(name, None)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            if not is_guarded:
                operation.pop("security", None)
    if is_guarded:
        components["securitySchemes"] = {
            SECURITY: {"type": "http", "scheme": "bearer", "description": "an API key, or a JWT where configured"}
        }
    return document
