"""Who is let in with a key or a certificate, and every way in which a credential can be no good."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from core.config import parse_config
from core.errors import AccessReason, ConfigError, InvalidRequest, PermissionDenied, ServingError, Unauthenticated
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.keys import KeyRing, checked_key, hash_of, new_key
from router.access.principal import ANYONE, Principal, Role, current_principal
from tests.issuer import claims, forged

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
KEYS = {name: new_key() for name in ("ann", "ops", "old", "gone", "twice")}
KEPT: list[dict[str, Any]] = [
    {"name": "ann", "sha256": hash_of(KEYS["ann"]), "tenant": "acme", "expires_at": NOW + timedelta(seconds=1)},
    {"name": "ops", "sha256": hash_of(KEYS["ops"]), "roles": ["admin"]},
    {"name": "old", "sha256": hash_of(KEYS["old"]), "expires_at": NOW},
    {"name": "gone", "sha256": hash_of(KEYS["gone"]), "revoked_at": NOW - timedelta(days=1)},
    {"name": "twice", "sha256": hash_of(KEYS["twice"])},
]
MISSING, MALFORMED = AccessReason.MISSING_CREDENTIAL, AccessReason.MALFORMED_CREDENTIAL
INVALID = AccessReason.INVALID_CREDENTIAL


def gatekeeper(**more: Any) -> Gatekeeper:
    config = AccessConfig.model_validate({"enabled": True, "keys": KEPT, **more})
    return Gatekeeper(config, now=lambda: NOW)


BAD: dict[str, tuple[list[str], AccessReason]] = {
    "none": ([], MISSING),
    "empty": ([""], MALFORMED),
    "blank": (["   "], MALFORMED),
    "no scheme": ([KEYS["ann"]], MALFORMED),
    "scheme alone": (["Bearer"], MALFORMED),
    "scheme and a space": (["Bearer "], MALFORMED),
    "other scheme": ([f"Basic {KEYS['ann']}"], MALFORMED),
    "scheme glued on": ([f"Bearer{KEYS['ann']}"], MALFORMED),
    "two credentials": ([f"Bearer {KEYS['ann']} {KEYS['ann']}"], MALFORMED),
    "a list": ([f"Bearer {KEYS['ann']}, Bearer {KEYS['ann']}"], MALFORMED),
    "two headers": ([f"Bearer {KEYS['ann']}"] * 2, MALFORMED),
    "a good header and a bad one": ([f"Bearer {KEYS['ann']}", "Bearer x"], MALFORMED),
    "header injection": ([f"Bearer {KEYS['ann']}\r\nx-tenant: other"], MALFORMED),
    "a line end": ([f"Bearer {KEYS['ann']}\n"], MALFORMED),
    "a zero byte": ([f"Bearer {KEYS['ann']}\x00"], MALFORMED),
    "unicode": (["Bearer schlüssel"], MALFORMED),
    "unicode that looks the same": ([f"Bearer {KEYS['ann'].replace('tnd', 'tոd')}"], MALFORMED),
    "a lone surrogate": (["Bearer \udc80"], MALFORMED),
    "huge": (["Bearer " + "x" * 100_000], MALFORMED),
    "unknown": ([f"Bearer {new_key()}"], INVALID),
    "short": (["Bearer x"], INVALID),
    "the hash itself": ([f"Bearer {hash_of(KEYS['ann'])}"], INVALID),
    "in capitals": ([f"Bearer {KEYS['ann'].upper()}"], INVALID),
    "one character more": ([f"Bearer {KEYS['ann']}x"], INVALID),
    "one character less": ([f"Bearer {KEYS['ann'][:-1]}"], INVALID),
    "expired": ([f"Bearer {KEYS['old']}"], AccessReason.KEY_EXPIRED),
    "revoked": ([f"Bearer {KEYS['gone']}"], AccessReason.KEY_REVOKED),
    "a token where there are no issuers": (["Bearer " + forged({"alg": "none"}, claims())], INVALID),
}


@pytest.mark.parametrize("name", BAD)
async def test_a_bad_credential_is_refused_and_not_repeated(name: str) -> None:
    headers, reason = BAD[name]
    with pytest.raises(Unauthenticated) as caught:
        await gatekeeper().admit(headers)
    assert caught.value.reason is reason
    assert not any(secret in str(caught.value) for secret in KEYS.values())


@pytest.mark.parametrize("form", ["Bearer {}", "bearer {}", "BEARER   {}", "Bearer {} "])
async def test_a_key_says_who_its_holder_is(form: str) -> None:
    admitted = await gatekeeper().admit([form.format(KEYS["ann"])])
    assert admitted == Principal("ann", "acme", frozenset({Role.INFERENCE}))


async def test_a_role_is_asked_for() -> None:
    refused: list[ServingError] = []
    config = AccessConfig.model_validate({"enabled": True, "keys": KEPT})
    keeper = Gatekeeper(config, now=lambda: NOW, on_refused=refused.append)
    assert (await keeper.admit([f"Bearer {KEYS['ops']}"], role=Role.ADMIN)).name == "ops"
    with pytest.raises(PermissionDenied) as caught:
        await keeper.admit([f"Bearer {KEYS['ann']}"], role=Role.ADMIN)
    assert (caught.value.reason, caught.value.who) == (AccessReason.MISSING_ROLE, "ann")
    with pytest.raises(PermissionDenied):  # an operator is no user
        await keeper.admit([f"Bearer {KEYS['ops']}"], role=Role.INFERENCE)
    assert [type(error) for error in refused] == [PermissionDenied, PermissionDenied]


async def test_a_certificate_counts_where_no_credential_is_sent() -> None:
    keeper = gatekeeper(certificates=[{"name": "batch.acme", "tenant": "acme"}, {"name": "ops", "roles": ["admin"]}])
    assert await keeper.admit([], ["x", "batch.acme"]) == Principal("batch.acme", "acme", frozenset({Role.INFERENCE}))
    assert (await keeper.admit([f"Bearer {KEYS['ann']}"], ["ops"])).name == "ann"
    for headers, names in (([], ["stranger"]), ([], []), (["Bearer x"], ["batch.acme"])):
        with pytest.raises(Unauthenticated):
            await keeper.admit(headers, names)


async def test_off_means_anyone() -> None:
    keeper = Gatekeeper(AccessConfig())
    assert await keeper.admit(["nonsense"], role=Role.ADMIN) is ANYONE
    assert [ANYONE.tenant_for(asked) for asked in ("", "acme")] == ["", "acme"]


@pytest.mark.parametrize(
    ("roles", "asked", "given"),
    [
        ({Role.INFERENCE}, "", "acme"),
        ({Role.INFERENCE}, "acme", "acme"),
        ({Role.INFERENCE}, "other", None),
        ({Role.INFERENCE}, "ACME", None),
        ({Role.ADMIN}, "other", "other"),
        ({Role.ADMIN}, "", "acme"),
    ],
)
def test_a_tenant_is_the_caller_s_own(roles: set[Role], asked: str, given: str | None) -> None:
    principal = Principal("ann", "acme", frozenset(roles))
    if given is not None:
        assert principal.tenant_for(asked) == given
        return
    with pytest.raises(PermissionDenied) as caught:
        principal.tenant_for(asked)
    assert caught.value.reason is AccessReason.OTHER_TENANT


def test_code_that_forgot_to_admit_is_refused() -> None:
    with pytest.raises(PermissionDenied):
        current_principal()


async def test_a_key_that_one_source_revoked_is_revoked_for_all() -> None:
    keeper = gatekeeper()
    credential = [f"Bearer {KEYS['twice']}"]
    assert (await keeper.admit(credential)).name == "twice"
    key = checked_key("twice", "", frozenset({Role.INFERENCE}), KEYS["twice"], NOW, None)
    keeper.replace_ring("shared", KeyRing([key]))
    assert (await keeper.admit(credential)).name == "twice"
    keeper.replace_ring("shared", KeyRing([key.model_copy(update={"revoked_at": NOW})]))
    with pytest.raises(Unauthenticated):
        await keeper.admit(credential)


def test_a_hash_that_only_begins_like_a_key_s_is_another_key() -> None:
    key = checked_key("ann", "", frozenset({Role.INFERENCE}), KEYS["ann"], NOW, None)
    ring = KeyRing([key])
    last = "0" if key.sha256[-1] != "0" else "1"
    assert ring.find(key.sha256) is key
    assert ring.find(key.sha256[:-1] + last) is None
    assert ring.find(key.fingerprint) is None


def test_keys_are_long_random_and_recognisable() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("tnd-") and len(key) == 47 and key[4:].isalnum() for key in keys)
    assert len(set("".join(key[4:] for key in keys))) == 62


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("name", {"name": ""}),
        ("name", {"name": "two\nlines"}),
        ("name", {"name": "x" * 65}),
        ("tenant", {"tenant": "a b"}),
        ("lifetime_s", {"lifetime_s": 0.0}),
        ("lifetime_s", {"lifetime_s": -1.0}),
        ("lifetime_s", {"lifetime_s": float("nan")}),
        ("lifetime_s", {"lifetime_s": float("inf")}),
        ("lifetime_s", {"lifetime_s": 1e300}),
    ],
)
def test_what_a_key_cannot_be_is_named(field: str, changes: dict[str, Any]) -> None:
    said: dict[str, Any] = {"name": "ann", "tenant": "", "roles": frozenset({Role.ADMIN}), "lifetime_s": 60.0} | changes
    with pytest.raises(InvalidRequest) as caught:
        checked_key(key=new_key(), now=NOW, **said)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("access", "problem"),
    [
        ({"keys": [KEPT[0], KEPT[0]]}, "the same key is there twice"),
        ({"keys": [{"name": "ann", "sha256": KEYS["ann"]}]}, "sha256"),  # the key where its hash belongs
        ({"keys": [KEPT[0] | {"roles": []}]}, "roles"),
        ({"keys": [KEPT[0] | {"roles": ["root"]}]}, "roles"),
        ({"keys": [KEPT[0] | {"tenant": "a/b"}]}, "tenant"),
        ({"keys": [KEPT[0] | {"expires_at": datetime(2030, 1, 1)}]}, "expires_at"),  # in which time zone?
        ({"certificates": [{"name": "a"}, {"name": "a"}]}, "the same name is there twice"),
    ],
)
def test_a_configuration_that_cannot_be_meant_is_refused(access: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_config(AccessConfig, access, source="test")
    assert KEYS["ann"] not in str(caught.value)
