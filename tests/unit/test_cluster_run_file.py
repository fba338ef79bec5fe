"""Finding a running cluster, and never a dead one; and leaving nothing of a dead one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.run_file import RunRecord, claim, find, run_folder
from cluster.workspace import MARK, end_marked, folder_of, marked_processes, workspace
from core.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def record(name: str) -> RunRecord:
    return RunRecord.of_this_process(name, "127.0.0.1:1", "http://127.0.0.1:2/v1", "mark", "c.yaml")


def test_found_while_its_launcher_lives() -> None:
    with claim("one") as file:
        with pytest.raises(ConfigError, match="no cluster is up"):
            find(None)  # claimed, nothing written yet
        file.write(record("one").model_copy(update={"gateway": "a much longer address:12345"}))
        file.write(record("one"))
        assert find(None) == find("one") == record("one")
        with pytest.raises(ConfigError, match="cluster 'two' is not up on this machine"):
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


def child(code: str, **options: Any) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, **options)


def test_workspace_knows_its_processes_and_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the environment, or, for one that wiped it, by its open files; no others."""
    monkeypatch.delenv(MARK, raising=False)
    with child("input()") as stranger:
        with workspace() as (path, mark):
            assert path == folder_of(mark)
            with (
                child("input()") as heir,
                (path / "log").open("w") as log,
                child("input()", stdout=log, env={}) as wiped,
            ):
                assert {one.pid for one in marked_processes(mark)} == {heir.pid, wiped.pid}
                wiped.communicate(b"\n")
                assert {one.pid for one in marked_processes(mark)} == {heir.pid}
                assert end_marked(mark, 10.0) == []
                assert marked_processes(mark) == []
                heir.wait(10.0)
        assert MARK not in os.environ
        assert not path.exists()
        assert stranger.poll() is None
        stranger.communicate(b"\n")


_LAUNCHER = """
import os, subprocess, sys, time
from cluster.workspace import workspace

with workspace() as (folder, mark):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(mark, child.pid, flush=True)
    time.sleep(600)
"""


def test_a_killed_launcher_is_cleaned_up_after() -> None:
    with child(_LAUNCHER, stdout=subprocess.PIPE) as launcher:
        assert launcher.stdout is not None
        mark, pid = launcher.stdout.readline().decode().split()
        orphan = psutil.Process(int(pid))
        launcher.kill()
        launcher.wait(10.0)
        orphan.wait(20.0)
        reapers = [one for one in psutil.process_iter(["cmdline"]) if mark in (one.info["cmdline"] or [])]
        psutil.wait_procs(reapers, timeout=20.0)
    assert not folder_of(mark).exists()
