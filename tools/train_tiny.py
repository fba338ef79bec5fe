"""Command line for tandem-tiny, the small model that this repository carries for its tests and demonstrations.

    python -m tools.train_tiny train      # corpus, tokenizer, training, evaluation, model card
    python -m tools.train_tiny evaluate   # held-out perplexity of a stored model
    python -m tools.train_tiny sample     # a few completions and answers

`--work-dir` (default build/tiny) keeps the corpus and the checkpoint from which an interrupted `train` goes on.
"""

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, cast

import torch
import typer
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from tools import tiny_card, tiny_corpus, tiny_evaluation, tiny_tokenizer, tiny_training
from tools.tiny_chat import BEGIN, END, PAD
from tools.tiny_corpus import Kind, Split
from tools.tiny_training import TOKENS_PER_STEP, Family, Recipe

PROSE_REPEATS = 2  # prose is the smaller and the more readable part: it is shown twice per epoch
HELP = "Train, measure and try tandem-tiny, the small model that this repository carries for tests and demonstrations."

app = typer.Typer(no_args_is_help=True, add_completion=False, help=HELP)
WorkDir = Annotated[Path, typer.Option(help="Corpus and checkpoints; may be deleted at any time.")]
ModelDir = Annotated[Path, typer.Option(help="Folder of the model, in the layout of transformers.")]
NumThreads = Annotated[int, typer.Option(help="Threads for torch.", min=1)]


@app.command()
def corpus(work_dir: WorkDir = Path("build/tiny")) -> None:
    """Extract the corpus from this interpreter's standard library and print its size (20 seconds)."""
    documents = tiny_corpus.build_corpus()
    tiny_corpus.save_corpus(documents, work_dir / "corpus.jsonl")
    for split in Split:
        for kind in Kind:
            sizes = [len(d.text) for d in documents if d.split is split and d.kind is kind]
            print(f"{split:9} {kind:6} {len(sizes):6} documents {sum(sizes):9} characters")
    print(f"digest {tiny_corpus.digest_of(documents)}, Python {platform.python_version()}")


@app.command()
def train(
    model_dir: ModelDir = Path("models/tiny"),
    work_dir: WorkDir = Path("build/tiny"),
    num_tokens: Annotated[int, typer.Option(help="Training tokens; 4,000 to 7,000 per second and core.")] = 15_000_000,
    peak_lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    family: Annotated[Family, typer.Option(help="Architecture; set --model-dir as well.")] = Family.LLAMA,
    num_threads: NumThreads = 1,
) -> None:
    """Train a model from nothing, or go on from the checkpoint (about 55 minutes on one core with AVX512-BF16)."""
    torch.set_num_threads(num_threads)
    recipe = Recipe(family=family, num_tokens=num_tokens, peak_lr=peak_lr)
    documents = tiny_corpus.load_corpus(work_dir / "corpus.jsonl")
    shown = [d for d in documents if d.split is Split.TRAIN]
    tokenizer = tiny_tokenizer.train_tokenizer(shown)
    shown += [d for d in shown if d.kind is Kind.PROSE] * (PROSE_REPEATS - 1)
    bos, eos, pad = (tokenizer.backend_tokenizer.token_to_id(token) for token in (BEGIN, END, PAD))
    model = tiny_training.new_model(family, len(tokenizer), bos, eos, pad, recipe.seed)
    stream = tiny_training.TokenStream(tiny_tokenizer.encode_documents(tokenizer, shown), recipe.seed)
    corpus_digest = tiny_corpus.digest_of(documents)
    checkpoint = work_dir / f"{family}-{tiny_corpus.stable_hash(f'{recipe} {corpus_digest}'):016x}.pt"
    progress = tiny_training.train(model, stream, recipe, checkpoint, save_every=250)

    model.bfloat16().eval()
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(model_dir)
    (model_dir / "model.safetensors").chmod(0o644)
    tiny_tokenizer.save_tokenizer(tokenizer, model_dir)
    record = {
        "recipe": asdict(recipe),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "num_steps": progress.step,
        "tokens_per_step": TOKENS_PER_STEP,
        "training_minutes": round(progress.training_s / 60, 1),
        "num_threads": num_threads,
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
        "corpus_digest": corpus_digest,
    }
    (model_dir / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    evaluate(model_dir, work_dir, num_threads, write_card=True)


@app.command()
def evaluate(
    model_dir: ModelDir = Path("models/tiny"),
    work_dir: WorkDir = Path("build/tiny"),
    num_threads: NumThreads = 1,
    write_card: Annotated[bool, typer.Option(help="Rewrite README.md with the numbers and fresh samples.")] = False,
) -> None:
    """Measure held-out perplexity of a stored model (one minute)."""
    torch.set_num_threads(num_threads)
    model, tokenizer = load(model_dir)
    documents = tiny_corpus.load_corpus(work_dir / "corpus.jsonl")
    scores = tiny_evaluation.evaluate(model, tokenizer, documents)
    for name, score in scores.items():
        print(
            f"{name:6} perplexity {score.perplexity:7.2f}  bits/byte {score.bits_per_byte:.3f}"
            f"  tokens {score.num_tokens}"
        )
    record = json.loads((model_dir / "training.json").read_text())
    if record["corpus_digest"] != tiny_corpus.digest_of(documents):
        print(f"note: trained on the corpus of Python {record['python_version']}, which is not this one")
    if write_card:
        samples = tiny_card.read_samples(model, tokenizer)
        (model_dir / "README.md").write_text(tiny_card.render_card(record, scores, samples))


@app.command()
def sample(
    model_dir: ModelDir = Path("models/tiny"),
    question: Annotated[str | None, typer.Option(help="One user message instead of the built-in samples.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 120,
) -> None:
    """Print greedy completions and answers (seconds)."""
    torch.set_num_threads(1)
    model, tokenizer = load(model_dir)
    if question is not None:
        print(tiny_evaluation.answer(model, tokenizer, question, max_new_tokens))
        return
    for prompt, text in tiny_card.read_samples(model, tokenizer):
        print(f">>> {prompt}\n{text}\n")


def load(model_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Returns the stored model, bfloat16 and in evaluation mode, and its tokenizer. Never goes to the network."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return cast(PreTrainedModel, model.eval()), cast(PreTrainedTokenizerFast, tokenizer)


if __name__ == "__main__":
    app()
