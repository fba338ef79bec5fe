"""The training of tandem-tiny: families of small models, packed batches, the loss, the schedule, the loop.

Everything is a function of (corpus, `Recipe`, step), so a run that was stopped goes on from its last checkpoint as if
nothing had happened. Knows nothing of where the final model goes: `train` returns it.

The order of one run: `TokenStream` lays the documents of an epoch end to end in a shuffled order; step s takes the
next `TOKENS_PER_STEP` of them as rows of the stage's length (short rows first: attention is the larger half of the
cost on a CPU); the learning rate warms up, stays, and falls to zero over the last part of the run.
"""

import math
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

TOKENS_PER_STEP = 4096
STAGES = ((0.40, 256), (0.75, 512), (0.95, 1024), (1.00, 2048))  # until this part of the run, this row length
LOSS_CHUNK_TOKENS = 512  # 512 rows of float32 logits stay within the second-level cache


class Family(StrEnum):
    """The architectures that the recipe can train; the values are transformers' model types."""

    LLAMA = "llama"
    QWEN2 = "qwen2"
    MISTRAL = "mistral"
    QWEN3 = "qwen3"


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that decides a run besides the corpus."""

    family: Family = Family.LLAMA
    num_tokens: int = 15_000_000
    peak_lr: float = 2e-3
    warmup_steps: int = 100
    decay_ratio: float = 0.3  # the last part of the run, over which the learning rate falls to zero
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0

    @property
    def num_steps(self) -> int:
        return max(1, self.num_tokens // TOKENS_PER_STEP)


@dataclass(slots=True)
class Progress:
    """How far a run has come; saved with every checkpoint."""

    step: int = 0
    training_s: float = 0.0
    loss: float = math.nan


class TokenStream:
    """The training tokens of each epoch as rows of a chosen length. Deterministic; holds one epoch in memory."""

    def __init__(self, documents: list[NDArray[np.uint16]], seed: int) -> None:
        self._documents = documents
        self._seed = seed
        self._steps_per_epoch = sum(map(len, documents)) // TOKENS_PER_STEP
        self._epoch = lru_cache(maxsize=1)(self._read_epoch)

    def batch(self, step: int, row_tokens: int) -> Tensor:
        """Returns the rows of one step, int64, shape [TOKENS_PER_STEP / row_tokens, row_tokens]."""
        epoch, step_in_epoch = divmod(step, self._steps_per_epoch)
        rows = self._epoch(epoch).reshape(-1, row_tokens)
        order = np.random.default_rng([self._seed, epoch, row_tokens]).permutation(len(rows))
        num_rows = TOKENS_PER_STEP // row_tokens
        chosen = rows[order[step_in_epoch * num_rows : (step_in_epoch + 1) * num_rows]]
        return torch.from_numpy(chosen.astype(np.int64))

    def _read_epoch(self, epoch: int) -> NDArray[np.uint16]:
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._documents))
        tokens = np.concatenate([self._documents[i] for i in order])
        return tokens[: self._steps_per_epoch * TOKENS_PER_STEP]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean next-token loss, computed with its gradient in one pass over chunks of rows.

    The full [T, vocabulary] logits in float32 never exist: their page faults cost a fifth of the step.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """hidden [T, E] bfloat16, weight [V, E] float32, targets [T] int64. Returns a float32 scalar."""
        cast_weight = weight.to(hidden.dtype)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.zeros_like(weight)
        total = torch.zeros(())
        for start in range(0, len(hidden), LOSS_CHUNK_TOKENS):
            rows, wanted = hidden[start : start + LOSS_CHUNK_TOKENS], targets[start : start + LOSS_CHUNK_TOKENS, None]
            probabilities = torch.softmax((rows @ cast_weight.T).float(), dim=-1)
            total -= probabilities.gather(1, wanted).clamp_min(1e-30).log().sum()
            probabilities.scatter_add_(1, wanted, torch.full(wanted.shape, -1.0))
            logits_grad = probabilities.div_(len(hidden)).to(hidden.dtype)
            torch.mm(logits_grad, cast_weight, out=hidden_grad[start : start + LOSS_CHUNK_TOKENS])
            weight_grad += logits_grad.T @ rows
        ctx.save_for_backward(hidden_grad, weight_grad)
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grads[0].to(hidden_grad.dtype), weight_grad * grads[0], None


def new_model(family: Family, vocab_size: int, bos_id: int, eos_id: int, pad_id: int, seed: int) -> PreTrainedModel:
    """Returns an untrained float32 model: 4 layers, hidden size 256, 4 query and 2 KV heads of 64, 4M parameters."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=bos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
        **({"sliding_window": None} if family is Family.MISTRAL else {}),
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return cast(PreTrainedModel, model)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Pure. Warm-up, stable, then linear decay to zero (the WSD schedule: MiniCPM, Hu et al. 2024, section 4)."""
    warmup = min(1.0, (step + 1) / recipe.warmup_steps)
    decay = min(1.0, (recipe.num_steps - step) / (recipe.decay_ratio * recipe.num_steps))
    return recipe.peak_lr * warmup * decay


def row_tokens_at(recipe: Recipe, step: int) -> int:
    """Pure. The row length of the stage that `step` belongs to."""
    return next(length for until, length in STAGES if step < until * recipe.num_steps or until == 1.0)


def new_optimizer(model: PreTrainedModel, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95))


def loss_of(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Returns the mean next-token loss of `tokens` [rows, row_tokens]; a row's first token is never predicted."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        body = model.get_decoder()
        hidden = body(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    head: torch.nn.Linear = model.get_output_embeddings()
    flat = hidden.flatten(0, 1).to(torch.bfloat16)
    loss = ChunkedCrossEntropy.apply(flat, head.weight, tokens[:, 1:].flatten())  # type: ignore[no-untyped-call]
    return cast(Tensor, loss)


def train(model: PreTrainedModel, stream: TokenStream, recipe: Recipe, checkpoint: Path, save_every: int) -> Progress:
    """Trains `model` in place until the recipe's last step, resuming from `checkpoint` if that file exists.

    Args:
        checkpoint: Written every `save_every` steps: weights, optimizer state, progress. Not meant to be kept.

    Returns:
        The progress at the end, with the training time of all its sessions together.
    """
    optimizer, progress = new_optimizer(model, recipe), Progress()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    model.train()
    started_s = time.perf_counter() - progress.training_s
    for step in range(progress.step, recipe.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        loss = loss_of(model, stream.batch(step, row_tokens_at(recipe, step)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        mean_loss = loss.item() if step == 0 else 0.98 * progress.loss + 0.02 * loss.item()
        progress = Progress(step + 1, time.perf_counter() - started_s, mean_loss)
        if progress.step % 50 == 0:
            speed = (step + 1) * TOKENS_PER_STEP / progress.training_s
            print(f"step {step + 1}/{recipe.num_steps} loss {mean_loss:.3f} {speed:.0f} tokens/s", flush=True)
        if progress.step % save_every == 0 or progress.step == recipe.num_steps:
            _save(checkpoint, model, optimizer, progress)
    return progress


def _save(path: Path, model: PreTrainedModel, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Writes beside the old checkpoint and renames, so that a stop in the middle leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": asdict(progress)}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
