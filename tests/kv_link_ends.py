"""Both ends of one link in one process."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from kv_transfer.link import LinkPlan, Links, ReceiveEnd, SendEnd

WAIT_S = 20.0  # a deadline, not a duration: only a hang uses it up


@contextmanager
def joined(links: Links, plan: LinkPlan, *, senders: Links | None = None) -> Iterator[tuple[SendEnd, ReceiveEnd]]:
    """Open a link, and close it.

    Args:
        links: the receiver's, and the sender's if it has none of its own.
    """
    address = links.host()
    with ThreadPoolExecutor(1) as pool:
        opening: Future[ReceiveEnd] = pool.submit(links.open_receive, plan)
        sender = (senders or links).open_send(address, plan)
        receiver = opening.result(WAIT_S)
        try:
            yield sender, receiver
        finally:
            receiver.abort()
            sender.close()
            receiver.close()
