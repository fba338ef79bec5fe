"""The messages between an engine and the process that follows a grammar for it. Packets keep their borders.

To the process: OPEN a walk (with what ends a generation, and the tokens so far), ADVANCE it by tokens, CLOSE it.
From the process: after each OPEN and ADVANCE one answer for the walk: its status, and a mask when there is a choice.

To the server that the processes are forked from: orders, with the text of a constraint beside them as it is. Escaped as
JSON it could be six times as long, and more than a packet holds.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

OPEN, ADVANCE, CLOSE = 1, 2, 3
MAX_PACKET_BYTES = 196_608  # what a Unix socket takes by default, less its own accounts
_COMMAND = struct.Struct("<BII")  # command, walk, number of end tokens
_ANSWER = struct.Struct("<IB")
_TOKENS_PER_PACKET = 16_384


class Status(IntEnum):
    """Where a walk stands."""

    MASK = 0  # some tokens may follow: the mask has their bits
    ANY = 1  # every token of the vocabulary may follow
    OVER = 2  # the text is complete, and nothing can follow
    STUCK = 3  # nothing can follow, and the text is not complete
    REFUSED = 4  # a token was not allowed


@dataclass(frozen=True, slots=True)
class Command:
    """What the process is asked. `end_token_ids` come with OPEN only."""

    kind: int
    walk: int
    end_token_ids: tuple[int, ...] = ()
    token_ids: tuple[int, ...] = ()


def command_packets(command: Command) -> list[bytes]:
    """Return the packets that say it: several, when there are many tokens."""
    first, rest = command.token_ids[:_TOKENS_PER_PACKET], command.token_ids[_TOKENS_PER_PACKET:]
    ints = (*command.end_token_ids, *first)
    packets = [
        _COMMAND.pack(command.kind, command.walk, len(command.end_token_ids)) + struct.pack(f"<{len(ints)}I", *ints)
    ]
    return packets + (command_packets(Command(ADVANCE, command.walk, (), rest)) if rest else [])


def read_command(packet: bytes) -> Command:
    kind, walk, num_ends = _COMMAND.unpack_from(packet)
    ints = struct.unpack(f"<{(len(packet) - _COMMAND.size) // 4}I", packet[_COMMAND.size :])
    return Command(kind, walk, ints[:num_ends], ints[num_ends:])


def answer_packet(walk: int, status: Status, mask: bytes = b"") -> bytes:
    return _ANSWER.pack(walk, status) + mask


def read_answer(packet: bytes) -> tuple[int, Status, bytes]:
    """Return the walk, its status, and the mask: bit i of byte j is token 8 j + i."""
    walk, status = _ANSWER.unpack_from(packet)
    return walk, Status(status), packet[_ANSWER.size :]


def order_packet(order: Mapping[str, object], text: str = "") -> bytes:
    """Return what the server is asked. JSON has no null characters."""
    return json.dumps(order).encode() + b"\0" + text.encode()


def read_order(packet: bytes) -> tuple[dict[str, Any], str]:
    """Return an order and its text."""
    order, _, text = packet.partition(b"\0")
    return json.loads(order), text.decode()
