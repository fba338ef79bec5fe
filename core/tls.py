"""TLS: what a process shows, what it trusts, and how both are read again when their files change.

Three roles: a server that strangers reach (`ServerTls`), a client of one (`ClientTls`), and one of our own processes
among others (`PeerTls`), which shows its certificate to whomever it calls and to whoever calls it, and talks to nobody
who cannot show one of the same authority. All files are PEM. Nothing below TLS 1.2 is spoken, and nothing below TLS 1.3
where clients show certificates to a server on sockets of our own.

Certificates are replaced while a process runs: the files are looked at, at most once per `_LOOK_AGAIN_S`, when a
connection is made. A set of files that does not fit together (half of it is new already) leaves the old one in force.
"""

import logging
import ssl
import threading
import time
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from core.config import ConfigModel
from core.errors import ConfigError

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 1.0


class ServerTls(ConfigModel):
    """A server's side."""

    certificate: Path = Field(description="PEM: the server's certificate, and the intermediate ones behind it")
    private_key: Path = Field(description="PEM, without a passphrase")
    client_ca: Path | None = Field(
        None, description="PEM: clients must show a certificate of this authority; absent: they show none"
    )


class ClientTls(ConfigModel):
    """A client's side."""

    ca: Path | None = Field(None, description="PEM: the authority of the server; absent: those that the system trusts")
    certificate: Path | None = Field(None, description="PEM: what the client shows when the server asks")
    private_key: Path | None = None
    server_name: str = Field("", description="what the server's certificate is for; empty: its address")

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> "ClientTls":
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("certificate and private_key come together")
        return self


class PeerTls(ConfigModel):
    """Both sides of one of our own processes."""

    certificate: Path = Field(description="PEM: what this process shows, as a server and as a client")
    private_key: Path = Field(description="PEM, without a passphrase")
    ca: Path = Field(description="PEM: the authority of all processes of the cluster, and of nobody else")
    server_name: str = Field(
        "",
        description="a name that every process's certificate has, so that one fits all; empty: each has its address",
    )

    @property
    def server(self) -> ServerTls:
        return ServerTls(certificate=self.certificate, private_key=self.private_key, client_ca=self.ca)

    @property
    def client(self) -> ClientTls:
        return ClientTls(
            ca=self.ca, certificate=self.certificate, private_key=self.private_key, server_name=self.server_name
        )


class PemContent(NamedTuple):
    """What the files say."""

    certificate: bytes | None
    private_key: bytes | None
    ca: bytes | None


class Pem:
    """The content of some PEM files, read again when they change.

    Args:
        certificate, private_key, ca: paths; None: there is no such file.

    Raises:
        ConfigError: a file cannot be read, or they do not fit together.

    Concurrency: any thread.
    """

    def __init__(self, *, certificate: Path | None, private_key: Path | None, ca: Path | None) -> None:
        self._paths = (certificate, private_key, ca)
        self._lock = threading.Lock()
        self._looked_at = time.monotonic()
        self._seen = self._stamp()
        self._content = self._read()
        self._version = 0

    @classmethod
    def of_server(cls, tls: ServerTls) -> "Pem":
        return cls(certificate=tls.certificate, private_key=tls.private_key, ca=tls.client_ca)

    @classmethod
    def of_client(cls, tls: ClientTls) -> "Pem":
        return cls(certificate=tls.certificate, private_key=tls.private_key, ca=tls.ca)

    def current(self) -> tuple[int, PemContent]:
        """Return the content in force, after a number that grows with every change of it."""
        with self._lock:
            now = time.monotonic()
            if now - self._looked_at >= _LOOK_AGAIN_S:
                self._looked_at = now
                self._look()
            return self._version, self._content

    def _look(self) -> None:
        stamp = self._stamp()
        if stamp == self._seen:
            return
        try:
            self._content = self._read()
        except ConfigError as error:
            _log.error("TLS: the old certificates stay in force: %s", error)  # and the files are read again next time
            return
        self._seen = stamp
        self._version += 1
        _log.info("TLS: %s was read again", ", ".join(str(path) for path in self._paths if path is not None))

    def _stamp(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(None if path is None else _stamp_of(path) for path in self._paths)

    def _read(self) -> PemContent:
        stamp = self._stamp()
        content = PemContent(*(None if path is None else _read(path) for path in self._paths))
        _check(*self._paths)
        if stamp != self._stamp():
            raise ConfigError("tls: the files change while they are read")
        return content


def server_context(tls: ServerTls) -> ssl.SSLContext:
    """Return a context for servers on sockets of our own; every handshake uses the files as they are then.

    Raises:
        ConfigError: a file cannot be read, or they do not fit together.
    """
    pem = Pem.of_server(tls)
    made: dict[int, ssl.SSLContext] = {}
    lock = threading.Lock()

    def context_now() -> ssl.SSLContext:
        version, _ = pem.current()
        with lock:
            if version not in made:
                made.clear()
                made[version] = _server_context(tls)
            return made[version]

    def on_hello(connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        try:
            connection.context = context_now()
        except (ConfigError, OSError) as error:  # the files changed once more just now; the next handshake finds them
            _log.error("TLS: the old certificates stay in force: %s", error)

    first = _server_context(tls)
    first.sni_callback = on_hello
    return first


def client_context(tls: ClientTls) -> ssl.SSLContext:
    """Return a context for one connection to a server; `server_name` is for whoever connects to say.

    Raises:
        ConfigError: a file cannot be read, or they do not fit together.
    """
    context = ssl.create_default_context() if tls.ca is None else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if tls.ca is not None:
        _trust(context, tls.ca)
    if tls.certificate is not None and tls.private_key is not None:
        _load(context, tls.certificate, tls.private_key)
    return context


def _server_context(tls: ServerTls) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    _load(context, tls.certificate, tls.private_key)
    if tls.client_ca is not None:
        _trust(context, tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
        # Whoever resumes a session shows no certificate, and would be trusted as long as it does so, whatever becomes
        # of the authority. TLS 1.2 resumes by a cache, too, which cannot be switched off from here.
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.num_tickets = 0
    return context


def _check(certificate: Path | None, private_key: Path | None, ca: Path | None) -> None:
    """Raises: ConfigError, unless these files can be used together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate is not None and private_key is not None:
        _load(context, certificate, private_key)
    if ca is not None:
        _trust(context, ca)


def _load(context: ssl.SSLContext, certificate: Path, private_key: Path) -> None:
    try:
        context.load_cert_chain(certificate, private_key, password=_no_passphrase)
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConfigError(f"tls: {certificate} and {private_key} cannot be used together: {_reason(error)}") from error


def _no_passphrase() -> str:
    """Without this OpenSSL would ask at the terminal."""
    raise ValueError("the key has a passphrase")


def _trust(context: ssl.SSLContext, ca: Path) -> None:
    try:
        context.load_verify_locations(ca)
    except (OSError, ValueError) as error:
        raise ConfigError(f"tls: {ca} is no certificate authority: {_reason(error)}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"tls: {path}: cannot read: {error.strerror}") from error


def _stamp_of(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()  # of what a link leads to: secrets of Kubernetes are links that are turned
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return str(error.reason or error).replace("_", " ").lower()
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
