"""Which carrier a configuration means."""

from kv_transfer.carriers.memory_links import MemoryLinks
from kv_transfer.carriers.process_group_links import ProcessGroupLinks
from kv_transfer.carriers.socket_links import SocketLinks
from kv_transfer.config import KvTransferConfig
from kv_transfer.link import Links


def open_links(config: KvTransferConfig) -> Links:
    """Return the carrier of `config.backend`. Opens nothing yet."""
    match config.backend:
        case "memory":
            return MemoryLinks()
        case "nccl":
            return ProcessGroupLinks("nccl", config.host)
        case "gloo":
            return ProcessGroupLinks("gloo", config.host)
        case "auto" | "shm" | "tcp":
            # auto on GPU machines too, until NCCL pairs have been measured (they have not been run yet)
            return SocketLinks(config.backend, config.host)
