"""What the sender expects of the transfers in its queue."""

import pytest
from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from kv_transfer.choice import Choice, TransferObservation, TransferQuestion
from kv_transfer.codec import RAW
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.sender.profile_desk import ProfileDesk
from tests.fakes.arms import MB, question

KB = 1000


class AlwaysEighth:
    def choose(self, question: TransferQuestion) -> Choice:
        return Choice("eighth", RAW, None, "static")

    def observe(self, observation: TransferObservation) -> None:
        pass


def desk_after(*transfers: tuple[int, int]) -> ProfileDesk:
    """Args: raw and coded bytes of each."""
    desk = ProfileDesk(AlwaysEighth(), ManualClock(), KvTransferMetrics(CollectorRegistry()))
    for idx, (raw_bytes, payload_bytes) in enumerate(transfers):
        asked = question(f"{idx}", raw_bytes=raw_bytes)
        desk.choose(asked)
        desk.settle(asked.transfer_id, payload_bytes)
    return desk


def test_small_transfers_that_code_poorly_say_nothing_of_large_ones() -> None:
    desk = desk_after((2 * MB, 250 * KB), *[(20 * KB, 10 * KB)] * 20)
    assert desk.expected_bytes("eighth", 2 * MB) == pytest.approx(250 * KB)
    assert desk.expected_bytes("eighth", 20 * KB) == pytest.approx(10 * KB)


def test_an_unseen_size_is_expected_as_the_nearest_one() -> None:
    desk = desk_after((2 * MB, 250 * KB), (20 * KB, 10 * KB))
    assert desk.expected_bytes("eighth", 16 * MB) == pytest.approx(2 * MB)
    assert desk.expected_bytes("eighth", 4 * KB) == pytest.approx(2 * KB)


def test_of_an_unseen_profile_all_is_expected() -> None:
    assert desk_after((2 * MB, 250 * KB)).expected_bytes("half", MB) == MB
    assert desk_after((0, 0)).expected_bytes("eighth", MB) == MB
