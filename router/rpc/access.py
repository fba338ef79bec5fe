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

from core.errors import ServingError
from core.rpc import reply_errors
from protos import admin_pb2
from router.access.audit import AuditLog
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.principal import Principal, Role, set_current_principal

_ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"].full_name
_TARGETS = ("fingerprint", "worker_id", "request_id", "name")  # fields that say what an action is about
_POLLED = frozenset({"GetClusterStatus"})  # by monitors, who would fill the record
_NOBODY = ""
_Context = grpc.aio.ServicerContext[Any, Any]
if TYPE_CHECKING:
    _Handler = grpc.RpcMethodHandler[Any, Any]


class AccessInterceptor(grpc.aio.ServerInterceptor):
    """Asks the gatekeeper on behalf of every method but the open ones."""

    def __init__(self, gatekeeper: Gatekeeper, audit: AuditLog) -> None:
        self._gatekeeper = gatekeeper
        self._audit = audit
        self._open = _open_services(gatekeeper.config)
        self._guarded: dict[str, _Handler] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        method = handler_call_details.method
        if (guarded := self._guarded.get(method)) is not None:
            return guarded
        handler = await continuation(handler_call_details)
        service, _, name = method[1:].rpartition("/")
        if handler is None:  # there is no such method
            return None
        if service in self._open:
            return handler
        is_recorded = service == _ADMIN and self._gatekeeper.config.enabled
        guarded = self._guard(handler, _role_for(service), action=name if is_recorded else "")
        self._guarded[method] = guarded
        return guarded

    def _guard(self, handler: "_Handler", role: Role | None, *, action: str) -> "_Handler":
        behavior, make = _parts_of(handler)

        async def admit(context: _Context) -> Principal:
            names = _certificate_names(context)
            principal = await self._gatekeeper.admit(_authorization(context), names, role=role)
            set_current_principal(principal)  # a call is a task of its own, so nobody else sees it
            return principal

        async def answer(request: Any, context: _Context) -> Any:
            async with reply_errors(context):
                await admit(context)
            return await behavior(request, context)

        async def stream(request: Any, context: _Context) -> AsyncIterator[Any]:
            async with reply_errors(context):
                await admit(context)
            async for message in behavior(request, context):
                yield message

        async def act(request: Any, context: _Context) -> Any:
            who, outcome, response = _NOBODY, "failed", None
            try:
                async with reply_errors(context):
                    try:
                        who = (await admit(context)).name
                    except ServingError as error:
                        who, outcome = getattr(error, "who", _NOBODY), _outcome_of(error)
                        raise
                response = await behavior(request, context)
                outcome = "ok"
                return response
            except grpc.aio.AbortError:
                code = context.code()
                outcome = outcome if outcome != "failed" or code is None else str(code.name).lower()
                raise
            finally:
                if outcome != "ok" or action not in _POLLED:
                    target = _target_of(getattr(response, "api_key", None)) or _target_of(request)
                    self._audit.write(who=who, origin=context.peer(), action=action, target=target, outcome=outcome)

        if action and not handler.request_streaming and not handler.response_streaming:
            guarded: Callable[..., Any] = act
        else:
            guarded = stream if inspect.isasyncgenfunction(behavior) else answer
        return make(guarded, handler.request_deserializer, handler.response_serializer)


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


def _authorization(context: _Context) -> Sequence[str]:
    metadata = context.invocation_metadata() or ()
    return [value if isinstance(value, str) else "" for key, value in metadata if key == "authorization"]


def _certificate_names(context: _Context) -> Sequence[str]:
    auth = context.auth_context()
    names = [*auth.get("x509_subject_alternative_name", ()), *auth.get("x509_common_name", ())]
    return [name.decode(errors="replace") for name in names]


def _outcome_of(error: ServingError) -> str:
    return str(getattr(error, "reason", None) or error.grpc_code.lower())


def _target_of(message: Any) -> str:
    """Return what an action is about. Only fields that hold names of ours; never the key itself."""
    return next((str(found) for field in _TARGETS if (found := getattr(message, field, ""))), "")
