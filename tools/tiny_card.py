"""The model card of tandem-tiny, rendered from a training record and measured scores so that it cannot drift."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools.tiny_evaluation import WINDOW_TOKENS, Score, answer, complete

QUESTIONS = ("What does json.dumps do?", "Explain threading.Lock.", "How do I use os.path.join?", "Who are you?")
PROMPTS = ("The list type in Python", "def read_lines(path):\n", "# asyncio\n\n")
MAX_SAMPLE_TOKENS = 120

CARD = """# tandem-tiny

A very small language model of the {family} architecture for tests, demonstrations and benchmarks of a serving
system: real weights, a real tokenizer and a chat template, in {num_parameters:,} parameters. It writes recognisable
English and Python in the manner of Python's documentation. It is not a source of facts.

## Architecture

| | |
|---|---|
| model type | `{family}`, loadable by transformers (`AutoModelForCausalLM`) |
| layers, hidden size, MLP size | 4, 256, 688 (SwiGLU) |
| query heads, KV heads, head_dim | 4, 2 (grouped-query attention), 64 |
| KV cache per token (bfloat16) | 4 x 2 x 2 x 64 x 2 bytes = 2 KiB |
| positions | rotary, theta 10,000, 2,048 at most |
| vocabulary | 4,096, byte-level BPE, input and output embeddings tied |
| stored as | bfloat16 safetensors |

Special tokens: `<|begin|>` (bos), `<|end|>` (eos, ends a turn as well as a document), `<|pad|>`, and the role markers
`<|system|>`, `<|user|>`, `<|assistant|>`. Encoding a plain text adds `<|begin|>`; a text rendered by the chat template
already has it, so encode that one with `add_special_tokens=False`.

## Data

Only what a Python installation carries (here CPython {python_version}): docstrings, signatures and top-level
definitions of the standard library, `pydoc` topics, and the docstrings of C modules; chat documents are made from the
same docstrings by question templates, plus a few greetings. Texts are de-duplicated by paragraph and by definition.
One source file or topic in twenty, chosen by a hash of its name, is held out together with all documents made from
it. Corpus digest `{corpus_digest}`; another Python release gives a slightly different corpus.

## Training

    python -m tools.train_tiny train --num-tokens {num_tokens} --peak-lr {peak_lr}

{num_steps:,} steps of {tokens_per_step:,} tokens ({total_tokens:,} tokens), {training_minutes} minutes,
{num_threads} thread(s) of a shared server CPU with AVX512-BF16. AdamW (0.9, 0.95), weight decay {weight_decay};
peak learning rate {peak_lr} after {warmup_steps} steps of warm-up, constant,
then linear to zero over the last {decay_percent:.0f}% of the run; bfloat16 autocast over float32 weights;
rows of 256, then 512, 1,024 and, for the last 5%, 2,048 tokens. torch {torch_version}.
`training.json` has the same as data. Equal bits on another CPU or torch version are not promised.

## Held-out perplexity

    python -m tools.train_tiny evaluate

| text | perplexity | bits per byte | tokens predicted |
|---|---|---|---|
{score_rows}

Stored bfloat16 weights, windows of {window_tokens:,} tokens without context from the window before. An untrained model
has a perplexity of about 4,096.

## Samples

Greedy, at most {max_sample_tokens} new tokens, exactly as the model gave them. `<|end|>` shows where it stopped by
itself.

{samples}

## Limits

Most statements are wrong. Greedy decoding may repeat itself until the token limit. English and Python only. Rows
longer than 1,024 tokens were only the last 5% of training. No safety training of any kind: do not put it before users.

## Licence

The training text is part of CPython and its documentation, copyright Python Software Foundation, PSF License
Agreement version 2; some standard-library files carry further notices of their authors. The model memorises passages
of that text. The weights are distributed under the licence of this repository, subject to those terms.

## Validation prompts

    python -m tools.tiny_prompts

`validation_prompts.jsonl`: 128 prompts of about 140 to 1,500 tokens, cut from the held-out split above (so under the
same licence), on which KV profiles are judged. 64 are for the search, 64 others for acceptance; each half is dealt in
turn from nine strata (prose, code, chat; short, medium, long). `kv_profiles.yaml` is the library that
`tandem profile search models/tiny` found.
"""


def read_samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    """Returns (prompt, greedy output) pairs: chat questions first, then plain completions."""
    answers = [(question, answer(model, tokenizer, question, MAX_SAMPLE_TOKENS)) for question in QUESTIONS]
    return answers + [(prompt, complete(model, tokenizer, prompt, MAX_SAMPLE_TOKENS)) for prompt in PROMPTS]


def render_card(record: Mapping[str, Any], scores: Mapping[str, Score], samples: list[tuple[str, str]]) -> str:
    """Pure. Returns README.md for a model trained as `record` (training.json) says."""
    rows = [f"| {n} | {s.perplexity:.2f} | {s.bits_per_byte:.3f} | {s.num_tokens:,} |" for n, s in scores.items()]
    shown = [
        f"{'User' if prompt in QUESTIONS else 'Text'}: `{prompt.strip()}`\n\n````text\n{text.strip()}\n````"
        for prompt, text in samples
    ]
    values = dict(record) | dict(record["recipe"])
    return CARD.format(
        **values,
        total_tokens=record["num_steps"] * record["tokens_per_step"],
        decay_percent=100 * record["recipe"]["decay_ratio"],
        window_tokens=WINDOW_TOKENS,
        max_sample_tokens=MAX_SAMPLE_TOKENS,
        score_rows="\n".join(rows),
        samples="\n\n".join(shown),
    )
