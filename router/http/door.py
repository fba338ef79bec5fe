"""What every route asks first: who calls, under which request id, with which body."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from core.errors import InvalidRequest
from core.ids import RequestId, new_request_id, parse_request_id
from router.access.gatekeeper import Gatekeeper
from router.access.principal import Principal, Role, set_current_principal
from router.front import Front
from router.http.body import read_object
from router.http.config import HttpConfig

REQUEST_ID = b"x-request-id"
_NO_ROUTE = "none"  # the path is a client's text, which is no label
_REQUEST_IDS = (REQUEST_ID, b"x_request_id")


@dataclass(frozen=True, slots=True)
class Door:
    """What the routes share. `now`: Unix time in seconds."""

    front: Front
    gatekeeper: Gatekeeper
    config: HttpConfig
    now: Callable[[], float]

    async def admit(self, request: Request, role: Role = Role.INFERENCE) -> Principal:
        """Return the caller.

        Raises:
            Unauthenticated, PermissionDenied
        """
        principal = await self.identify(request, role)
        set_current_principal(principal)
        return principal

    async def identify(self, request: Request, role: Role | None = None) -> Principal:
        """Return the caller, whatever it may do without `role`. Raises: Unauthenticated, PermissionDenied."""
        headers, names = request.headers.getlist("authorization"), request.state.certificate_names
        return await self.gatekeeper.admit(headers, names, role=role)

    async def body(self, request: Request) -> Mapping[str, Any]:
        """Raises: HttpProblem, InvalidRequest, Aborted."""
        return await read_object(request, self.config.max_body_bytes)


class RequestIdentity:
    """Gives every request an id, the client's own or a new one, and every response a header that says it; counts the
    responses by route and status."""

    def __init__(self, app: ASGIApp, responses: Counter) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = next((value for name, value in scope["headers"] if name in _REQUEST_IDS), b"").decode("latin-1")
        request_id = _usable(said) or new_request_id()
        scope["state"]["request_id"] = request_id
        header = (REQUEST_ID, request_id.encode())

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), header]
                route = getattr(scope.get("route"), "path", _NO_ROUTE)
                self._responses.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, send_with_id)


def _usable(text: str) -> RequestId | None:
    try:
        return parse_request_id(text) if text else None
    except InvalidRequest:
        return None
