"""Boxes, cuts, coverage and the raw codec: plain properties against naive references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from kv_transfer.box import Box, cut
from kv_transfer.codec import RAW, TORCH_DTYPES, FramePlace, default_decoders
from kv_transfer.frame import FrameRefused
from kv_transfer.receiver.coverage import Coverage
from kv_transfer.session import NackReason

TARGET = Box(range(1, 4), range(2), range(5, 17))


def _cells(box: Box) -> set[tuple[int, int, int]]:
    return {(layer, head, token) for layer in box.layers for head in box.heads for token in box.tokens}


def _inside(outer: range) -> st.SearchStrategy[range]:
    starts = st.integers(outer.start, outer.stop - 1)
    return starts.flatmap(lambda start: st.integers(start + 1, outer.stop).map(lambda stop: range(start, stop)))


_boxes = st.builds(Box, _inside(TARGET.layers), _inside(TARGET.heads), _inside(TARGET.tokens))


@given(box=_boxes, max_cells=st.integers(2, 80), align=st.integers(1, 8))
def test_a_cut_is_a_partition_into_pieces_that_fit(box: Box, max_cells: int, align: int) -> None:
    pieces = list(cut(box, cell_bytes=10, max_bytes=10 * max_cells, token_align=align))
    cells = [cell for piece in pieces for cell in _cells(piece)]
    assert len(cells) == len(set(cells))
    assert set(cells) == _cells(box)
    assert all(piece.volume <= max_cells for piece in pieces)


def test_long_pieces_begin_at_block_borders() -> None:
    pieces = list(cut(Box(range(2), range(1), range(3, 100)), cell_bytes=1, max_bytes=40, token_align=8))
    assert all(piece.tokens.start % 8 == 0 for piece in pieces[1:])
    assert len(pieces) <= 7


def test_a_slot_that_cannot_hold_one_token_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        list(cut(TARGET, cell_bytes=10, max_bytes=19, token_align=1))


@given(first=_boxes, second=_boxes)
def test_a_merge_is_the_union_or_nothing(first: Box, second: Box) -> None:
    merged = first.merge(second)
    if merged is not None:
        assert _cells(merged) == _cells(first) | _cells(second)
        assert merged.volume == first.volume + second.volume


def test_neighbours_in_tokens_or_layers_merge() -> None:
    box = Box(range(2), range(2), range(4))
    assert box.merge(Box(range(2), range(2), range(4, 6))) == Box(range(2), range(2), range(6))
    assert box.merge(Box(range(2, 3), range(2), range(4))) == Box(range(3), range(2), range(4))


@given(boxes=st.lists(_boxes, max_size=12))
def test_coverage_agrees_with_a_set_of_cells(boxes: list[Box]) -> None:
    coverage, claimed = Coverage(TARGET), set[tuple[int, int, int]]()
    for box in boxes:
        overlaps = bool(_cells(box) & claimed)
        assert coverage.overlaps(box) == overlaps
        if not overlaps:
            coverage.claim(box)
            claimed |= _cells(box)


@given(data=st.data())
def test_any_partition_in_any_order_can_be_claimed_once(data: st.DataObject) -> None:
    pieces = list(cut(TARGET, 1, data.draw(st.integers(2, 40)), 1))
    coverage = Coverage(TARGET)
    for piece in data.draw(st.permutations(pieces)):
        assert not coverage.overlaps(piece)
        coverage.claim(piece)
        assert coverage.overlaps(piece)
    assert sum(piece.volume for piece in pieces) == coverage.volume


@pytest.mark.parametrize(
    "box",
    [
        Box(range(4), range(2), range(5, 17)),
        Box(range(1, 5), range(2), range(5, 17)),
        Box(range(1, 4), range(3), range(5, 17)),
        Box(range(1, 4), range(2), range(4, 17)),
        Box(range(1, 4), range(2), range(5, 18)),
    ],
)
def test_outside_is_outside(box: Box) -> None:
    assert not Coverage(TARGET).is_inside(box)


def test_nothing_to_cover_has_no_volume_and_takes_nothing() -> None:
    coverage = Coverage(None)
    assert coverage.volume == 0
    assert not coverage.is_inside(TARGET)


@pytest.mark.parametrize("dtype", sorted(TORCH_DTYPES))
def test_raw_gives_back_the_same_bits(dtype: str) -> None:
    kv = torch.randn(2, 2, 3, 5, 8).to(TORCH_DTYPES[dtype])
    payload = torch.zeros(RAW.max_payload_bytes(kv.nbytes), dtype=torch.uint8)
    encoded = RAW.encode(kv, payload, FramePlace(Box(range(2), range(3), range(5)), 5, 2, 3))
    assert encoded.section_bytes == (kv.nbytes,)
    assert torch.equal(RAW.decode(encoded.params, [payload], kv.shape, kv.dtype), kv)


def test_raw_gathered_in_place_is_not_copied() -> None:
    payload = torch.zeros(64, dtype=torch.uint8)
    kv = payload.view(torch.float32).view(1, 2, 1, 1, 8)
    kv.fill_(3)
    RAW.encode(kv, payload, FramePlace(Box(range(1), range(1), range(1)), 1, 1, 1))
    assert RAW.decode(b"", [payload], kv.shape, kv.dtype).data_ptr() == payload.data_ptr()


@pytest.mark.parametrize(
    ("params", "lengths", "reason"),
    [
        (b"x", [64], NackReason.CODEC),
        (b"", [63], NackReason.LENGTH),
        (b"", [32, 32], NackReason.LENGTH),
        (b"", [], NackReason.LENGTH),
    ],
)
def test_raw_refuses_what_it_cannot_have_written(params: bytes, lengths: list[int], reason: NackReason) -> None:
    sections = [torch.zeros(length, dtype=torch.uint8) for length in lengths]
    with pytest.raises(FrameRefused) as refused:
        RAW.decode(params, sections, (1, 2, 1, 1, 8), torch.float32)
    assert refused.value.reason == reason


def test_codecs_are_found_by_their_id() -> None:
    assert all(codec_id == codec.codec_id for codec_id, codec in default_decoders().items())
