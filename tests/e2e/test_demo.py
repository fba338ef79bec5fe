"""The demo is its own judge; here it is only called, as a stranger would."""

from pathlib import Path

import pytest

from tests.e2e.cluster_process import tandem

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


async def test_demo(tmp_path: Path) -> None:
    code, out, err = await tandem(tmp_path, "demo")
    assert (code, err) == (0, []), "\n".join(out)
    text = "\n".join(out)
    for wanted in ("TTFT", "TPOT", "transfer", "on the wire", "profile", "prefix", "peak", "MiB (PSS)", "all held"):
        assert wanted in text
