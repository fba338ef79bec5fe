"""Boxes of KV: (layers, heads, tokens) in global numbers. The unit that is pushed, cut, framed and accounted for.

Global ranges are what lets the two sides differ: a block size or a tensor-parallel degree never appears here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Box:
    """Half-open global ranges of step 1, none empty."""

    layers: range
    heads: range
    tokens: range

    @property
    def volume(self) -> int:
        """Number of (layer, head, token) cells; each is one K and one V vector of head_dim."""
        return len(self.layers) * len(self.heads) * len(self.tokens)

    def from_token(self, token: int) -> "Box | None":
        """Return the part of the box that is not before `token`, None when nothing is left. Pure."""
        if self.tokens.stop <= token:
            return None
        return Box(self.layers, self.heads, range(max(token, self.tokens.start), self.tokens.stop))

    def contains(self, other: "Box") -> bool:
        return (
            _contains(self.layers, other.layers)
            and _contains(self.heads, other.heads)
            and _contains(self.tokens, other.tokens)
        )

    def merge(self, other: "Box") -> "Box | None":
        """Return the union when it is a box and `other` follows directly in tokens or in layers, else None. Pure."""
        if self.heads != other.heads:
            return None
        if self.layers == other.layers and self.tokens.stop == other.tokens.start:
            return Box(self.layers, self.heads, range(self.tokens.start, other.tokens.stop))
        if self.tokens == other.tokens and self.layers.stop == other.layers.start:
            return Box(range(self.layers.start, other.layers.stop), self.heads, self.tokens)
        return None


def _contains(outer: range, inner: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def cut(box: Box, cell_bytes: int, max_bytes: int, token_align: int) -> Iterator[Box]:
    """Split a box into pieces of at most `max_bytes`, as even as possible. Pure.

    Cuts by tokens first and at multiples of `token_align` (the reader's block size) where the piece is long enough, so
    that a gather copies whole runs; by layers only when one token over all layers does not fit.

    Args:
        cell_bytes: bytes of one (layer, head, token).

    Raises:
        ConfigError: not even one token of one layer fits.
    """
    token_bytes = cell_bytes * len(box.heads)  # one token of one layer
    layer_step = min(len(box.layers), max_bytes // token_bytes)
    if layer_step == 0:
        raise ConfigError(f"a frame of {max_bytes} bytes cannot hold one token of one layer ({token_bytes} bytes)")
    for layer in range(box.layers.start, box.layers.stop, layer_step):
        layers = range(layer, min(layer + layer_step, box.layers.stop))
        for tokens in _cut_tokens(box.tokens, max_bytes // (token_bytes * len(layers)), token_align):
            yield Box(layers, box.heads, tokens)


def _cut_tokens(tokens: range, max_tokens: int, align: int) -> Iterator[range]:
    num_pieces = -(-len(tokens) // max_tokens)
    step = -(-len(tokens) // num_pieces)
    if max_tokens >= align:
        step = min(-(-step // align) * align, max_tokens // align * align)
    start = tokens.start
    while start < tokens.stop:
        stop = start + step
        if step >= align:
            stop -= stop % align  # the first piece of an unaligned range is the shorter one
        stop = min(stop, tokens.stop)
        yield range(start, stop)
        start = stop
