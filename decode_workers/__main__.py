"""``python -m decode_workers --config f.yaml --worker-id d0 --redis-url redis://...``: one worker, without Ray."""

import sys

from core.membership import Role
from core.worker_main import main
from decode_workers.config import DecodeWorkerConfig
from decode_workers.service import decode_worker

if __name__ == "__main__":
    sys.exit(main(Role.DECODE, DecodeWorkerConfig, decode_worker))
