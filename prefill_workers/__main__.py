"""``python -m prefill_workers --config f.yaml --worker-id p0 --redis-url redis://...``: one worker, without Ray."""

import sys

from core.membership import Role
from core.worker_main import main
from prefill_workers.config import PrefillWorkerConfig
from prefill_workers.service import prefill_worker

if __name__ == "__main__":
    sys.exit(main(Role.PREFILL, PrefillWorkerConfig, prefill_worker))
