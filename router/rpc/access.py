"""Access control at the gRPC door: every call is admitted before its handler runs, streaming ones too, and every admin
action is written down.

A credential is looked at when a call begins. A token that expires, or a key that is revoked, while a stream runs does
not end that stream.
"""

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from core.errors import PermissionDenied, ServingError
from core.rpc import reply_errors
from protos import admin_pb2
from router.access.audit import AuditLog
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.principal import Role, current_principal, set_current_principal

_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_TARGETS = ("fingerprint", "worker_id", "request_id", "name")  # fields that say what an action is about
_POLLED = frozenset({"GetClusterStatus"})  # by monitors, who would fill the record
_Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks the gatekeeper on behalf of every method but the open ones.

    A caller with an authorization header, good or bad, is judged before anything that it sent is read. One that may be
    known by its certificate is judged when its request was read: gRPC tells names only then, and TLS has let it in.
    """

    def __init__(self, gatekeeper: Gatekeeper, audit: AuditLog) -> None:
        self._gatekeeper = gatekeeper
        self._audit = audit
        self._open = _open_services(gatekeeper.config)
        self._by_certificate: dict[str, _Handler] = {}
        self._recorded: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        method = handler_call_details.method
        handler = await continuation(handler_call_details)
        service, _, name = method[1:].rpartition("/")
        if handler is None or service in self._open:  # None: there is no such method
            return handler
        config, role = self._gatekeeper.config, _role_for(service)
        if is_recorded := service == _ADMIN and config.enabled:
            handler = self._recorded.setdefault(method, self._record(handler, name))
        authorization = _authorization(handler_call_details.invocation_metadata)
        if config.certificates and not authorization:
            action = name if is_recorded else ""
            return self._by_certificate.setdefault(method, self._ask_certificate(handler, role, action))
        try:
            principal = await self._gatekeeper.admit(authorization, role=role)
        except ServingError as error:
            return self._refuse(error, name if is_recorded else "")
        set_current_principal(principal)  # a call is a task of its own, from here to its end
        return handler

    def _refuse(self, error: ServingError, action: str) -> "_Handler":
        """Return a handler that reads nothing, which only those for streams of requests are free to do."""

        async def refuse(_: Any, context: _Context) -> None:
            self._note_refusal(context, error, action)
            async with reply_errors(context):
                raise error

        return grpc.stream_stream_rpc_method_handler(refuse)

    def _ask_certificate(self, handler: "_Handler", role: Role | None, action: str) -> "_Handler":
        behavior, make = _parts_of(handler)

        async def admit(context: _Context) -> None:
            async with reply_errors(context):
                try:
                    principal = await self._gatekeeper.admit((), _certificate_names(context), role=role)
                except ServingError as error:
                    self._note_refusal(context, error, action)
                    raise
            set_current_principal(principal)

        async def answer(request: Any, context: _Context) -> Any:
            await admit(context)
            return await behavior(request, context)

        async def stream(request: Any, context: _Context) -> AsyncIterator[Any]:
            await admit(context)
            async for message in behavior(request, context):
                yield message

        guarded: Callable[..., Any] = stream if inspect.isasyncgenfunction(behavior) else answer
        return make(guarded, handler.request_deserializer, handler.response_serializer)

    def _record(self, handler: "_Handler", action: str) -> "_Handler":
        """Return the same method, all of which have one request and one response, that leaves a line."""
        behavior, make = _parts_of(handler)

        async def act(request: Any, context: _Context) -> Any:
            outcome, response = "failed", None
            try:
                response = await behavior(request, context)
                outcome = "ok"
                return response
            except grpc.aio.AbortError:
                outcome = _outcome_of_code(context.code())
                raise
            finally:
                if outcome != "ok" or action not in _POLLED:
                    target = _target_of(getattr(response, "api_key", None)) or _target_of(request)
                    self._write(context, current_principal().name, action, target, outcome)

        return make(act, handler.request_deserializer, handler.response_serializer)

    def _note_refusal(self, context: _Context, error: ServingError, action: str) -> None:
        """Of an action that is recorded; empty: it is none."""
        if action:
            self._write(context, _who(error), action, "", _outcome_of(error))

    def _write(self, context: _Context, who: str, action: str, target: str, outcome: str) -> None:
        self._audit.write(who=who, origin=context.peer(), action=action, target=target, outcome=outcome)


def _parts_of(handler: "_Handler") -> "tuple[Callable[..., Any], Callable[..., _Handler]]":
    """Return what runs the call, and what makes a handler of something of the same kind."""
    kind = f"{_arity(handler.request_streaming)}_{_arity(handler.response_streaming)}"
    return getattr(handler, kind), getattr(grpc, f"{kind}_rpc_method_handler")


def _arity(is_streaming: bool) -> str:
    return "stream" if is_streaming else "unary"


def _open_services(config: AccessConfig) -> frozenset[str]:
    found = set()
    if config.open_health:
        found.add(health.SERVICE_NAME)
    if config.open_reflection:
        found.add(reflection.SERVICE_NAME)
    return frozenset(found)


def _role_for(service: str) -> Role | None:
    """Health and reflection, where they are not open, are for whoever is known."""
    if service in (health.SERVICE_NAME, reflection.SERVICE_NAME):
        return None
    return Role.ADMIN if service == _ADMIN else Role.INFERENCE


def _authorization(metadata: Any) -> Sequence[str]:
    return [value if isinstance(value, str) else "" for key, value in metadata or () if key == "authorization"]


def _certificate_names(context: _Context) -> Sequence[str]:
    auth = context.auth_context()
    names = [*auth.get("x509_subject_alternative_name", ()), *auth.get("x509_common_name", ())]
    return [name.decode(errors="replace") for name in names]


def _who(error: ServingError) -> str:
    return error.who if isinstance(error, PermissionDenied) else ""


def _outcome_of(error: ServingError) -> str:
    return str(getattr(error, "reason", None) or error.grpc_code.lower())


def _outcome_of_code(code: Any) -> str:
    """Return the name of a status, which gRPC keeps as a member of its enum or as a number."""
    known = {one.value[0]: one for one in grpc.StatusCode}
    return str(getattr(known.get(code, code), "name", code)).lower()


def _target_of(message: Any) -> str:
    """Return what an action is about. Only fields that hold names of ours; never the key itself."""
    return next((str(found) for field in _TARGETS if (found := getattr(message, field, ""))), "")
