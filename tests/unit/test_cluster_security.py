"""TLS and access control in the cluster's YAML: who is given what of it."""

import pickle
import stat
from pathlib import Path

import pytest

from cluster.cli.reach import Reach, reach
from cluster.config import ClusterConfig, load_cluster_config
from cluster.credentials import OPERATOR, Credentials, with_credentials
from cluster.preflight import check
from cluster.run_file import RunRecord, claim, read, run_folder
from core.config import parse_config
from core.errors import ConfigError
from core.tls import ClientTls
from router.access.gatekeeper import Gatekeeper
from router.access.principal import Principal, Role
from tests.certificates import Authority

YAML = """
model: {path: m}
tls:
  public: {certificate: certs/public.pem, private_key: certs/public.key}
  client: {ca: certs/public-ca.pem}
  internal: {certificate: /abs/node.pem, private_key: certs/node.key, ca: certs/ca.pem, server_name: tandem.internal}
router:
  access:
    enabled: true
    keys_file: keys.yaml
    audit_file: logs/audit.jsonl
    jwt:
      - {issuer: "https://issuer.example", audience: tandem, jwks_file: jwks.json}
redis: {url: "rediss://redis.example", tls: {ca: certs/redis-ca.pem}}
"""


def load(folder: Path, text: str = YAML) -> ClusterConfig:
    path = folder / "cluster.yaml"
    path.write_text(text)
    return load_cluster_config(path)


def test_files_are_relative_to_the_yaml(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.tls.public is not None
    assert config.tls.internal is not None
    assert config.redis.tls is not None
    access = config.router.access
    assert config.tls.public.private_key == tmp_path / "certs/public.key"
    assert config.tls.client.ca == tmp_path / "certs/public-ca.pem"
    assert config.tls.internal.certificate == Path("/abs/node.pem")
    assert config.redis.tls.ca == tmp_path / "certs/redis-ca.pem"
    assert access.keys_file == tmp_path / "keys.yaml"
    assert access.audit_file == tmp_path / "logs/audit.jsonl"
    assert access.jwt[0].jwks_file == tmp_path / "jwks.json"
    assert pickle.loads(pickle.dumps(config)) == config


def test_the_example_is_valid() -> None:
    config = load_cluster_config(Path(__file__).resolve().parents[2] / "examples" / "secure.yaml")
    assert config.router.access.enabled
    assert config.tls.internal is not None
    assert config.tls.internal.server_name == "tandem.internal"


def test_every_service_is_given_its_part(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.prefill_worker().tls == config.decode_worker().tls == config.tls.internal
    gateway = config.gateway()
    assert (gateway.tls, gateway.worker_tls) == (config.tls.public, config.tls.internal)
    plain = parse_config(ClusterConfig, {"model": {"path": "m"}}, source="c.yaml")
    assert [plain.prefill_worker().tls, plain.gateway().tls, plain.gateway().worker_tls] == [None] * 3


@pytest.mark.parametrize("section", ["prefill", "decode", "router"])
def test_tls_is_said_in_one_place(section: str) -> None:
    data = {"model": {"path": "m"}, section: {"tls": {"certificate": "c", "private_key": "k"}}}
    with pytest.raises(ConfigError, match=f"{section}.tls: unknown key"):
        parse_config(ClusterConfig, data, source="c.yaml")


async def test_a_launch_has_a_key_of_its_own(tmp_path: Path) -> None:
    config = load(tmp_path)
    launched, credentials = with_credentials(config)
    assert credentials.tls == config.tls.client
    keeper = Gatekeeper(launched.router.access)
    assert await keeper.admit([f"Bearer {credentials.api_key}"]) == Principal(OPERATOR, "", frozenset(Role))
    assert credentials.api_key not in repr(credentials)
    assert credentials.api_key not in launched.model_dump_json()
    assert with_credentials(config)[1].api_key != credentials.api_key


def test_an_open_cluster_has_no_credentials() -> None:
    plain = parse_config(ClusterConfig, {"model": {"path": "m"}}, source="c.yaml")
    assert with_credentials(plain) == (plain, Credentials())


def test_the_run_file_passes_them_on_to_its_user_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tls = ClientTls(ca=tmp_path / "ca.pem")
    record = RunRecord.of_this_process("c", "127.0.0.1:1", "", "mark", "c.yaml", Credentials("tnd-secret", tls))
    assert "tnd-secret" not in repr(record)
    with claim("c") as run_file:
        run_file.write(record.model_copy(update={"is_ready": True}))
        path = run_folder() / "c.json"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert read(path) == record.model_copy(update={"is_ready": True})
        found = reach(None, None, None, None, None, None)
        assert found == Reach("127.0.0.1:1", "tnd-secret", tls)
        assert "tnd-secret" not in repr(found)
        other = reach(None, None, "tnd-mine", "other.pem", None, "gw")
        assert other == Reach("127.0.0.1:1", "tnd-mine", ClientTls(ca=Path("other.pem"), server_name="gw"))


def test_another_cluster_is_not_shown_this_one_s_key(tmp_path: Path) -> None:
    assert reach(None, "far:1", None, None, None, None) == Reach("far:1")
    assert reach(None, "far:1", "tnd-far", "system", None, None) == Reach("far:1", "tnd-far", ClientTls())
    pem = tmp_path / "me.pem"
    shown = ClientTls(ca=Path("ca.pem"), certificate=pem, private_key=pem)
    assert reach(None, "far:1", None, "ca.pem", pem, None).tls == shown


def test_files_that_cannot_be_used_are_told_before_anything_starts(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    model = {"path": Path(__file__).resolve().parents[2] / "models" / "tiny"}
    pair = {"certificate": one.certificate, "private_key": one.private_key}

    def parsed(**data: object) -> ClusterConfig:
        return parse_config(ClusterConfig, {"model": model, "router": {"port": 0}} | data, source="c.yaml")

    check(parsed(tls={"public": pair, "internal": pair | {"ca": authority.ca}}))
    for data, problem in (
        ({"tls": {"public": pair | {"private_key": other.private_key}}}, "cannot be used together"),
        ({"tls": {"public": pair, "client": {"ca": tmp_path / "none.pem"}}}, r"none\.pem: cannot read"),
        ({"tls": {"internal": pair | {"ca": one.private_key}}}, "no certificate authority"),
        (
            {"router": {"port": 0, "access": {"enabled": True, "keys_file": tmp_path / "no.yaml"}}},
            "no.yaml: cannot read",
        ),
    ):
        with pytest.raises(ConfigError, match=problem):
            check(parsed(**data))
