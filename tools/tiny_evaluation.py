"""What tandem-tiny is worth: held-out perplexity by kind of text, and sample output.

Owns the definition of the number in the model card: documents one at a time, each `<|begin|> text <|end|>`, cut into
windows of `WINDOW_TOKENS` with no context from the window before; every token but the first of a window is predicted.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools.tiny_corpus import Document, Kind, Split
from tools.tiny_tokenizer import encode_documents

WINDOW_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Score:
    """Summed loss over some text. `num_bytes` makes it comparable between tokenizers."""

    loss_nats: float = 0.0
    num_tokens: int = 0
    num_bytes: int = 0

    def __add__(self, other: "Score") -> "Score":
        return Score(
            self.loss_nats + other.loss_nats, self.num_tokens + other.num_tokens, self.num_bytes + other.num_bytes
        )

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_nats / self.num_tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.loss_nats / math.log(2) / self.num_bytes


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, ids: list[int], num_bytes: int = 0) -> Score:
    """Returns the score of one document's token ids under `model`, in the model's own dtype."""
    loss_nats, num_tokens = 0.0, 0
    for start in range(0, len(ids), WINDOW_TOKENS):
        window = torch.tensor([ids[start : start + WINDOW_TOKENS]])
        if window.shape[1] > 1:
            logits = model(window, use_cache=False).logits[0, :-1].float()
            loss_nats += torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
            num_tokens += window.shape[1] - 1
    return Score(loss_nats, num_tokens, num_bytes)


def evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> dict[str, Score]:
    """Returns the held-out scores: one per kind of text, and `all`."""
    held_out = [document for document in documents if document.split is Split.HELD_OUT]
    scores = {str(kind): Score() for kind in Kind}
    for document, ids in zip(held_out, encode_documents(tokenizer, held_out), strict=True):
        scores[document.kind] += score_tokens(model, ids.tolist(), len(document.text.encode()))
    return scores | {"all": sum(scores.values(), Score())}


@torch.inference_mode()
def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, max_new_tokens: int) -> str:
    """Returns the greedy continuation of a plain text."""
    return _generate(model, tokenizer, tokenizer(prompt)["input_ids"], max_new_tokens)


@torch.inference_mode()
def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, question: str, max_new_tokens: int) -> str:
    """Returns the greedy answer to one user message, through the chat template."""
    messages = [{"role": "user", "content": question}]
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return _generate(model, tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], max_new_tokens)


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int], max_new_tokens: int) -> str:
    prompt = torch.tensor([ids])
    generate: Any = model.generate
    output = generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False)
    return str(tokenizer.decode(output[0, len(ids) :]))
