"""A request's JSON body within bounds: its size while it arrives, its depth and numbers before objects are made.

What is refused: another media type or encoding (415), too many bytes (413), and as 400 what is no JSON: invalid UTF-8,
lone surrogates, NaN and infinities, numbers of thousands of digits, deep nesting, a key that an object has twice (two
readers would not agree on what was asked), and anything but an object."""

import contextlib
import gc
import json
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from core.errors import Aborted, InvalidRequest
from router.http.errors import HttpProblem

_BOUNDS = ((b"{", "objects", 100_000), (b":", "colons", 400_000), (b",", "commas", 1_000_000))
"""Of what makes work of a body, wherever it stands in it. While it is parsed nobody else is served: at these bounds for
a few tenths of a second; prompts meet others long before."""
_LARGE_BYTES = 65_536


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """Return the body as a dictionary.

    Raises:
        HttpProblem: 413, 415.
        InvalidRequest: it is not a JSON object.
        Aborted: the client went away first.
    """
    _check_media_type(request)
    return parse_object(await _read(request, max_bytes))


def parse_object(body: bytes) -> dict[str, Any]:
    """Pure. Raises: InvalidRequest."""
    for mark, what, limit in _BOUNDS:
        if body.count(mark) > limit:
            raise InvalidRequest("body", f"has more than {limit} {what}")
    with _no_collections(len(body)):
        return _parse(body)


def _parse(body: bytes) -> dict[str, Any]:
    try:
        parsed = from_json(body, allow_inf_nan=False, cache_strings="keys")  # bounds depth and digits by itself
    except ValueError as error:
        raise InvalidRequest("body", f"is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest("body", f"must be a JSON object, not {_json_type(parsed)}")
    json.loads(body, object_pairs_hook=_refuse_twice)
    return parsed


@contextlib.contextmanager
def _no_collections(num_bytes: int) -> Iterator[None]:
    """Objects by the hundred thousand make the garbage collector look at them over and over; none is garbage yet."""
    is_paused = num_bytes > _LARGE_BYTES and gc.isenabled()
    if is_paused:
        gc.disable()
    try:
        yield
    finally:
        if is_paused:
            gc.enable()


async def _read(request: Request, max_bytes: int) -> bytes:
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    parts = bytearray()
    try:
        async for part in request.stream():
            parts += part
            if len(parts) > max_bytes:
                raise _too_large(max_bytes)
    except ClientDisconnect as error:
        raise Aborted("the client went away before its request had arrived") from error
    return bytes(parts)


def _check_media_type(request: Request) -> None:
    media_type, _, parameters = request.headers.get("content-type", "").partition(";")
    media_type = media_type.strip().lower()
    if media_type != "application/json" and not (
        media_type.startswith("application/") and media_type.endswith("+json")
    ):
        said = repr(media_type) if media_type else "missing"
        raise HttpProblem(415, f"content-type is {said}: it must be application/json")
    name, _, charset = parameters.strip().partition("=")
    if name.strip().lower() == "charset" and charset.strip().strip('"').lower() not in ("utf-8", "utf8"):
        raise HttpProblem(415, "the charset of JSON is utf-8")
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise HttpProblem(415, "content-encoding is not supported: send the body as it is")


def _refuse_twice(pairs: list[tuple[str, Any]]) -> None:
    keys = {key for key, _ in pairs}
    if len(keys) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidRequest("body", f"has the key {twice[:64]!r} twice in one object")


def _too_large(max_bytes: int) -> HttpProblem:
    return HttpProblem(413, f"the body has more than {max_bytes} bytes")


def _json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "a number"
