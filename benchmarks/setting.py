"""What a result was measured on: it goes into every line, so that lines of two days can be compared."""

import os
import platform
import subprocess
from importlib.metadata import version

_SCHEDULERS = {os.SCHED_OTHER: "default", os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr"}


def describe_setting(*packages: str) -> dict[str, object]:
    """Return machine, load, scheduler, commit, and the versions of these packages."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 2),
        "scheduler": _SCHEDULERS.get(os.sched_getscheduler(0), "other"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
        "commit": commit.stdout.strip(),
    }
