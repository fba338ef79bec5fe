"""What constraints cost: until they are ready, and per token, with tandem-tiny's vocabulary and a large made-up one.

One line of JSON per constraint and vocabulary: seconds until the grammar is ready in its process (`ready_s`, without
the server's own start, which is `start_s`), and milliseconds from telling a token to having the mask of the next one
(`token_ms`), with a processor to spare and nothing computed meanwhile: in an engine it overlaps with the model. Texts
are random, mostly of short tokens, and begin again when they are over. `apply_ms` is the mask's way onto one row of
logits on a CPU, `plain_ms` an arg max of that row.

Run ``python -m benchmarks.constraints``: about a minute.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from core.clock import MonotonicClock
from core.constraint import Constraint, ConstraintKind
from core.errors import ServingError
from engine.masks import forbid
from grammar.config import GrammarConfig
from grammar.host import ModelTokens
from grammar.library import GrammarLibrary
from grammar.walk import Grammar, await_answers

_TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
_WAIT_S = 30.0
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "score": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "kind": {"enum": ["a", "b", None]},
        "address": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}},
    },
    "required": ["name", "age", "kind"],
}
_CONSTRAINTS = {
    "json_object": Constraint(ConstraintKind.JSON_OBJECT),
    "schema": Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(_PERSON)),
    "schema, maxLength 40": Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "string", "maxLength": 40}'),
    "schema, maxLength 1000": Constraint(ConstraintKind.JSON_SCHEMA, '{"type": "string", "maxLength": 1000}'),
    "regex": Constraint(ConstraintKind.REGEX, r"[a-z]+@[a-z]+\.(com|org)"),
    "choice": Constraint(ConstraintKind.CHOICE, json.dumps([f"choice number {one}" for one in range(100)])),
    "grammar": Constraint(ConstraintKind.GRAMMAR, 'root ::= term (" + " term)*\nterm ::= [0-9]+ | "(" root ")"'),
}


def large_vocabulary(folder: Path, size: int) -> ModelTokens:
    """Write a byte-level tokenizer.json of made-up words into `folder`."""
    dice = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space, letters, marks = "\u0120", "abcdefghijklmnopqrstuvwxyz", '"{}[]:,.0123456789\\-_()/<>='
    words = dict.fromkeys(alphabet)
    while len(words) < size:
        stem = "".join(dice.choices(letters, k=dice.randint(2, 9)))
        prefix = dice.choice([space, "", "", dice.choice(marks), stem[:1].upper()])
        words[prefix + stem if dice.random() < 0.85 else "".join(dice.choices(marks + space, k=dice.randint(2, 5)))] = (
            None
        )
    tokenizer = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return ModelTokens(folder, size + 1, (size,))


def follow(grammar: Grammar, tokens: ModelTokens, num_tokens: int) -> list[float]:
    """Return the seconds that each token of random texts took."""
    dice, clock = random.Random(1), MonotonicClock()
    taken: list[float] = []
    walk = grammar.open_walk(tokens.end_token_ids, ())
    await_answers([walk], _WAIT_S, clock)
    while len(taken) < num_tokens:
        if walk.is_over or walk.mask is None:
            walk.close()
            walk = grammar.open_walk(tokens.end_token_ids, ())
            await_answers([walk], _WAIT_S, clock)
        assert walk.mask is not None
        allowed = np.flatnonzero(np.unpackbits(walk.mask, count=tokens.vocab_size, bitorder="little"))
        allowed = allowed[~np.isin(allowed, tokens.end_token_ids)]
        token_id = min(dice.sample(allowed.tolist(), min(3, len(allowed))))  # the lowest ids are single bytes
        started = time.perf_counter()
        walk.advance(token_id)
        await_answers([walk], _WAIT_S, clock)
        taken.append(time.perf_counter() - started)
    walk.close()
    return taken


def milliseconds(work: Callable[[], object], repeats: int = 50) -> float:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return round(statistics.median(taken) * 1e3, 4)


async def measure(name: str, tokens: ModelTokens, num_tokens: int) -> None:
    """Print the lines of one vocabulary."""
    library = GrammarLibrary(GrammarConfig(compile_timeout_s=60.0, token_timeout_s=5.0), tokens, MonotonicClock())
    try:
        started = time.perf_counter()
        await library.get(Constraint(ConstraintKind.CHOICE, '["warm"]'))
        logits, mask = torch.zeros(1, tokens.vocab_size), np.zeros((tokens.vocab_size + 8) // 8, np.uint8)
        facts = {
            "start_s": round(time.perf_counter() - started, 2),
            "apply_ms": milliseconds(lambda: forbid(logits, {0: mask})),
            "plain_ms": milliseconds(lambda: logits.numpy().argmax(axis=1)),
        }
        print(json.dumps({"vocabulary": name, "tokens": tokens.vocab_size, **facts}), flush=True)
        for kind, constraint in _CONSTRAINTS.items():
            started = time.perf_counter()
            line: dict[str, object] = {"vocabulary": name, "constraint": kind}
            try:
                grammar = await library.get(constraint)
                line["ready_s"] = round(time.perf_counter() - started, 4)
                taken = sorted(await asyncio.to_thread(follow, grammar, tokens, num_tokens))
                line["token_ms"] = {
                    "p50": round(taken[len(taken) // 2] * 1e3, 3),
                    "p99": round(taken[len(taken) * 99 // 100] * 1e3, 3),
                    "max": round(taken[-1] * 1e3, 3),
                }
            except ServingError as error:
                line["refused"] = str(error)
            print(json.dumps(line), flush=True)
    finally:
        await library.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--vocabulary", type=int, default=150_000, help="tokens of the large one (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=200, help="to follow, per constraint (default: %(default)s)")
    given = parser.parse_args()
    asyncio.run(measure("tandem-tiny", ModelTokens(_TINY, 4096, (2,)), given.tokens))
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(measure("made up", large_vocabulary(Path(folder), given.vocabulary), given.tokens))


if __name__ == "__main__":
    main()
