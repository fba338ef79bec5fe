"""An issuer of tokens for tests: its keys, its published key set, and tokens of every kind, good and forged."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

ISSUER = "https://issuer.example"
AUDIENCE = "tandem"
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


class Issuer:
    """Signs with keys named by `kid`; publishes all of them."""

    def __init__(self) -> None:
        self.keys: dict[str, PrivateKey] = {
            "rsa": rsa.generate_private_key(public_exponent=65_537, key_size=2048),
            "ec": ec.generate_private_key(ec.SECP256R1()),
        }

    def key_set(self) -> dict[str, Any]:
        """Return what is published."""
        return {"keys": [public_jwk(key) | {"kid": kid, "use": "sig"} for kid, key in self.keys.items()]}

    def token(self, kid: str = "rsa", *, header: Mapping[str, Any] | None = None, **changes: Any) -> str:
        """Return a good token but for the changes: claims to set, or with None, to leave out."""
        algorithm = "RS256" if isinstance(self.keys[kid], rsa.RSAPrivateKey) else "ES256"
        return jwt.encode(claims(**changes), self.keys[kid], algorithm, headers={"kid": kid, **(header or {})})

    def public_pem(self, kid: str = "rsa") -> bytes:
        return (
            self.keys[kid]
            .public_key()
            .public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        )


def claims(**changes: Any) -> dict[str, Any]:
    now = time.time()
    good = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "iat": now - 5, "exp": now + 300, "tenant": "acme"}
    return {name: value for name, value in (good | changes).items() if value is not None}


def public_jwk(key: PrivateKey) -> dict[str, Any]:
    if isinstance(key, rsa.RSAPrivateKey):
        return RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
    return ECAlgorithm.to_jwk(key.public_key(), as_dict=True)


def forged(header: Mapping[str, Any], payload: object, secret: bytes = b"") -> str:
    """Return a token that no library would make: any header, and an HMAC with a secret of the forger's choice."""
    signed = b".".join(_encoded(json.dumps(part).encode()) for part in (header, payload))
    mac = hmac.digest(secret, signed, hashlib.sha256) if secret else b""
    return (signed + b"." + _encoded(mac)).decode()


def _encoded(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
