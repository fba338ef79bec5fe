"""`/v1/streams/{request_id}`: the rest of a stream whose connection was lost."""

from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from core.errors import InvalidRequest
from core.ids import parse_request_id, parse_tenant
from router.hints import read_hints
from router.http.door import Door
from router.http.fields import rename
from router.http.resuming import LAST_EVENT_ID, last_event, send_followed
from router.http.while_connected import WhileConnected
from router.resume.events import StreamKey, StreamKind


class StreamRoutes:
    """Streams that are read on."""

    def __init__(self, door: Door) -> None:
        self._door = door

    async def resume(self, request: Request) -> Response:
        principal = await self._door.admit(request)
        tenant = principal.tenant_for(read_hints(request.headers.items()).tenant)
        key = StreamKey(parse_tenant(tenant), parse_request_id(request.path_params["request_id"]))
        after = last_event(request.headers.get(LAST_EVENT_ID, ""))
        return WhileConnected(partial(self._send, key, after))

    async def _send(self, key: StreamKey, after: int | None, send: Send) -> None:
        try:
            kind, follower = await self._door.front.resumables.follow(key, after)
        except InvalidRequest as error:
            raise rename(error, {"last_event_index": LAST_EVENT_ID}) from error
        if kind is not StreamKind.SSE:
            follower.close()
            raise InvalidRequest("request_id", "its stream began over gRPC: Resume goes on with it")
        await send_followed(send, follower, dict)
