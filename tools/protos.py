"""Generate the stubs of `protos/*.proto` in place, or (`--check`) say whether the committed ones have drifted."""

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def generate(destination: Path) -> None:
    """Write every stub and its types below `destination`/protos.

    Raises:
        subprocess.CalledProcessError: protoc refused a file; its message is on standard error.
    """
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "protos").glob("*.proto"))]
    out = [f"--{kind}_out={destination}" for kind in ("python", "grpc_python")]
    out += [f"--{kind}_out=quiet:{destination}" for kind in ("mypy", "mypy_grpc")]
    # The plugins lie beside this interpreter, which need not be on the PATH.
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *plugins, *out, *sources]
    subprocess.run(command, cwd=ROOT, check=True)


def drifted() -> list[str]:
    """Return the committed stubs that differ from freshly generated ones."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh_root = Path(scratch)
        generate(fresh_root)
        fresh = {path.name: path.read_bytes() for path in (fresh_root / "protos").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "protos").glob("*_pb2*")}
    names = sorted(fresh.keys() | committed.keys())
    return [name for name in names if fresh.get(name) != committed.get(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a stub has drifted")
    if not parser.parse_args().check:
        generate(ROOT)
        return 0
    stale = drifted()
    if stale:
        print(f"stubs have drifted, run `make protos`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
