"""How much each plane (layer, K or V, head) matters: which may be coarse, and which must not.

Noise is added to one plane at a time, in proportion to its own spread, and the divergence of the model's answers is
read. Divergence grows with the square of the noise, so the best distribution of bits (reverse water-filling; Cover and
Thomas, Elements of Information Theory, 10.3.3) gives every plane a step in inverse proportion to the root of what its
noise costs. Costs some seconds: divergence, unlike agreement, is smooth, and few prompts tell enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.injection import InjectionHarness, Reference
from kv_transfer.codecs.rotary import rope_tables
from profile_search.scores import score_prompt

NUM_PROMPTS = 16
NOISE = 0.3  # of the plane's own root mean square
_LARGEST = 3.0  # factor of a step, either way
_MAX_PLANES = 64  # with more, the heads of a layer share their steps


@dataclass(frozen=True, slots=True)
class PlaneSteps:
    """Factors on the steps of K's and V's planes ``[layer][head]``; their geometric mean is 1."""

    k: tuple[tuple[float, ...], ...]
    v: tuple[tuple[float, ...], ...]


def measure_steps(harness: InjectionHarness, references: Sequence[Reference], rope_theta: float | None) -> PlaneSteps:
    """Ask the model once per plane and prompt."""
    chosen = references[:NUM_PROMPTS]
    layers, _, heads, _, _ = chosen[0].kv.shape
    groups = [range(head, head + 1) for head in range(heads)]
    if 2 * layers * heads > _MAX_PLANES:
        groups = [range(heads)]
    spreads = [_spreads(reference.kv, rope_theta) for reference in chosen]
    costs = torch.zeros((layers, 2, heads))
    for layer in range(layers):
        for half in (0, 1):
            for group in groups:
                box = (layer, half, slice(group.start, group.stop))
                divergence = sum(
                    _divergence(harness, reference, spread, box, seed)
                    for seed, (reference, spread) in enumerate(zip(chosen, spreads, strict=True))
                )
                costs[box] = divergence / len(group)
    return steps_of(costs)


def steps_of(costs: Tensor) -> PlaneSteps:
    """Pure. Args: costs: divergence under equal relative noise, [L, 2, K], positive."""
    logs = costs.clamp_min(1e-12).log()
    factors = ((logs.mean() - logs) / 2).clamp(-math.log(_LARGEST), math.log(_LARGEST)).exp()
    k, v = (tuple(tuple(round(float(x), 3) for x in row) for row in factors[:, half]) for half in (0, 1))
    return PlaneSteps(k, v)


def _divergence(
    harness: InjectionHarness, reference: Reference, spread: Tensor, box: tuple[int, int, slice], seed: int
) -> float:
    noisy = reference.kv.float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(noisy[box].shape, generator=generator)
    noisy[box] += NOISE * spread[box][..., None, None] * noise
    return score_prompt(reference.logits, harness.inject(reference, noisy.to(reference.kv.dtype)), 1, 1).kl_sum


def _spreads(kv: Tensor, rope_theta: float | None) -> Tensor:
    """Return the root mean square of every plane about its channels' means, [L, 2, K], as the codec will see it."""
    seen = kv.float()
    if rope_theta is not None:
        seen[:, 0] = undo_rotary(seen[:, 0], rope_theta)
    return (seen - seen.mean(dim=3, keepdim=True)).pow(2).mean(dim=(3, 4)).sqrt()


def undo_rotary(keys: Tensor, theta: float) -> Tensor:
    """Return keys [.., T, D] of positions 0 to T - 1 as they were before the rotary embedding (rotated halves)."""
    num_tokens, head_dim = keys.shape[-2:]
    cosines, sines = (torch.from_numpy(table) for table in rope_tables(theta, head_dim, 0, num_tokens))
    half = head_dim // 2
    first, second = keys[..., :half], keys[..., half:]
    return torch.cat([first * cosines + second * sines, second * cosines - first * sines], dim=-1)
