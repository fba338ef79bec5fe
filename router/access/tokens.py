"""JSON Web Tokens: who a token says its holder is, if one of our issuers says so.

A token counts if its issuer is configured, its algorithm is allowed for that issuer (only public-key algorithms can
be), its key is one that the issuer publishes, the signature holds, it is meant for us (aud), and it is valid now (exp,
which it must have, and nbf and iat if it has them). Nothing in the token's own header is followed: no key, no address.
"""

import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import jwt

from core.clock import Clock
from core.errors import AccessReason, InvalidRequest, Unauthenticated
from core.ids import parse_tenant
from router.access.config import JwtConfig
from router.access.jwks import KeySet, PublicKeys
from router.access.principal import Principal, Role

_MAX_NAME_CHARACTERS = 64
_MAX_VERDICTS = 4096
# What the library, or the text of a hostile token inside it, may raise.
_BROKEN = (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError)


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What was found of a token, and what it rests on."""

    principal: Principal
    expires_at: float  # Unix time
    key_set: KeySet
    keys: PublicKeys


class TokenJudge:
    """Admits holders of tokens. A verdict is kept, under the token's hash, until the token expires or its issuer's keys
    are read again: a signature takes as long to check as a thousand tokens take to stream.

    Args:
        clock: of the key sets' age. Whether a token has expired is told by the system's clock.

    Concurrency: one event loop.
    """

    def __init__(self, issuers: tuple[JwtConfig, ...], clock: Clock) -> None:
        self._issuers = {config.issuer: (config, KeySet(config, clock)) for config in issuers}
        self._verdicts: OrderedDict[bytes, _Verdict] = OrderedDict()

    @property
    def key_sets(self) -> list[KeySet]:
        return [keys for _, keys in self._issuers.values()]

    async def admit(self, token: str) -> Principal:
        """Return whom the token is about.

        Raises:
            Unauthenticated: it does not count.
            AccessUnavailable: nobody can tell now.
        """
        name = sha256(token.encode()).digest()
        known = self._verdicts.get(name)
        if known is not None:
            if time.time() < known.expires_at and known.key_set.current() is known.keys:
                self._verdicts.move_to_end(name)
                return known.principal
            del self._verdicts[name]
        verdict = await self._judge(token)
        self._verdicts[name] = verdict
        if len(self._verdicts) > _MAX_VERDICTS:
            self._verdicts.popitem(last=False)
        return verdict.principal

    async def _judge(self, token: str) -> _Verdict:
        header, issuer = _unverified(token)
        found = self._issuers.get(issuer) if isinstance(issuer, str) else None
        if found is None:
            raise _invalid("the token's issuer is not known here")
        config, key_set = found
        algorithm, key_id = header.get("alg"), header.get("kid")
        if algorithm not in config.algorithms:
            raise _invalid("the token's algorithm is not allowed here")
        if "crit" in header or not (key_id is None or isinstance(key_id, str)):
            raise _invalid("the token's header asks for what is not understood here")
        key, keys = await key_set.find(key_id, algorithm)
        if key is None:
            raise _invalid("the token is signed with a key that its issuer does not publish")
        claims = _claims(config, token, key, algorithm)
        return _Verdict(_principal(config, claims), float(claims["exp"]) + config.leeway_s, key_set, keys)


def _unverified(token: str) -> tuple[Mapping[str, Any], object]:
    """Return the header, and the issuer that is claimed: which key to try."""
    try:
        header = jwt.get_unverified_header(token)
        claims = jwt.decode(token, options={"verify_signature": False})
    except _BROKEN as error:
        raise _malformed() from error
    return header, claims.get("iss")


def _claims(config: JwtConfig, token: str, key: Any, algorithm: str) -> Mapping[str, Any]:
    try:
        return jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            audience=config.audience,
            issuer=config.issuer,
            leeway=config.leeway_s,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.ExpiredSignatureError as error:
        raise Unauthenticated(AccessReason.TOKEN_EXPIRED, "the token has expired") from error
    except jwt.InvalidAudienceError as error:
        raise _invalid("the token is not meant for this service") from error
    except jwt.ImmatureSignatureError as error:
        raise _invalid("the token is not valid yet") from error
    except jwt.MissingRequiredClaimError as error:
        raise _invalid(f"the token has no claim {error.claim}") from error
    except jwt.InvalidSignatureError as error:
        raise _invalid("the token's signature does not hold") from error
    except _BROKEN as error:
        raise _malformed() from error


def _principal(config: JwtConfig, claims: Mapping[str, Any]) -> Principal:
    tenant = _at(claims, config.tenant_claim)
    try:
        tenant = config.default_tenant if tenant is None else parse_tenant(tenant)
    except (InvalidRequest, TypeError) as error:
        raise _invalid("the token's claim of a tenant is no tenant's name") from error
    return Principal(_name(claims.get("sub")), tenant, _roles(config, _at(claims, config.roles_claim)))


def _roles(config: JwtConfig, claimed: object) -> frozenset[Role]:
    if claimed is None:
        return config.default_roles
    words = claimed.split() if isinstance(claimed, str) else claimed if isinstance(claimed, list) else []
    names = [word for word in words if isinstance(word, str)]
    return frozenset(config.role_names[name] for name in names if name in config.role_names)


def _name(subject: object) -> str:
    """Return what logs call the holder: bounded, and printable ASCII whatever the issuer let through."""
    text = subject if isinstance(subject, str) else "?"
    return "".join(one if " " < one < "\x7f" else "?" for one in text[:_MAX_NAME_CHARACTERS]) or "?"


def _at(claims: Mapping[str, Any], path: str) -> Any:
    """Return the claim at a dotted path; a name that has the dots in it (a URL, say) is taken as it is first."""
    if path in claims:
        return claims[path]
    value: Any = claims
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _invalid(problem: str) -> Unauthenticated:
    return Unauthenticated(AccessReason.INVALID_CREDENTIAL, problem)


def _malformed() -> Unauthenticated:
    return Unauthenticated(AccessReason.MALFORMED_CREDENTIAL, "the token cannot be read")
