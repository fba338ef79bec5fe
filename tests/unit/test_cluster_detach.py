"""A detached launcher speaks to its starter, and goes on when that is gone."""

import os
import subprocess
import sys
from pathlib import Path

_LAUNCHER = """
import sys
from cluster.detach import say
say("coming up", "c")
sys.stdin.readline()
say("half way", "c")
say("ready", "c")
"""


def test_words_that_nobody_reads_go_to_the_log(tmp_path: Path) -> None:
    (tmp_path / "tandem").mkdir()
    environment = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdin is not None
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "coming up\n"
        launcher.stdout.close()
        launcher.stdin.write("go on\n")
        launcher.stdin.close()
        assert launcher.wait(60) == 0
    assert (tmp_path / "tandem" / "c.log").read_text() == "half way\nready\n"
