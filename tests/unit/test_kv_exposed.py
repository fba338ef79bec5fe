"""The exposed part of a hand-off begins when the prefill ends, however long the commit then waits behind its frames."""

import pytest

from core.ids import RequestId, TransferId
from kv_transfer.receiver import events as m
from kv_transfer.receiver.session import ReceiverSession

T, R = TransferId("t"), RequestId("r")


@pytest.mark.parametrize(
    ("waited_s", "exposed_s"), [(0.0, 2.0), (4.0, 6.0), (100.0, 11.0)], ids=["at once", "behind frames", "a lie"]
)
def test_what_the_commit_waited_is_exposed_and_never_more_than_the_transfer(waited_s: float, exposed_s: float) -> None:
    machine = ReceiverSession(T, m.Expected(R, 0, 8, 16, 30.0), offer_timeout_s=5.0, now=0.0)
    machine.handle(m.OfferReceived(R, 8, 16), 1.0)
    machine.handle(m.FramesWritten(1, 100, is_covered=False), 5.0)
    machine.handle(m.CommitReceived(2, 200, 7, waited_s=waited_s), 10.0)
    [ack, landed] = machine.handle(m.FramesWritten(2, 200, is_covered=True), 12.0)
    assert isinstance(ack, m.SayAck)
    assert isinstance(landed, m.ReportLanded)
    assert ack.exposed_s == landed.exposed_s == exposed_s
