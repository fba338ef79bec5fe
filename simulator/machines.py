"""Machines by name: latencies, sizes and links, each with where its figures come from.

- `opt13b-a100-tp1/2/4`: DistServe's own profiles (OSDI'24, simulator data): OPT-13B, A100-80G, its KV capacity. Every
  head has keys and values of its own (0.82 MB of KV per token); 25 GB/s link.
- `llama70b-a800x8`: the setting of Mooncake's paper (FAST'25): LLaMA2-70B on eight A800, by arithmetic: 2 * 70e9 flops
  per token and 4 * 80 * 8192 per pair of tokens at 55 % of 8 * 312 Tflop/s; a decode step reads 140 GB of weights
  and 320 KiB of KV per token at 60 % of 8 * 2 TB/s; cache in host memory; 4 * 200 Gbit/s, 87 GB/s measured.
- `llama70b-h200x8`: the same arithmetic for eight H200: 989 Tflop/s and 4.8 TB/s each, and the measured NCCL link
  between two of them (9.1 us, 360 GB/s).

`machine_from_file` reads what was fitted to real workers, in the same form."""

import json
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError
from simulator.latency import DecodeLatency, LinkLatency, PrefillLatency, StepLatency


@dataclass(frozen=True, slots=True)
class Machine:
    """A worker's hardware and model.

    Attributes:
        kv_tokens: that fit, for requests and cached prefixes together.
        chunk_tokens: prompt tokens per step.
        max_batch: sequences decoded at once.
    """

    name: str
    prefill: PrefillLatency
    decode: DecodeLatency
    link: LinkLatency
    kv_bytes_per_token: int
    kv_tokens: int
    chunk_tokens: int = 2048
    max_batch: int = 256


def _opt13b(
    tp: int, prefill_ms: tuple[float, float, float], decode_ms: tuple[float, float, float], kv_tokens: int
) -> Machine:
    base, per_token, per_square = prefill_ms
    step_base, per_context, per_request = decode_ms
    return Machine(
        name=f"opt13b-a100-tp{tp}",
        prefill=PrefillLatency(base / 1e3, per_token / 1e3, 2 * per_square / 1e3),  # tokens^2 / 2 pairs
        decode=DecodeLatency(
            StepLatency(step_base / 1e3, per_request / 1e3, per_context / 1e3),
            large=StepLatency(7.17e-3, 0.1583e-3, 5.80e-7) if tp == 1 else None,
        ),
        link=LinkLatency(9.1e-6, 25e9, 40),
        kv_bytes_per_token=819_200,
        kv_tokens=kv_tokens,
    )


_LLAMA70B_KV_BYTES = 327_680  # 80 layers, 8 KV heads of 128, keys and values of two bytes

_MACHINES = (
    _opt13b(1, (18.10, 0.10191, 7.12e-6), (19.93, 6.27e-4, 0.0385), 66_144),
    _opt13b(2, (14.74, 0.0686, 2.45e-6), (13.29, 3.41e-4, 0.0630), 163_008),
    _opt13b(4, (12.06, 0.0381, 5.2e-7), (10.26, 1.88e-4, 0.0327), 356_736),
    Machine(
        name="llama70b-a800x8",
        prefill=PrefillLatency(0.020, 1.02e-4, 1.91e-9),
        decode=DecodeLatency(StepLatency(0.0150, 1.0e-4, 3.4e-8)),
        link=LinkLatency(5e-5, 87e9, 80),
        kv_bytes_per_token=_LLAMA70B_KV_BYTES,
        kv_tokens=3_000_000,
    ),
    Machine(
        name="llama70b-h200x8",
        prefill=PrefillLatency(0.012, 3.22e-5, 6.0e-10),
        decode=DecodeLatency(StepLatency(0.0061, 4.0e-5, 1.42e-8)),
        link=LinkLatency(9.1e-6, 360e9, 80),
        kv_bytes_per_token=_LLAMA70B_KV_BYTES,
        kv_tokens=3_000_000,
    ),
)
MACHINES = {machine.name: machine for machine in _MACHINES}


def get_machine(name: str) -> Machine:
    """Return a machine by its name, or from a file (`machine_from_file`) when the name ends in .json.

    Raises:
        ConfigError: no such machine.
    """
    if name.endswith(".json"):
        return machine_from_file(Path(name))
    if name not in MACHINES:
        raise ConfigError(f"no machine {name!r}; known are {', '.join(MACHINES)}, or a .json file with a fit")
    return MACHINES[name]


def machine_from_file(path: Path) -> Machine:
    """Read a fit: the fields of `Machine`, its latencies as lists in the order of their fields.

    Raises:
        ConfigError: the file cannot be read or has not these fields.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return Machine(
            name=str(fields.get("name", path.stem)),
            prefill=PrefillLatency(*map(float, fields["prefill"])),
            decode=DecodeLatency(StepLatency(*map(float, fields["decode"]))),
            link=LinkLatency(float(fields["link"][0]), float(fields["link"][1]), int(fields["link"][2])),
            kv_bytes_per_token=int(fields["kv_bytes_per_token"]),
            kv_tokens=int(fields["kv_tokens"]),
            chunk_tokens=int(fields.get("chunk_tokens", 2048)),
            max_batch=int(fields.get("max_batch", 256)),
        )
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ConfigError(f"{path} is no fit of a machine: {error!r}") from error
