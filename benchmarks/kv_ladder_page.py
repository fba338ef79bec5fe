"""docs/kv_profiles.md, rendered from the rows of `benchmarks.kv_ladder` so that it cannot drift from them. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_PAGE = """# KV profiles, measured

A profile is a codec pipeline with its measurements on one model. `tandem profile search MODEL` finds them and writes
`kv_profiles.yaml` next to the checkpoint; `tandem profile show` prints a library, `tandem profile validate` measures
it again. A library is refused for other weights and other codec versions.

This page is written by `python -m benchmarks.kv_ladder --page docs/kv_profiles.md` (with `--model` for each model).

How to read it:

- **ratio**: raw bfloat16 bytes over all bytes on the wire: codes, scales, means, parameters and frame headers, for the
  acceptance prompts at their own lengths (140 to 1,500 tokens), in frames as the engine hands them over (512 tokens).
- **agreement**: the prompt's KV is replaced by what arrives, the model's own greedy continuation (64 tokens at most) is
  teacher-forced, and the most likely next token is compared at every position. {num_prompts} held-out prompts that the
  search has not seen, {num_positions} positions on the first model. **KL** is the divergence of the next-token
  distributions there (reference || injected), nats.
- Intervals are 95 %, by a bootstrap over prompts; agreement's are never narrower than Wilson's over all positions. The
  arithmetic is the serving engine's own in bfloat16, in which near ties flip whatever is done: noise of two
  thousandths of K and V costs half a percent of agreement already.
- Baselines have **equal bytes**: levels are chosen so that their ratio is the rung's; headers are not counted against
  them, and CacheGen's coder is counted at its ideal entropy. "-": cannot be that small. A baseline's number is **bold**
  where it is better than the rung's beyond doubt (the interval of the paired difference excludes zero).
- Rungs of 2 GB/s and more have no entropy coder. Where one of them is behind CacheGen-like, that is why: the ideal
  entropy that is counted there is what such a rung gives up for its speed.
- Agreement has no zero: with KV that is destroyed, small models that repeat themselves still agree at about 0.7 of the
  positions, since the continuation itself is context. KL tells the same rungs apart more sharply.
- A library's rungs are the best of some thirty finalists on these prompts, so its bounds are a little lucky; another
  draw of prompts may give a rung a few thousandths less.
- GB/s are raw bytes per second and core, encode / decode, on `{machine}`; the machine was shared.

{tables}
{families}
![the front of tandem-tiny](kv_pareto_tiny.png)
"""

_FAMILIES = """## The other families

Trained by the same tool from the same corpus, not shipped (8 MB each, {num_models} of them):

    python -m tools.train_tiny train --family qwen2 --num-tokens 5000000 --peak-lr 0.001 --model-dir build/qwen2
    python -m tools.train_tiny train --family qwen3 --num-tokens 5000000 --model-dir build/qwen3
    tandem profile search build/qwen2 --prompts models/tiny/validation_prompts.jsonl
    tandem profile search build/qwen3 --prompts models/tiny/validation_prompts.jsonl
"""


def page_of(rows: Sequence[Row]) -> str:
    """Return the page."""
    names = list(dict.fromkeys((str(row["model"]), str(row["family"])) for row in rows))
    tables = "\n".join(_table(name, family, [r for r in rows if r["model"] == name]) for name, family in names)
    first = next((row for row in rows if not row["is_lossless"]), rows[0])
    return _PAGE.format(
        num_prompts=first["num_prompts"],
        num_positions=f"{first['num_positions']:,}",
        machine=first["machine"],
        tables=tables,
        families=_FAMILIES.format(num_models=len(names) - 1) if len(names) > 1 else "",
    )


def _table(name: str, family: str, rows: Sequence[Row]) -> str:
    baselines = list(dict.fromkeys(key for row in rows for key in row["baselines"]))
    lines = [
        f"## {name} ({family})",
        "",
        "| rung | ratio | agreement | KL | GB/s | " + " | ".join(f"{key}: agreement, KL" for key in baselines) + " |",
        "|---" * (5 + len(baselines)) + "|",
    ]
    for row in rows:
        cells = [str(row["rung"]), f"{row['ratio']:.2f}"]
        cells += ["exact", "0"] if row["is_lossless"] else [_interval(row, "agreement"), _interval(row, "kl")]
        cells.append(f"{row['encode_gb_s']:.2f} / {row['decode_gb_s']:.2f}")
        cells += [_baseline(row["baselines"].get(key, "")) for key in baselines]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _interval(row: Row, key: str) -> str:
    digits = 4 if key == "agreement" else 5
    return f"{row[key]:.{digits}f} ({row[key + '_low']:.{digits}f} - {row[key + '_high']:.{digits}f})"


def _baseline(row: Row | str | None) -> str:
    if row is None:
        return "-"
    if isinstance(row, str):
        return row
    agreement, divergence = f"{row['agreement']:.4f}", f"{row['kl']:.5f}"
    if row["difference"]["agreement"][1] < 0:
        agreement = f"**{agreement}**"
    if row["difference"]["kl"][0] > 0:
        divergence = f"**{divergence}**"
    return f"{agreement}, {divergence}"
