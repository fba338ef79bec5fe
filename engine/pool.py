"""The KV pool: one tensor that holds the keys and values of every sequence on this device, in blocks.

Owns the memory and the two ways to look at it: `layer(i)` for attention, and the canonical frame
``[layers, 2, K, T, D]`` (contiguous, keyed by global layer, head and token ranges) that crosses workers. It does not
know who owns a block; the block manager does. Block-major, so one block is contiguous over all layers.

Concurrency: frames of blocks that nobody else writes may be read and written from other threads while a step runs.
"""

import torch

from core.errors import ConfigError
from core.layout import DTYPE_BYTES, KvLayout

TORCH_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}  # torch has these names
_MIN_COPY_BYTES = 128 * 1024  # of one block: less is not worth a call of its own


class KvPool:
    """Paged keys and values.

    Attributes:
        kv: [N, L, 2, K, S, D] of the model's dtype, on the model's device.
        layout: geometry; its dtype is the pool's.
        num_blocks: N.
    """

    def __init__(self, layout: KvLayout, num_blocks: int, device: torch.device | str = "cpu") -> None:
        """Allocate and zero the pool.

        Raises:
            ConfigError: the device has not that much memory.
        """
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
        try:
            # Zeroed: the unused tail of a block is multiplied by zero weights, and 0 * NaN is NaN. It also touches
            # every page now, so that a machine without the memory says so at load and not under traffic.
            self.kv = torch.zeros(shape, dtype=TORCH_DTYPES[layout.dtype], device=device)
            self.kv.fill_(0)
        except (RuntimeError, MemoryError) as error:
            size = num_blocks * layout.bytes_per_block
            raise ConfigError(
                f"kv_cache_bytes: {device} has not enough memory for a KV pool of {size / 2**20:.0f} MiB "
                f"({num_blocks} blocks)"
            ) from error

    def layer(self, layer_idx: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return views (keys, values) [N, K, S, D] of one layer."""
        layer = self.kv[:, layer_idx]
        return layer[:, 0], layer[:, 1]

    def frame_shape(self, layers: range, tokens: range, heads: range | None = None) -> tuple[int, int, int, int, int]:
        """Return [layers, 2, heads, T, D] of a canonical frame; all heads by default."""
        num_heads = self.layout.num_kv_heads if heads is None else len(heads)
        return (len(layers), 2, num_heads, len(tokens), self.layout.head_dim)

    def read(
        self,
        block_ids: torch.Tensor,
        layers: range,
        tokens: range,
        out: torch.Tensor | None = None,
        heads: range | None = None,
    ) -> torch.Tensor:
        """Gather a canonical frame.

        Args:
            block_ids: int64 [blocks] on the pool's device; the sequence's block table from position 0.
            layers, tokens, heads: contiguous, non-empty; tokens are places in the sequence; all heads by default.
            out: frame to fill, of `frame_shape`; made when absent.
        Returns:
            `out`, or a new contiguous tensor that the caller owns.
        """
        frame = self._frame_like(layers, tokens, heads) if out is None else self._checked(out, layers, tokens, heads)
        source, target = self._as_words(layers, heads, frame)
        for blocks, offsets, part in self._pieces(tokens):
            torch.index_select(
                source[:, :, :, :, offsets.start : offsets.stop],
                3,
                block_ids[blocks.start : blocks.stop],
                out=_split(target[:, :, :, part.start : part.stop], len(blocks)),
            )
        return frame

    def read_some(self, block_ids: torch.Tensor, layers: range, tokens: torch.Tensor, heads: range) -> torch.Tensor:
        """Gather a frame of tokens that do not follow each other: `tokens` int64 [T], places in the sequence."""
        size = self.layout.block_size
        blocks = self.kv[:, layers.start : layers.stop, :, heads.start : heads.stop]
        chosen = blocks[block_ids[tokens // size], :, :, :, tokens % size]  # [T, layers, 2, heads, D]
        return chosen.permute(1, 2, 3, 0, 4).contiguous()

    def write(
        self,
        block_ids: torch.Tensor,
        layers: range,
        tokens: range,
        frame: torch.Tensor,
        heads: range | None = None,
    ) -> None:
        """Scatter a canonical frame into the blocks; arguments as for `read`."""
        target, source = self._as_words(layers, heads, self._checked(frame, layers, tokens, heads))
        for blocks, offsets, part in self._pieces(tokens):
            values = _split(source[:, :, :, part.start : part.stop], len(blocks))
            places = target[:, :, :, :, offsets.start : offsets.stop]
            chosen = block_ids[blocks.start : blocks.stop]
            if self.kv.is_cpu and values[:, :, :, 0].nbytes >= _MIN_COPY_BYTES:
                # On CPUs a copy per block takes half the time of one `index_copy_`, once it is worth its call.
                for index, block in enumerate(chosen.tolist()):
                    places[:, :, :, block].copy_(values[:, :, :, index])
            else:
                places.index_copy_(3, chosen, values)

    def _as_words(self, layers: range, heads: range | None, frame: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (blocks [layers, 2, heads, N, S, W], frame [layers, 2, heads, T, W]), views of the widest integers.

        Bytes are bytes to a copy, but PyTorch copies 16-bit elements at a fraction of the speed of 64-bit ones.
        """
        row_bytes = self.layout.head_dim * frame.element_size()
        offset_bytes = frame.storage_offset() * frame.element_size()
        blocks = self.kv
        for dtype, word_bytes in ((torch.int64, 8), (torch.int32, 4)):
            if row_bytes % word_bytes == 0 and offset_bytes % word_bytes == 0 and frame.is_contiguous():
                blocks, frame = blocks.view(dtype), frame.view(dtype)
                break
        blocks = blocks[:, layers.start : layers.stop]
        if heads is not None:
            blocks = blocks[:, :, :, heads.start : heads.stop]
        return blocks.permute(1, 2, 3, 0, 4, 5), frame

    def _frame_like(self, layers: range, tokens: range, heads: range | None) -> torch.Tensor:
        return torch.empty(self.frame_shape(layers, tokens, heads), dtype=self.kv.dtype, device=self.kv.device)

    def _checked(self, frame: torch.Tensor, layers: range, tokens: range, heads: range | None) -> torch.Tensor:
        expected = self.frame_shape(layers, tokens, heads)
        if tuple(frame.shape) != expected or frame.dtype != self.kv.dtype:
            raise ValueError(f"frame is {frame.dtype} {list(frame.shape)}, expected {self.kv.dtype} {list(expected)}")
        return frame

    def _pieces(self, tokens: range) -> list[tuple[range, range, range]]:
        """Cut `tokens` into a ragged first block, whole blocks and a ragged last block.

        Returns:
            (blocks of the table, offsets inside each of these blocks, tokens of the frame) per piece.
        """
        size = self.layout.block_size
        pieces = []
        position = tokens.start
        while position < tokens.stop:
            block, offset = divmod(position, size)
            if offset or tokens.stop - position < size:
                end = min(tokens.stop, (block + 1) * size)
                piece = (range(block, block + 1), range(offset, offset + end - position))
            else:
                last = tokens.stop // size
                end = last * size
                piece = (range(block, last), range(size))
            pieces.append((*piece, range(position - tokens.start, end - tokens.start)))
            position = end
        return pieces


def _split(frame: torch.Tensor, num_blocks: int) -> torch.Tensor:
    """View [.., T, W] as [.., blocks, T / blocks, W]."""
    return frame.view(*frame.shape[:3], num_blocks, -1, frame.shape[4])
