"""Finding a running cluster, and never a dead one; folders of dead launchers are swept."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.run_file import RunRecord, claim, find, run_folder
from cluster.workspace import MARK, marked_processes, workspace
from core.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def record(name: str) -> RunRecord:
    return RunRecord.of_this_process(name, "127.0.0.1:1", "mark", "c.yaml")


def test_found_while_its_launcher_lives() -> None:
    with claim("one") as file:
        with pytest.raises(ConfigError, match="no cluster is up"):
            find(None)  # claimed, nothing written yet
        file.write(record("one").model_copy(update={"gateway": "a much longer address:12345"}))
        file.write(record("one"))
        assert find(None) == find("one") == record("one")
        with pytest.raises(ConfigError, match="cluster 'two' is up on this machine"):
            find("two")
    assert not list(run_folder().iterdir())


def test_a_name_is_held_once() -> None:
    with claim("one"), pytest.raises(ConfigError, match="'one' is up already"), claim("one"):
        pass


def test_several_need_a_name() -> None:
    with claim("one") as one, claim("two") as two:
        one.write(record("one"))
        two.write(record("two"))
        with pytest.raises(ConfigError, match=r"several clusters are up \(one, two\)"):
            find(None)
        assert find("two").cluster == "two"


@pytest.mark.parametrize("change", [{"pid": 2**22 - 1}, {"created_s": 1.0}])
def test_a_dead_launcher_is_not_found(change: dict[str, float]) -> None:
    """Also when its process number belongs to somebody else by now."""
    with claim("one") as file:
        file.write(record("one").model_copy(update=change))
        with pytest.raises(ConfigError, match="no cluster"):
            find(None)


def test_a_folder_that_cannot_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder / "file"))
    with pytest.raises(ConfigError, match="cannot write"), claim("one"):
        pass


def test_workspace_marks_descendants_and_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(MARK, raising=False)
    with workspace() as (path, mark):
        assert path.is_dir()
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            assert [process.pid for process in marked_processes(mark)] == [child.pid]
            child.communicate(b"\n")
        assert marked_processes(mark) == []
    assert not path.exists()


def test_workspace_sweeps_what_dead_launchers_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    dead, other = folder / "tandem-dead", folder / "tandem-notes"
    for path in (dead, other):
        path.mkdir()
    (dead / "launcher.lock").touch()
    with workspace() as (alive, _), workspace():
        assert not dead.exists()
        assert alive.exists(), "its launcher lives"
        assert other.exists(), "not a launcher's"
