"""What the sender expects of the transfers in its queue."""

import pytest
from prometheus_client import CollectorRegistry

from core.clock import ManualClock
from kv_transfer.choice import Choice, TransferObservation, TransferQuestion
from kv_transfer.codec import RAW
from kv_transfer.metrics import KvTransferMetrics
from kv_transfer.profile_desk import ProfileDesk
from tests.fakes.arms import MB, question

KB = 1000
EIGHTH = Choice("eighth", RAW, None, "static", ratio=4.0)  # known for less than it brings here
HALF = Choice("half", RAW, None, "static", ratio=2.0)


class AlwaysEighth:
    def choose(self, question: TransferQuestion) -> Choice:
        return EIGHTH

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
    assert desk.expected_bytes(EIGHTH, 2 * MB) == pytest.approx(250 * KB)
    assert desk.expected_bytes(EIGHTH, 20 * KB) == pytest.approx(10 * KB)


def test_an_unseen_size_is_expected_as_the_nearest_one() -> None:
    desk = desk_after((2 * MB, 250 * KB), (20 * KB, 10 * KB))
    assert desk.expected_bytes(EIGHTH, 16 * MB) == pytest.approx(2 * MB)
    assert desk.expected_bytes(EIGHTH, 4 * KB) == pytest.approx(2 * KB)


def test_of_an_unseen_profile_what_it_is_known_for_is_expected() -> None:
    assert desk_after((2 * MB, 250 * KB)).expected_bytes(HALF, MB) == MB / 2
    assert desk_after((0, 0)).expected_bytes(EIGHTH, MB) == MB / 4
