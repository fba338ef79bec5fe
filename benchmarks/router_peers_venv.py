"""Makes the virtual environment of the routers that we are measured against; ours is left alone.

python -m benchmarks.router_peers_venv
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / "build" / "router-peers-venv"
PINS = ("sglang-router==0.3.2", "vllm-router==0.1.17", "ray[serve]==2.60.0", "aiohttp", "psutil")


class PeersUnavailable(Exception):
    """They cannot be installed here. One line."""


def peers_python() -> Path:
    """Make the environment unless it is there, and return its interpreter.

    Raises:
        PeersUnavailable: the package index has them not, or cannot be reached.
    """
    python, stamp = VENV / "bin" / "python", VENV / ".installed"
    pins = "\n".join(PINS)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == pins:
        return python
    print(f"making {VENV} (a minute)", file=sys.stderr, flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", *PINS]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
        raise PeersUnavailable(f"pip install failed: {lines[-1] if lines else result.returncode}")
    stamp.write_text(pins, encoding="utf-8")
    return python


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        print(peers_python())
    except PeersUnavailable as error:
        sys.exit(f"peers: {error}")


if __name__ == "__main__":
    main()
