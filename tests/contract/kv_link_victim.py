"""A process that holds ends of links, to be killed: ``python -m tests.contract.kv_link_victim <shm> <tcp address>``.

For each address it opens a sending end to whoever started it; and it hosts, says its own address, and opens a receiving
end. Then it does nothing, for ever, but wait for its death.
"""

import sys
import threading

from kv_transfer.carriers.socket_links import SocketBackend, SocketLinks
from kv_transfer.link import LinkPlan

SLOT_BYTES = 8192
WAIT_S = 20.0


def plan_of(name: str) -> LinkPlan:
    return LinkPlan(f"kv/{name}", SLOT_BYTES, 2, WAIT_S)


def main() -> None:
    held = []
    backends: tuple[SocketBackend, ...] = ("shm", "tcp")
    for backend, address in zip(backends, sys.argv[1:], strict=True):
        links = SocketLinks(backend, "127.0.0.1")
        sender = links.open_send(address, plan_of(f"{backend}-from-victim"))
        slot = sender.acquire(WAIT_S)
        slot.memory.fill_(9)
        sender.send(slot, SLOT_BYTES)
        print(links.host(), flush=True)
        held.append((links, sender, links.open_receive(plan_of(f"{backend}-to-victim"))))
    print("ready", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
