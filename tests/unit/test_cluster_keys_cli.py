"""`tandem keys --file`: the file that it leaves, and what it says."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli.app import app, main
from core.errors import Unauthenticated
from router.access.config import AccessConfig
from router.access.gatekeeper import Gatekeeper
from router.access.key_file import read_keys
from router.access.keys import KeyRing
from router.access.principal import Principal, Role


async def test_a_key_of_a_file_lives_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"

    def keys(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["keys", *arguments, "--file", str(path)])
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    secret = keys("create", "ann", "--tenant", "acme", "--lifetime", "30d").strip()
    assert secret.startswith("tnd-")
    keys("create", "ops", "--role", "admin", "--role", "inference")
    assert secret not in path.read_text()
    ann, ops = read_keys(path)
    assert ops.roles == frozenset(Role)
    assert ann.expires_at is not None
    assert ann.created_at is not None
    assert (ann.expires_at - ann.created_at).days == 30

    def keeper() -> Gatekeeper:
        door = Gatekeeper(AccessConfig(enabled=True))
        door.replace_ring("file", KeyRing(read_keys(path)))
        return door

    assert await keeper().admit([f"Bearer {secret}"]) == Principal("ann", "acme", frozenset({Role.INFERENCE}))
    listed = keys("list")
    assert all(word in listed for word in (ann.fingerprint, "ann", "acme", "valid", "admin, inference"))
    keys("revoke", ann.fingerprint)
    assert "revoked" in keys("list")
    with pytest.raises(Unauthenticated):
        await keeper().admit([f"Bearer {secret}"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["create", "ann", "--lifetime", "soon"], "is no time like"),
        (["create", "ann", "--lifetime", "0s"], "must be above 0"),
        (["create", "ann", "--tenant", "a b"], "tenant"),
        (["create", "two\nlines"], "name"),
        (["revoke", "nobody"], "no key in"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "keys.yaml"
    monkeypatch.setattr("sys.argv", ["tandem", "keys", *arguments, "--file", str(path)])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr()
    assert left.value.code == 1
    assert told.err.startswith("error: ")
    assert problem in told.err
    assert told.err.count("\n") == 1
    assert told.out == ""
    assert not path.exists()
