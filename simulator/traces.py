"""Recorded traffic: when requests came, how long they were, which blocks of their prompts were shared.

Read from a file that the caller names; never part of the repository. Formats by ending:
- `.jsonl`, Mooncake (FAST'25): `timestamp` in ms, `input_length`, `output_length`, `hash_ids` of 512-token blocks; an
  id stands for the block and all before it. Stamps come in bins of about 3 s: see `simulator.arrivals`.
- `.csv`, Azure (2023): `TIMESTAMP,ContextTokens,GeneratedTokens`; seven fractional digits, CRLF; nothing is shared."""

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from core.errors import ConfigError

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request as recorded.

    Attributes:
        stamp_s: since the first request of the trace.
        blocks: ids of the prompt's blocks, the last one perhaps not full; equal ids mean an equal prompt up to there.
    """

    stamp_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """A recording, in order of its stamps. `block_tokens`: per block id."""

    name: str
    requests: tuple[TraceRequest, ...]
    block_tokens: int = MOONCAKE_BLOCK_TOKENS

    @property
    def duration_s(self) -> float:
        return self.requests[-1].stamp_s - self.requests[0].stamp_s if self.requests else 0.0

    def within(self, start_s: float, end_s: float) -> "Trace":
        """Return the part of the recording with stamps in [start_s, end_s)."""
        return Trace(
            self.name, tuple(one for one in self.requests if start_s <= one.stamp_s < end_s), self.block_tokens
        )


def read_trace(path: Path, *, max_requests: int | None = None) -> Trace:
    """Read a trace, or its first `max_requests` lines.

    Raises:
        ConfigError: the file cannot be read, or is no trace of a known format.
    """
    readers = {".jsonl": _read_mooncake, ".csv": _read_azure}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ConfigError(f"{path}: traces end in {' or '.join(readers)}")
    found: list[TraceRequest] = []
    try:
        with path.open(newline="", encoding="utf-8") as lines:
            for request in reader(lines):
                found.append(request)
                if len(found) == max_requests:
                    break
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: record {len(found) + 1} is not of this format: {error!r}") from error
    if not found:
        raise ConfigError(f"{path} holds no request")
    found.sort(key=lambda request: request.stamp_s)  # stable: some recordings have a pair out of order
    start_s = found[0].stamp_s
    shifted = (TraceRequest(one.stamp_s - start_s, one.prompt_tokens, one.output_tokens, one.blocks) for one in found)
    return Trace(path.stem, tuple(shifted))


def _read_mooncake(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for line in lines:
        row = json.loads(line)
        blocks = tuple(int(block) for block in row["hash_ids"])
        yield TraceRequest(row["timestamp"] / 1e3, int(row["input_length"]), max(1, int(row["output_length"])), blocks)


def _read_azure(lines: Iterable[str]) -> Iterator[TraceRequest]:
    for row in csv.DictReader(lines):
        stamp = datetime.fromisoformat(row["TIMESTAMP"][:26])  # microseconds: the seventh digit has no place to go
        prompt_tokens = max(1, int(row["ContextTokens"]))
        yield TraceRequest(stamp.timestamp(), prompt_tokens, max(1, int(row["GeneratedTokens"])))
