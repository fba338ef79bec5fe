"""The gRPC habits that all services share: servers, channels, and errors in both directions.

Messages may be large (prompts of 100k token ids), streams live long, peers die without saying goodbye: so message
sizes are bounded but generous, keepalive notices a silent peer within seconds, and a lost connection is retried fast.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from core import errors
from core.tls import ClientTls, Pem, PemContent, ServerTls

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_MAX_MESSAGE_TEXT_BYTES = 1000  # of an error, in UTF-8
_MAX_VIOLATIONS_BYTES = 2000  # of an error that has several
_RECEIVE_LIMIT = "grpc.max_receive_message_length"
_OPTIONS: list[tuple[str, int]] = [
    (_RECEIVE_LIMIT, MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 5_000),
    # It is also how long bytes may go unacknowledged (TCP_USER_TIMEOUT), which takes longer on a wire that KV fills.
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else a minute, for a peer that is frozen while its machine acknowledges
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SERVER_OPTIONS = [
    *_OPTIONS,
    # Tokens have some kilobytes; gRPC would refuse calls at random from 8 KiB on.
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    ("grpc.server_handshake_timeout_ms", 10_000),  # TLS and HTTP/2: who connects and says nothing
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
]
_SHARE_PORT = "grpc.so_reuseport"
_CHANNEL_OPTIONS: list[tuple[str, int | str]] = [
    *_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # how long one attempt may take: TLS to a far host needs some round trips
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),  # when there are several
    # What is on its way to a reader that is late is bounded: else gRPC lets megabytes of tokens queue up before the
    # answers that somebody waits for.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 256 * 1024),
    ("grpc.use_local_subchannel_pool", 1),  # one owner, one connection: closing a channel closes its socket
]


def create_server(
    *,
    max_receive_bytes: int = MAX_MESSAGE_BYTES,
    interceptors: Sequence[grpc.aio.ServerInterceptor] = (),
    share_port: bool = False,
) -> grpc.aio.Server:
    """Return a server without services or ports.

    Args:
        max_receive_bytes: a larger message is refused as RESOURCE_EXHAUSTED before it is read; a server that strangers
            reach wants less than what our own processes send each other.
        share_port: others who say so too may listen on its ports; otherwise one that is taken is an error.
    """
    options = [option for option in _SERVER_OPTIONS if option[0] != _RECEIVE_LIMIT]
    options += [(_RECEIVE_LIMIT, max_receive_bytes), (_SHARE_PORT, int(share_port))]
    # A pool of our own, because the default one is never shut down and its threads outlive the server.
    pool = ThreadPoolExecutor(max_workers=1)
    return grpc.aio.server(migration_thread_pool=pool, interceptors=interceptors, options=options)


def bind(server: grpc.aio.Server, host: str, port: int, tls: ServerTls | None = None) -> int:
    """Bind, without TLS unless `tls` says how; port 0 takes a free one. Returns the port.

    Raises:
        ConfigError: the address is in use or not ours, or the certificate cannot be used.
    """
    address = f"{host}:{port}"
    try:
        if tls is None:
            bound = server.add_insecure_port(address)
        else:
            bound = server.add_secure_port(address, _server_credentials(tls))
    except RuntimeError as error:
        raise errors.ConfigError(f"cannot listen on {host}:{port}: {_bind_problem(error)}") from error
    if bound == 0:
        raise errors.ConfigError(f"cannot listen on {host}:{port}: address in use or not local")
    return bound


def _bind_problem(error: RuntimeError) -> str:
    text = str(error)
    return "the port is in use" if "in use" in text or "Failed to bind" in text else text.splitlines()[0]


def _server_credentials(tls: ServerTls) -> grpc.ServerCredentials:
    """gRPC asks for every connection whether there are others now, on a thread of its own."""
    pem = Pem.of_server(tls)
    used, content = pem.current()

    def others() -> grpc.ServerCertificateConfiguration | None:
        nonlocal used
        version, now = pem.current()
        if version == used:
            return None
        used = version
        return _shown(now)

    return grpc.dynamic_ssl_server_credentials(
        _shown(content),
        others,  # type: ignore[arg-type]  # None means "the same", which the stubs do not know
        require_client_authentication=tls.client_ca is not None,
    )


def _shown(content: PemContent) -> grpc.ServerCertificateConfiguration:
    assert content.private_key is not None
    assert content.certificate is not None
    return grpc.ssl_server_certificate_configuration([(content.private_key, content.certificate)], content.ca)


def connect(address: str, tls: ClientTls | None = None) -> grpc.aio.Channel:
    """Return a lazy channel to `address`. The caller owns and closes it.

    Args:
        address: host:port, or several with numeric hosts, separated by commas: calls go to them in turn, and to the
            others while one cannot be reached. (For a name, DNS does the same.)
        tls: how to be sure who answers, and what to show; None: no TLS.

    Raises:
        ConfigError: no such address, or the files of `tls` cannot be used.
    """
    target = _target(address)
    if tls is None:
        return grpc.aio.insecure_channel(target, options=_CHANNEL_OPTIONS)
    content = Pem.of_client(tls).current()[1]
    credentials = grpc.ssl_channel_credentials(content.ca, content.private_key, content.certificate)
    options = list(_CHANNEL_OPTIONS)
    if name := tls.server_name or _common_host(address):
        options.append(("grpc.ssl_target_name_override", name))
    return grpc.aio.secure_channel(target, credentials, options=options)


class Line:
    """A channel to one address that keeps up with the certificates it shows, whenever it is asked to.

    Concurrency: one event loop.
    """

    def __init__(self, address: str, tls: ClientTls | None = None) -> None:
        self._address = address
        self._tls = tls
        self._pem: Pem | None = None
        self._version = 0
        self._channel: grpc.aio.Channel | None = None

    @property
    def channel(self) -> grpc.aio.Channel:
        """What the last `renew` left."""
        assert self._channel is not None, "renew first"
        return self._channel

    async def renew(self) -> None:
        """Make the channel if there is none, or if its certificates were replaced; whatever runs on the old one ends.
        For those who are about to connect (again).

        Raises:
            ConfigError: the files cannot be used.
        """
        if self._tls is not None and self._pem is None:
            self._pem = Pem.of_client(self._tls)
        version = self._pem.current()[0] if self._pem is not None else 0
        old = self._channel
        if old is None or version != self._version:
            self._channel = connect(self._address, self._tls)
            self._version = version
            if old is not None:
                await old.close()

    async def close(self) -> None:
        if self._channel is not None:
            await self._channel.close()


def _common_host(address: str) -> str:
    """Return what the certificates of several addresses are for; empty: of the one address. Pure.

    Raises:
        ConfigError: several hosts; gRPC checks one name.
    """
    if "," not in address:
        return ""
    hosts = {one.strip().rpartition(":")[0].strip("[]") for one in address.split(",")}
    if len(hosts) != 1:
        raise errors.ConfigError(f"{address}: with TLS, several hosts need one server name for all")
    return hosts.pop()


def _target(address: str) -> str:
    """Return gRPC's name of one or several addresses. Pure.

    Raises:
        ConfigError: several, and one of them has a name or another family than the others.
    """
    if "," not in address:
        return address
    hosts = [one.strip().rpartition(":")[0].strip("[]") for one in address.split(",")]
    try:
        versions = {ip_address(host).version for host in hosts}
    except ValueError as error:
        raise errors.ConfigError(f"{address}: several addresses must be numeric: {error}") from error
    if len(versions) != 1:
        raise errors.ConfigError(f"{address}: IPv4 and IPv6 cannot be mixed")
    return f"ipv{versions.pop()}:{address.replace(' ', '')}"


def status_of(error: errors.ServingError) -> status_pb2.Status:
    """Describe an error as a rich status. Pure."""
    code = grpc.StatusCode[error.grpc_code]
    status = status_pb2.Status(code=code.value[0], message=_cut(str(error)))
    reason = getattr(error, "reason", None)
    info = error_details_pb2.ErrorInfo(reason=str(reason or type(error).__name__).upper(), domain="tandem")
    status.details.add().Pack(info)
    if isinstance(error, errors.InvalidRequest):
        status.details.add().Pack(_bad_request(error))
    if isinstance(error, errors.RejectedError) and error.retry_after_s > 0:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def _bad_request(error: errors.InvalidRequest) -> error_details_pb2.BadRequest:
    """As many violations as there is room for, at least one."""
    details = error_details_pb2.BadRequest()
    for name, problem in error.violations:
        violation = error_details_pb2.BadRequest.FieldViolation(field=_cut(name), description=_cut(problem))
        if details.field_violations and details.ByteSize() + violation.ByteSize() > _MAX_VIOLATIONS_BYTES:
            break
        details.field_violations.append(violation)
    return details


def _cut(text: str) -> str:
    """Bound what may quote a client: trailing metadata above some kilobytes turns any status into another one."""
    data = text.encode(errors="replace")
    if len(data) <= _MAX_MESSAGE_TEXT_BYTES:
        return text
    return data[:_MAX_MESSAGE_TEXT_BYTES].decode(errors="ignore") + "..."


@contextlib.asynccontextmanager
async def reply_errors(
    context: grpc.aio.ServicerContext[Any, Any], *, patience_s: float | None = None
) -> AsyncIterator[None]:
    """Turn a `ServingError` raised inside into the call's status. Everything else is a defect and stays INTERNAL.

    Args:
        patience_s: a status waits behind messages that the client has not read. After so long the call is left to the
            connection, as if it had been cancelled; a client that reads again still finds the status.
    """
    try:
        yield
    except errors.ServingError as error:
        status = rpc_status.to_status(status_of(error))
        context.set_trailing_metadata(status.trailing_metadata)
        try:
            async with asyncio.timeout(patience_s):
                await context.abort(status.code, status.details)
        except TimeoutError:
            raise asyncio.CancelledError("the client does not read the call's status") from error


def field_violations(error: grpc.RpcError) -> Sequence[tuple[str, str]]:
    """Return (field, description) of each violation that a failed call carries."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    found: list[tuple[str, str]] = []
    for detail in status.details if status is not None else ():
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            found.extend((violation.field, violation.description) for violation in bad_request.field_violations)
    return found


def from_rpc_error(error: grpc.aio.AioRpcError, peer: str) -> errors.ServingError:
    """Translate a failed internal call. Pure: the caller raises it `from` the original."""
    code = error.code()
    detail = f"{peer}: {code.name}: {error.details() or 'no details'}"
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(detail)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.FAILED_PRECONDITION):
        return errors.WorkerLost(detail)
    return errors.ProtocolError(detail)
