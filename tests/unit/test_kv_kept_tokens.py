"""A transfer that leaves tokens out is complete without them, and only if the first commit says so."""

from core.ids import RequestId, TransferId
from kv_transfer.box import Box
from kv_transfer.frame import FrameHeader
from kv_transfer.receiver import events as m
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.receiver.landing import Landing
from kv_transfer.receiver.session import ReceiverSession, ReceiveState
from kv_transfer.session import NackReason

T, R = TransferId("t"), RequestId("r")
HELD, PROMPT, KEPT = 4, 20, 6
LAYERS, HEADS = range(2), range(3)


def session() -> ReceiverSession:
    machine = ReceiverSession(T, m.Expected(R, HELD, PROMPT, 16, 30.0), offer_timeout_s=5.0, now=0.0)
    machine.handle(m.OfferReceived(R, PROMPT, 16), 0.0)
    return machine


def landing() -> Landing:
    return Landing(T, R, Coverage(Box(LAYERS, HEADS, range(HELD, PROMPT))))


def header(tokens: range, heads: range = HEADS) -> FrameHeader:
    box = Box(LAYERS, heads, tokens)
    return FrameHeader(T, 1, 1, 1, 0, box, 8, "float32", 0, b"", (100,), 2 * box.volume * 32)


def test_the_first_commit_narrows_what_is_needed_and_frames_are_judged_by_it() -> None:
    machine, one = session(), landing()
    written = one.account(header(range(HELD, HELD + KEPT)), is_exact=True)
    assert not written.is_covered
    machine.handle(written, 1.0)
    commit = m.CommitReceived(1, written.payload_bytes, 7, "half", KEPT)
    assert machine.handle(commit, 2.0) == [m.NeedOnly(KEPT)]
    assert str(machine.state) == ReceiveState.SENDING
    effects = machine.handle(one.narrow(KEPT), 2.0)
    assert machine.state is ReceiveState.LANDED
    report = effects[-1]
    assert isinstance(report, m.ReportLanded)
    assert report.kept_tokens == KEPT
    machine.check()


def test_frames_that_come_after_the_commit_are_judged_by_it() -> None:
    machine, one = session(), landing()
    machine.handle(m.CommitReceived(2, 200, 7, "half", KEPT), 1.0)
    one.narrow(KEPT)
    first = one.account(header(range(HELD, HELD + KEPT), range(2)), is_exact=True)
    assert not first.is_covered
    machine.handle(first, 2.0)
    assert str(machine.state) == ReceiveState.SENDING
    machine.handle(one.account(header(range(HELD, HELD + KEPT), range(2, 3)), is_exact=True), 3.0)
    assert machine.state is ReceiveState.LANDED


def test_what_lies_past_the_kept_tokens_does_not_make_up_for_a_hole() -> None:
    one = landing()
    one.narrow(KEPT)
    one.account(header(range(HELD, HELD + KEPT - 1)), is_exact=True)
    assert not one.account(header(range(HELD + KEPT, HELD + KEPT + 1)), is_exact=True).is_covered


def test_more_kept_than_there_were_to_send_is_a_lie() -> None:
    machine = session()
    effects = machine.handle(m.CommitReceived(0, 0, 7, "half", PROMPT - HELD + 1), 1.0)
    assert machine.state is ReceiveState.ABORTED
    assert any(isinstance(effect, m.ReportFailed) and effect.reason is NackReason.LENGTH for effect in effects)


def test_a_second_commit_cannot_narrow() -> None:
    machine, one = session(), landing()
    written = one.account(header(range(HELD, HELD + KEPT)), is_exact=True)
    machine.handle(m.CommitReceived(2, 200, 7), 1.0)
    machine.handle(written, 1.0)
    assert machine.handle(m.CommitReceived(1, 100, 7, "half", KEPT), 2.0) == []
    assert machine.state is ReceiveState.SENDING
