"""Issuers that publish their keys on the web: fetched, kept, asked for again, and not believed blindly."""

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jwt
import pytest

from core.clock import ManualClock
from core.errors import AccessUnavailable, Unauthenticated
from core.tls import ServerTls, server_context
from router.access.config import JwtConfig
from router.access.tokens import TokenJudge
from tests.certificates import Authority
from tests.issuer import AUDIENCE, ISSUER, Issuer, public_jwk

Answer = tuple[int, dict[str, str], bytes]


class WebServer:
    """Answers GET requests; `pages` may be changed at any time."""

    def __init__(self) -> None:
        self.pages: dict[str, Answer | Callable[[], Answer]] = {}
        self.asked: list[str] = []
        self.delay = asyncio.Event()
        self.delay.set()
        self.url = ""
        self._changed = asyncio.Condition()

    def publish(self, path: str, document: object) -> None:
        self.pages[path] = (200, {"content-type": "application/json"}, json.dumps(document).encode())

    async def wait_asked(self, count: int) -> None:
        async with asyncio.timeout(10), self._changed:
            await self._changed.wait_for(lambda: len(self.asked) >= count)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1].decode()
            self.asked.append(path)
            async with self._changed:
                self._changed.notify_all()
            await self.delay.wait()
            page = self.pages.get(path, (404, {}, b""))
            status, headers, body = page() if callable(page) else page
            lines = [f"HTTP/1.1 {status} x", f"content-length: {len(body)}", "connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the client went away, which some of these tests make it do
        finally:
            writer.close()


@asynccontextmanager
async def web_server(context: ssl.SSLContext | None = None) -> AsyncIterator[WebServer]:
    web = WebServer()
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0, ssl=context)
    scheme = "http" if context is None else "https"
    web.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield web
    finally:
        web.delay.set()
        server.close()
        await server.wait_closed()


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(1000.0)


def judge_of(clock: ManualClock, **more: Any) -> TokenJudge:
    said = {"issuer": ISSUER, "audience": AUDIENCE, "retry_interval_s": 10, "max_stale_s": 100, **more}
    return TokenJudge((JwtConfig.model_validate(said),), clock)


async def test_keys_are_fetched_once_for_all(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        web.delay.clear()
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        calls = [asyncio.create_task(judge.admit(issuer.token())) for _ in range(8)]
        await web.wait_asked(1)
        web.delay.set()
        assert {principal.name for principal in await asyncio.gather(*calls)} == {"ann"}
        for _ in range(8):
            await judge.admit(issuer.token("ec"))
        assert web.asked == ["/keys"]


async def test_a_new_key_of_the_issuer_is_followed_at_once(clock: ManualClock) -> None:
    issuer = Issuer()
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        old = issuer.token()
        await judge.admit(old)
        issuer.keys["next"] = Issuer().keys["rsa"]
        del issuer.keys["rsa"]
        web.publish("/keys", issuer.key_set())
        clock.advance(11)
        assert (await judge.admit(issuer.token("next"))).name == "ann"
        with pytest.raises(Unauthenticated):  # what is published no more counts no more
            await judge.admit(old)
        assert web.asked == ["/keys"] * 2


async def test_a_verdict_is_kept_while_it_holds(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    issuer = Issuer()
    checked: list[str] = []
    decode = jwt.decode

    def decode_and_tell(token: str, *arguments: Any, **named: Any) -> Any:
        if arguments:
            checked.append(token)
        return decode(token, *arguments, **named)

    monkeypatch.setattr(jwt, "decode", decode_and_tell)
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys", leeway_s=0)
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now)
        token, other = issuer.token(exp=now + 60), issuer.token(exp=now + 60, sub="bob")
        for _ in range(3):
            assert (await judge.admit(token)).name == "ann"
            assert (await judge.admit(other)).name == "bob"
        assert checked == [token, other]
        del issuer.keys["rsa"]  # the issuer takes its word back, and is asked again for another reason
        web.publish("/keys", issuer.key_set())
        clock.advance(11)
        with pytest.raises(Unauthenticated):
            await judge.admit(issuer.token("ec", header={"kid": "invented"}))
        with pytest.raises(Unauthenticated):
            await judge.admit(token)
        lasting = issuer.token("ec", exp=now + 60)
        for later_s, count in ((0, 1), (59, 1), (60, 2)):  # the token is judged again when it may have expired
            monkeypatch.setattr(time, "time", lambda later_s=later_s: now + later_s)
            await judge.admit(lasting)
            assert checked.count(lasting) == count


async def test_invented_key_names_do_not_make_us_hammer_the_issuer(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        for number in range(20):
            with pytest.raises(Unauthenticated):
                await judge.admit(issuer.token(header={"kid": f"invented-{number}"}))
        assert web.asked == ["/keys"]
        clock.advance(11)
        with pytest.raises(Unauthenticated):
            await judge.admit(issuer.token(header={"kid": "invented"}))
        assert web.asked == ["/keys"] * 2


async def test_an_issuer_that_is_away_leaves_its_keys_in_force_for_a_while(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        await judge.admit(issuer.token())
        web.pages.clear()
        clock.advance(99)
        await judge.admit(issuer.token())
        clock.advance(1)
        with pytest.raises(AccessUnavailable):
            await judge.admit(issuer.token())
        web.publish("/keys", issuer.key_set())
        clock.advance(11)
        await judge.admit(issuer.token())


async def test_a_set_is_refreshed_without_being_asked_for(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.publish("/keys", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys", refresh_interval_s=0.01, retry_interval_s=0.005)
        running = asyncio.create_task(judge.key_sets[0].run())
        for count in (1, 2, 3):
            await web.wait_asked(count)
            clock.advance(1)
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize(
    "page",
    [
        (500, {}, b""),
        (200, {}, b"<html>"),
        (200, {}, b'{"keys": 5}'),
        (200, {}, b'{"keys": [' + b"[" * 100_000),
        (302, {"location": "/keys-elsewhere"}, b""),
    ],
    ids=["failure", "no json", "no set", "deep", "redirect"],
)
async def test_what_is_no_key_set_is_not_taken(page: Answer, issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.pages["/keys"] = page
        web.publish("/keys-elsewhere", issuer.key_set())
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        with pytest.raises(AccessUnavailable):
            await judge.admit(issuer.token())
        assert web.asked == ["/keys"]


@pytest.mark.parametrize(("num_bytes", "is_taken"), [(1024 * 1024, True), (1024 * 1024 + 1, False)])
async def test_a_key_set_has_a_bound(num_bytes: int, is_taken: bool, issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.pages["/keys"] = (200, {}, json.dumps(issuer.key_set()).encode().ljust(num_bytes))
        judge = judge_of(clock, jwks_url=f"{web.url}/keys")
        if is_taken:
            await judge.admit(issuer.token())
        else:
            with pytest.raises(AccessUnavailable):
                await judge.admit(issuer.token())


async def test_a_silent_issuer_costs_a_bounded_wait(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.delay.clear()
        judge = judge_of(clock, jwks_url=f"{web.url}/keys", fetch_timeout_s=0.2)
        async with asyncio.timeout(10):
            with pytest.raises(AccessUnavailable):
                await judge.admit(issuer.token())


async def test_the_issuer_s_server_is_believed_by_its_certificate(
    issuer: Issuer, clock: ManualClock, tmp_path: Path
) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue("issuer")
    context = server_context(ServerTls(certificate=issued.certificate, private_key=issued.private_key))
    async with web_server(context) as web:
        web.publish("/keys", issuer.key_set())
        await judge_of(clock, jwks_url=f"{web.url}/keys", ca=authority.ca).admit(issuer.token())
        for ca in (None, Authority(tmp_path, "stranger").ca):
            with pytest.raises(AccessUnavailable):
                await judge_of(clock, jwks_url=f"{web.url}/keys", ca=ca).admit(issuer.token())


async def test_openid_discovery_finds_the_keys(issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        web.publish("/.well-known/openid-configuration", {"issuer": web.url, "jwks_uri": f"{web.url}/found"})
        web.publish("/found", issuer.key_set())
        judge = judge_of(clock, issuer=web.url)
        assert (await judge.admit(issuer.token(iss=web.url))).name == "ann"
        assert web.asked == ["/.well-known/openid-configuration", "/found"]


@pytest.mark.parametrize(
    "changes",
    [{"issuer": "https://another.example"}, {"jwks_uri": "file:///etc/passwd"}, {"jwks_uri": None}],
    ids=["another issuer", "a file", "no address"],
)
async def test_discovery_does_not_lead_astray(changes: dict[str, Any], issuer: Issuer, clock: ManualClock) -> None:
    async with web_server() as web:
        found = {"issuer": web.url, "jwks_uri": f"{web.url}/found"} | changes
        web.publish("/.well-known/openid-configuration", found)
        web.publish("/found", issuer.key_set())
        with pytest.raises(AccessUnavailable):
            await judge_of(clock, issuer=web.url).admit(issuer.token(iss=web.url))
        assert web.asked == ["/.well-known/openid-configuration"]


async def test_one_issuer_s_keys_do_not_vouch_for_another(clock: ManualClock, tmp_path: Path) -> None:
    one, other = Issuer(), Issuer()
    configs = []
    for name, issuer in (("one", one), ("other", other)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"keys": [public_jwk(issuer.keys["rsa"]) | {"kid": "rsa"}]}))
        said = {"issuer": f"https://{name}.example", "audience": AUDIENCE, "jwks_file": path}
        configs.append(JwtConfig.model_validate(said))
    judge = TokenJudge(tuple(configs), clock)
    assert (await judge.admit(one.token(iss="https://one.example"))).name == "ann"
    with pytest.raises(Unauthenticated):
        await judge.admit(one.token(iss="https://other.example"))
