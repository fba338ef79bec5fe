"""The held-out prompts on which KV profiles of tandem-tiny are judged: models/tiny/validation_prompts.jsonl.

    python -m tools.tiny_prompts

Cut from the held-out split of the corpus (`tools.tiny_corpus`), so no prompt was seen in training. Stratified by
kind of text and by length; the order deals the strata in turn, so every prefix of a split is stratified too, which is
what successive halving needs. The two splits share no text: a profile is searched on one and accepted on the other.
Deterministic for a given Python release; rows are `{"split", "kind", "num_tokens", "text"}`.
"""

import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

import typer
from tokenizers import Tokenizer

from tools.tiny_chat import BEGIN, END, ROLE_MARKERS
from tools.tiny_corpus import Document, Kind, Split, load_corpus, stable_hash

PROMPTS_PER_SPLIT = 64
SPLITS = ("search", "acceptance")
LENGTHS = ((200, 400), (400, 800), (800, 1500))  # tokens, in turn with the kinds


def make_prompts(documents: list[Document], tokenizer: Tokenizer) -> Iterator[dict[str, str | int]]:
    """Yield the rows in the order of the file. Takes consecutive text of each kind, documents end to end."""
    streams = {kind: _tokens_of(kind, documents, tokenizer) for kind in Kind}
    used = dict.fromkeys(Kind, 0)
    strata = list(product(LENGTHS, Kind))
    for split in SPLITS:
        for at in range(PROMPTS_PER_SPLIT):
            (shortest, longest), kind = strata[at % len(strata)]
            length = shortest + stable_hash(f"{split} {at}") % (longest - shortest)
            ids = streams[kind][used[kind] : used[kind] + length]
            if len(ids) < length:
                raise SystemExit(f"the held-out {kind} text is used up after {at} prompts of {split}")
            used[kind] += length
            text = tokenizer.decode(ids, skip_special_tokens=False)
            if kind is Kind.CHAT:  # a served chat ends where the answer begins
                text = _until_an_answer(text)
            text = text.removeprefix(BEGIN)  # which encoding puts in front
            yield {"split": split, "kind": kind, "num_tokens": len(tokenizer.encode(text).ids), "text": text}


def _until_an_answer(text: str) -> str:
    """Pure. Cuts after the last marker of the assistant's turn; a text that has none is left as it is."""
    head, marker, _ = text.rpartition(ROLE_MARKERS["assistant"] + "\n")
    return head + marker if marker else text


def _tokens_of(kind: Kind, documents: list[Document], tokenizer: Tokenizer) -> list[int]:
    chosen = [document for document in documents if document.split is Split.HELD_OUT and document.kind is kind]
    chosen.sort(key=lambda document: stable_hash(document.source))  # neighbours in the library are on one subject
    return tokenizer.encode(
        "".join(f"{BEGIN}{d.text.removesuffix(END)}{END}" for d in chosen), add_special_tokens=False
    ).ids


def main(
    model_dir: Annotated[Path, typer.Option(help="Whose tokenizer; the file is written next to it.")] = Path(
        "models/tiny"
    ),
    work_dir: Annotated[Path, typer.Option(help="Where the corpus is, or is put.")] = Path("build/tiny"),
) -> None:
    """Write validation_prompts.jsonl (seconds, and 20 more where the corpus has to be extracted first)."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    rows = list(make_prompts(load_corpus(work_dir / "corpus.jsonl"), tokenizer))
    path = model_dir / "validation_prompts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts, {sum(int(row['num_tokens']) for row in rows):,} tokens: {path}")


if __name__ == "__main__":
    typer.run(main)
