"""An issuer's public keys: from a file or from where the issuer publishes them, kept, and asked for again.

The set is asked for again every `refresh_interval_s`, and at once when a token names a key that is not in it, but never
more often than every `retry_interval_s`: an issuer that changes its keys is followed at once, and a stranger with
invented key names cannot make this process hammer it. What cannot be fetched leaves the old set in force for
`max_stale_s`. Fetching happens on a thread, under a deadline, without redirects, up to a bounded size.
"""

import asyncio
import json
import logging
import ssl
import time
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NoReturn

import jwt
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.algorithms import Algorithm

from core.clock import Clock
from core.errors import AccessUnavailable, ConfigError
from router.access.config import JwtConfig, check_web_address

_log = logging.getLogger(__name__)
_MAX_BYTES = 1024 * 1024
_MAX_KEYS = 256
_MIN_RSA_BITS = 2048
_KIND = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}


class PublicKeys:
    """Of one published set. Immutable."""

    def __init__(self, document: object) -> None:
        """Raises: ValueError, when this is no key set."""
        keys = document.get("keys") if isinstance(document, dict) else None
        if not isinstance(keys, list) or not all(isinstance(key, dict) for key in keys):
            raise ValueError("this is no JSON Web Key Set")
        if len(keys) > _MAX_KEYS:
            raise ValueError(f"a set of {len(keys)} keys; at most {_MAX_KEYS} are read")
        self._keys = [key for key in keys if key.get("use", "sig") == "sig"]

    def find(self, key_id: str | None, algorithm: str) -> Any | None:
        """Return the public key of this name that fits this algorithm; without a name, the only one that fits."""
        fitting = [key for key in self._keys if _fits(key, algorithm)]
        if key_id is not None:
            fitting = [key for key in fitting if key.get("kid") == key_id]
        return _public_key(fitting[0], algorithm) if len(fitting) == 1 else None


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    return key.get("kty") == _KIND[algorithm[:2]] and key.get("alg", algorithm) == algorithm


def _public_key(key: Mapping[str, Any], algorithm: str) -> Any | None:
    maker: Algorithm = jwt.get_algorithm_by_name(algorithm)
    try:
        found = maker.from_jwk({name: value for name, value in key.items() if name != "d"})  # "d": a private key leaked
    except (jwt.PyJWTError, ValueError, TypeError):
        return None
    return None if isinstance(found, RSAPublicKey) and found.key_size < _MIN_RSA_BITS else found


class KeySet:
    """The public keys of one issuer.

    Concurrency: one event loop; `run` is one task.
    """

    def __init__(self, config: JwtConfig, clock: Clock) -> None:
        self._config = config
        self._clock = clock
        self._keys: PublicKeys | None = None
        self._fetched_at = 0.0
        self._tried_at: float | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._problem = "they were not asked for yet"

    async def run(self) -> None:
        """Keep the set fresh, until cancelled."""
        while True:
            await self._refresh()
            await asyncio.sleep(self._config.refresh_interval_s if self._keys else self._config.retry_interval_s)

    async def find(self, key_id: str | None, algorithm: str) -> tuple[Any | None, PublicKeys]:
        """Return the public key of this name that fits this algorithm, or None; and the set that was looked into.

        Raises:
            AccessUnavailable: the issuer's keys are not known, or were known too long ago.
        """
        keys = self.current()
        found = None if keys is None else keys.find(key_id, algorithm)
        if keys is None or found is None:
            await self._refresh()
            if (keys := self.current()) is None:
                raise AccessUnavailable(f"the keys of {self._config.issuer} cannot be read now")
            found = keys.find(key_id, algorithm)
        return found, keys

    def current(self) -> PublicKeys | None:
        """Return the set in force, unless there is none or it is too old; a refreshed set is another object."""
        is_stale = self._clock.now() - self._fetched_at >= self._config.max_stale_s
        return None if is_stale else self._keys

    async def _refresh(self) -> None:
        """Fetch, or wait for who does so already, unless that was tried a moment ago."""
        if self._fetching is None:
            now = self._clock.now()
            if self._tried_at is not None and now - self._tried_at < self._config.retry_interval_s:
                return
            self._tried_at = now
            self._fetching = asyncio.create_task(self._fetch(), name=f"keys of {self._config.issuer}")
            self._fetching.add_done_callback(self._on_fetched)
        await asyncio.wait([self._fetching])

    def _on_fetched(self, task: asyncio.Task[None]) -> None:
        self._fetching = None
        if not task.cancelled():
            task.result()

    async def _fetch(self) -> None:
        config = self._config
        try:
            async with asyncio.timeout(2 * config.fetch_timeout_s):  # of which the thread ends by itself
                self._keys = PublicKeys(await asyncio.to_thread(_read_keys, config))
        except (
            OSError,
            ValueError,
            RecursionError,
            HTTPException,
            ConfigError,
        ) as error:  # timeouts are OSErrors
            problem = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            if problem != self._problem:
                _log.error("the keys of %s cannot be read: %s", config.issuer, problem)
            self._problem = problem
            return
        self._fetched_at = self._clock.now()
        self._problem = ""


def _read_keys(config: JwtConfig) -> object:
    """On a thread. Raises: OSError, ValueError, HTTPException."""
    if config.jwks_file is not None:
        return json.loads(config.jwks_file.read_bytes())
    url = config.jwks_url
    if url is None:
        discovery = _read_json(f"{config.issuer.rstrip('/')}/.well-known/openid-configuration", config)
        if not isinstance(discovery, dict) or discovery.get("issuer") != config.issuer:
            raise ValueError("the discovery document is another issuer's")
        url = check_web_address(str(discovery.get("jwks_uri")))
    return _read_json(url, config)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> NoReturn:
        raise OSError("the issuer redirects; name the address that it redirects to")


def _read_json(url: str, config: JwtConfig) -> object:
    context = ssl.create_default_context(cafile=config.ca)
    opener = urllib.request.build_opener(_NoRedirects, urllib.request.HTTPSHandler(context=context))
    content = b""
    ends_at = time.monotonic() + config.fetch_timeout_s  # which bounds a server that drips; the other one, silence
    with opener.open(url, timeout=config.fetch_timeout_s) as response:
        while piece := response.read1(_MAX_BYTES):
            content += piece
            if len(content) > _MAX_BYTES:
                raise ValueError(f"more than {_MAX_BYTES} bytes")
            if time.monotonic() > ends_at:
                raise TimeoutError("the issuer is too slow")
    return json.loads(content)
