"""The requests of the links benchmark, and the scenario that they come from. Pure: both processes derive the same ones.

The scenario was fixed before anything was measured; why its numbers are what they are:

- **Scale.** tandem-tiny has 2 KiB of KV per token, one 64th of Llama-3.1-8B's 128 KiB, and a CPU core codes about as
  much slower than a GPU. A link of B/64 therefore is to this benchmark what a link of B is to the 8B model on GPUs:
  0.2 Gbit/s stands for 13 Gbit/s, 10 Gbit/s for 640 Gbit/s.
- **Prefill** runs at 100,000 tokens/s: a worker of four H100-class GPUs at 25,000 tokens/s each (16 GFLOP per token of
  an 8B model at 40 % of 989 TFLOP/s). One queue, first come first served, in steps of 512 tokens, as the engine's
  default. It waits; it does not compute.
- **Load** is 70 % of that, 70,000 tokens/s, Poisson arrivals that wait for nobody (a public figure for one prefill node
  of a large deployment is 73,700 tokens/s). That makes 143 MB/s of KV: without compression 5.7 times what the slowest
  link carries, 0.8 times what the middle one does, a tenth of the fastest.
- **Lengths** are log-normal with the medians of the public Azure LLM code trace (prompts 1,469, answers 13 tokens) and
  the sigma that meets its mean prompt of 2,048; `--trace` reads lengths from a real trace instead.
- **Decode** gives a token every 6 ms once the KV has landed (16 GB of weights at 3.35 TB/s take 4.8 ms), with no limit
  on the batch: the transfer is what is measured.
- Every run has a new link, a new sender and a controller that knows nothing. Before the clock starts, each policy hands
  over requests one at a time for `warm_up_s` (at most `warm_up` of them), which are not counted: a worker that has been
  up for a second. The slow links are learned in that time, not the rare cases.

With an overloaded link the queue, and with it the mean, grows with the length of the run: the factor over `none` on the
slowest link says as much about the load and the `num_requests` as about the codec. All are in every result.
"""

import csv
import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from core.config import ConfigModel

CHUNK_TOKENS = 512
LAYER_GROUP = 4


class Scenario(ConfigModel):
    """Everything that a run's requests depend on."""

    seed: int
    num_requests: int
    warm_up: int = 32
    warm_up_s: float = 0.5
    tokens_per_s: float = 70_000.0
    prefill_tokens_per_s: float = 100_000.0
    seconds_per_token: float = 0.006
    prompt_median: float = 1469.0
    prompt_sigma: float = 0.85
    prompt_limits: tuple[int, int] = (64, 8192)
    output_median: float = 13.0
    output_sigma: float = 0.85
    output_limits: tuple[int, int] = (2, 512)
    floors: tuple[float, ...] = (0.97,)
    trace: str = ""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it comes, after the start of the run, and how long it is. Warm-up comes before, at no time."""

    index: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    quality_floor: float


def requests_of(scenario: Scenario) -> list[Request]:
    """Return the warm-up, then the requests in the order of arrival, at exactly the mean rate of the scenario. Pure."""
    rng = random.Random(scenario.seed)
    draw = _traced if scenario.trace else _drawn
    lengths = draw(scenario, rng, scenario.num_requests)
    gaps = [rng.expovariate(1.0) for _ in lengths]
    scale = sum(prompt for prompt, _ in lengths) / scenario.tokens_per_s / sum(gaps)
    floors = [rng.choice(scenario.floors) for _ in lengths]
    warm_up = [
        Request(index, 0.0, prompt, output, rng.choice(scenario.floors))
        for index, (prompt, output) in enumerate(draw(scenario, rng, scenario.warm_up))
    ]
    arrivals = [total * scale for total in itertools.accumulate(gaps)]
    return warm_up + [
        Request(index, arrival_s, prompt, output, floor)
        for index, ((prompt, output), arrival_s, floor) in enumerate(
            zip(lengths, arrivals, floors, strict=True), scenario.warm_up
        )
    ]


def parts_of(prompt_tokens: int, num_layers: int) -> list[tuple[range, range]]:
    """Return the (layers, tokens) of a prompt in the order in which a prefill computes them. Pure."""
    return [
        (range(layer, min(layer + LAYER_GROUP, num_layers)), range(start, min(start + CHUNK_TOKENS, prompt_tokens)))
        for start in range(0, prompt_tokens, CHUNK_TOKENS)
        for layer in range(0, num_layers, LAYER_GROUP)
    ]


def _drawn(scenario: Scenario, rng: random.Random, count: int) -> list[tuple[int, int]]:
    def draw(median: float, sigma: float, limits: tuple[int, int]) -> int:
        return min(limits[1], max(limits[0], round(rng.lognormvariate(math.log(median), sigma))))

    return [
        (
            draw(scenario.prompt_median, scenario.prompt_sigma, scenario.prompt_limits),
            draw(scenario.output_median, scenario.output_sigma, scenario.output_limits),
        )
        for _ in range(count)
    ]


def _traced(scenario: Scenario, rng: random.Random, count: int) -> list[tuple[int, int]]:
    """Return lengths of a stretch of the trace: Azure's CSV or Mooncake's JSON lines."""
    with Path(scenario.trace).open(encoding="utf-8", newline="") as file:
        if scenario.trace.endswith(".csv"):
            rows = [(int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)]
        else:
            rows = [(row["input_length"], row["output_length"]) for row in map(json.loads, file)]
    start = rng.randrange(max(1, len(rows) - count))
    least, most = scenario.prompt_limits
    fewest, longest = scenario.output_limits
    return [
        (min(most, max(least, prompt)), min(longest, max(fewest, output)))
        for prompt, output in rows[start : start + count]
    ]
