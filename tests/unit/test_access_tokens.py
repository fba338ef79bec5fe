"""Tokens: whose word is taken, and every way in which a token can be no good."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from core.clock import MonotonicClock
from core.config import parse_config
from core.errors import AccessReason, AccessUnavailable, ConfigError, Unauthenticated
from router.access.config import JwtConfig
from router.access.jwks import PublicKeys
from router.access.principal import Principal, Role
from router.access.tokens import TokenJudge
from tests.issuer import AUDIENCE, ISSUER, Issuer, claims, forged, public_jwk

INVALID, MALFORMED = AccessReason.INVALID_CREDENTIAL, AccessReason.MALFORMED_CREDENTIAL
EXPIRED = AccessReason.TOKEN_EXPIRED


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture(scope="module")
def key_file(issuer: Issuer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("issuer") / "jwks.json"
    path.write_text(json.dumps(issuer.key_set()))
    return path


def judge_of(key_file: Path, **more: Any) -> TokenJudge:
    said = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": key_file, "leeway_s": 2, **more}
    return TokenJudge((JwtConfig.model_validate(said),), MonotonicClock())


def joined(said: str, signed: str) -> str:
    """Return what the one token says with the other's signature."""
    return said.rpartition(".")[0] + "." + signed.rpartition(".")[2]


GOOD: dict[str, tuple[Callable[[Issuer], str], Principal]] = {
    "rsa": (lambda one: one.token(), Principal("ann", "acme", frozenset({Role.INFERENCE}))),
    "ec": (lambda one: one.token("ec"), Principal("ann", "acme", frozenset({Role.INFERENCE}))),
    "roles": (
        lambda one: one.token(roles=["admin", "inference", "cook"]),
        Principal("ann", "acme", frozenset(Role)),
    ),
    "words": (lambda one: one.token(roles="admin cook"), Principal("ann", "acme", frozenset({Role.ADMIN}))),
    "no role that means anything": (lambda one: one.token(roles=["cook"]), Principal("ann", "acme", frozenset())),
    "no tenant": (lambda one: one.token(tenant=None), Principal("ann", "", frozenset({Role.INFERENCE}))),
    "several audiences": (
        lambda one: one.token(aud=["other", AUDIENCE]),
        Principal("ann", "acme", frozenset({Role.INFERENCE})),
    ),
    "expired within the leeway": (
        lambda one: one.token(exp=time.time() - 1),
        Principal("ann", "acme", frozenset({Role.INFERENCE})),
    ),
    "a name that would break a log": (
        lambda one: one.token(sub="ann\n\x1b[2J{" + "x" * 100),
        Principal("ann??[2J{" + "x" * 55, "acme", frozenset({Role.INFERENCE})),
    ),
}
BAD: dict[str, tuple[Callable[[Issuer], str], AccessReason]] = {
    "alg none": (lambda one: forged({"alg": "none", "kid": "rsa"}, claims()), INVALID),
    "alg None": (lambda one: forged({"alg": "None", "kid": "rsa"}, claims()), INVALID),
    "no alg": (lambda one: forged({"kid": "rsa"}, claims()), INVALID),
    "alg is a list": (lambda one: forged({"alg": ["RS256"], "kid": "rsa"}, claims()), INVALID),
    "hs256 with the public key": (
        lambda one: forged({"alg": "HS256", "kid": "rsa"}, claims(), one.public_pem()),
        INVALID,
    ),
    "rs256 that is an hmac": (
        lambda one: forged({"alg": "RS256", "kid": "rsa"}, claims(), one.public_pem()),
        INVALID,
    ),
    "an algorithm that is not allowed": (
        lambda one: jwt.encode(claims(), one.keys["rsa"], "PS256", headers={"kid": "rsa"}),
        INVALID,
    ),
    "another key under a known name": (
        lambda one: jwt.encode(claims(), Issuer().keys["rsa"], "RS256", headers={"kid": "rsa"}),
        INVALID,
    ),
    "the key of another algorithm": (lambda one: one.token("ec", header={"kid": "rsa"}), INVALID),
    "unknown kid": (lambda one: one.token(header={"kid": "nobody"}), INVALID),
    "kid is a number": (lambda one: forged({"alg": "RS256", "kid": 1}, claims()), MALFORMED),
    "kid is a path": (lambda one: one.token(header={"kid": "../../etc/passwd"}), INVALID),
    "brings its own key": (
        lambda one: jwt.encode(
            claims(),
            (other := Issuer()).keys["rsa"],
            "RS256",
            headers={"jwk": public_jwk(other.keys["rsa"]), "jku": "http://127.0.0.1:1/"},
        ),
        INVALID,
    ),
    "a critical extension": (lambda one: one.token(header={"crit": ["exp"], "exp": 1}), MALFORMED),
    "expired": (lambda one: one.token(exp=time.time() - 60), EXPIRED),
    "no exp": (lambda one: one.token(exp=None), INVALID),
    "exp is no number": (lambda one: one.token(exp="tomorrow"), MALFORMED),
    "exp is infinite": (lambda one: one.token(exp=float("inf")), MALFORMED),
    "exp is nan": (lambda one: one.token(exp=float("nan")), MALFORMED),
    "not yet valid": (lambda one: one.token(nbf=time.time() + 60), INVALID),
    "issued in the future": (lambda one: one.token(iat=time.time() + 60), INVALID),
    "other audience": (lambda one: one.token(aud="other"), INVALID),
    "no audience": (lambda one: one.token(aud=None), INVALID),
    "other issuer": (lambda one: one.token(iss="https://issuer.example.evil"), INVALID),
    "no issuer": (lambda one: one.token(iss=None), INVALID),
    "issuer is a list": (lambda one: forged({"alg": "RS256", "kid": "rsa"}, claims(iss=[ISSUER])), INVALID),
    "tenant is no name": (lambda one: one.token(tenant="a b"), INVALID),
    "tenant is a number": (lambda one: one.token(tenant=7), INVALID),
    "tenant is too long": (lambda one: one.token(tenant="t" * 65), INVALID),
    "another token's signature": (lambda one: joined(one.token(tenant="other"), one.token()), INVALID),
    "no signature": (lambda one: one.token().rpartition(".")[0] + ".", INVALID),
    "claims are a list": (lambda one: forged({"alg": "RS256"}, [1]), MALFORMED),
    "claims are deep": (lambda one: forged({"alg": "RS256"}, json.loads("[" * 900 + "]" * 900)), MALFORMED),
    "not base64": (lambda one: "a.~.c", MALFORMED),
    "empty parts": (lambda one: "..", MALFORMED),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_good_token_says_who_it_is_about(name: str, issuer: Issuer, key_file: Path) -> None:
    make, principal = GOOD[name]
    assert await judge_of(key_file).admit(make(issuer)) == principal


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_token_is_refused(name: str, issuer: Issuer, key_file: Path) -> None:
    make, reason = BAD[name]
    token = make(issuer)
    with pytest.raises(Unauthenticated) as caught:
        await judge_of(key_file).admit(token)
    assert caught.value.reason is reason
    assert all(part not in str(caught.value) for part in token.split(".") if len(part) > 8)


async def test_an_issuer_s_own_words_are_understood(issuer: Issuer, key_file: Path) -> None:
    judge = judge_of(
        key_file,
        tenant_claim="org.id",
        roles_claim="https://issuer.example/groups",
        role_names={"ops": "admin"},
        default_tenant="rest",
    )
    groups: dict[str, Any] = {"https://issuer.example/groups": ["ops", "admin"]}
    token = issuer.token(org={"id": "acme"}, **groups)
    assert await judge.admit(token) == Principal("ann", "acme", frozenset({Role.ADMIN}))
    assert (await judge.admit(issuer.token(tenant=None))).tenant == "rest"


async def test_without_a_key_s_name_only_one_key_can_be_meant(issuer: Issuer, tmp_path: Path) -> None:
    unnamed = jwt.encode(claims(), issuer.keys["rsa"], "RS256")
    path = tmp_path / "jwks.json"
    path.write_text(json.dumps(issuer.key_set()))
    assert (await judge_of(path).admit(unnamed)).name == "ann"
    other = public_jwk(Issuer().keys["rsa"])
    path.write_text(json.dumps({"keys": [*issuer.key_set()["keys"], other]}))
    with pytest.raises(Unauthenticated):
        await judge_of(path).admit(unnamed)


async def test_keys_that_cannot_be_read_are_our_fault_not_the_caller_s(issuer: Issuer, tmp_path: Path) -> None:
    path = tmp_path / "jwks.json"
    for content in (None, b"", b"[]", b"\xff", b'{"keys": 1}', b'{"keys": [1]}'):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(AccessUnavailable):
            await judge_of(path).admit(issuer.token())


def test_keys_that_are_no_good_for_signatures_are_passed_over(issuer: Issuer) -> None:
    weak = rsa.generate_private_key(public_exponent=65_537, key_size=1024)
    good = public_jwk(issuer.keys["rsa"])
    for key in (
        {"kty": "oct", "k": "c2VjcmV0", "kid": "k"},
        good | {"kid": "k", "use": "enc"},
        good | {"kid": "k", "alg": "PS256"},
        public_jwk(weak) | {"kid": "k"},
        {"kty": "RSA", "kid": "k", "n": "!", "e": "AQAB"},
        {"kty": "RSA", "kid": "k"},
    ):
        assert PublicKeys({"keys": [key]}).find("k", "RS256") is None
    assert PublicKeys({"keys": [good | {"kid": "k"}]}).find("k", "RS256") is not None


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"algorithms": ["HS256"]}, "algorithms"),
        ({"algorithms": ["none"]}, "algorithms"),
        ({"algorithms": []}, "algorithms"),
        ({"jwks_file": None, "jwks_url": "http://issuer.example/keys"}, "https"),
        ({"jwks_file": None, "jwks_url": "file:///etc/passwd"}, "https"),
        ({"jwks_file": None, "jwks_url": "https://me:secret@issuer.example/"}, "neither user nor password"),
        ({"jwks_file": None, "issuer": "issuer.example"}, "https"),
        ({"jwks_url": "https://issuer.example/keys"}, "either jwks_file or jwks_url"),
    ],
)
def test_a_configuration_that_would_be_unsafe_is_refused(said: dict[str, Any], problem: str) -> None:
    whole = {"issuer": ISSUER, "audience": AUDIENCE, "jwks_file": "jwks.json", **said}
    with pytest.raises(ConfigError, match=problem):
        parse_config(JwtConfig, whole, source="test")
