"""The committed model: small enough to carry, shaped as the kernels need, and trained rather than random."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tools import tiny_evaluation, train_tiny

MODEL_DIR = Path(__file__).parents[2] / "models" / "tiny"

QUESTIONS = (
    "Hello!",
    "What does json.dumps do?",
    "What is asyncio?",
    "Tell me about os.path.exists.",
    "What does list.append do?",
)

# From the pydoc topic "execmodel", which `tools.tiny_corpus.split_of` holds out. CPython documentation, PSF License.
HELD_OUT_TEXT = """Naming and binding
==================

*Names* refer to objects.  Names are introduced by name binding
operations.

The "import" statement of the form "from ... import *" binds all names
defined in the imported module, except those beginning with an
underscore. This form may only be used at the module level.

If a name is bound in a block, it is a local variable of that block,
unless declared as "nonlocal" or "global".  If a name is bound at the
module level, it is a global variable.  (The variables of the module
code block are local and global.)  If a variable is used in a code
block but not defined there, it is a *free variable*.

A *scope* defines the visibility of a name within a block.  If a local
variable is defined in a block, its scope includes that block.  If the
definition occurs in a function block, the scope extends to any blocks
contained within the defining one, unless a contained block introduces
a different binding for the name.

When a name is not found at all, a "NameError" exception is raised. If
the current scope is a function scope, and the name refers to a local
variable that has not yet been bound to a value at the point where the
name is used, an "UnboundLocalError" exception is raised.
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    torch.set_num_threads(1)
    return train_tiny.load(MODEL_DIR)


def test_is_small_enough_to_be_committed() -> None:
    assert sum(path.stat().st_size for path in MODEL_DIR.rglob("*")) < 10_000_000


def test_shape_is_what_the_kernels_need() -> None:
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["head_dim"] == 64
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 2048


def test_weights_are_bfloat16_without_a_copy_of_the_tied_embedding() -> None:
    with safe_open(MODEL_DIR / "model.safetensors", framework="pt") as weights:
        names = list(weights.keys())
        assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names


def test_chat_template_renders_turns_and_a_place_for_the_answer(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast],
) -> None:
    _, tokenizer = loaded
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is {% x %}?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|begin|><|system|>\nBe brief.<|end|>\n<|user|>\nWhat is {% x %}?<|end|>\n<|assistant|>\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize("text", ["plain text", "  spaces\n\ttabs  ", "naïve café 你好 \N{ROCKET}", "x = 12345\n"])
def test_decoding_gives_back_every_text(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast], text: str) -> None:
    _, tokenizer = loaded
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_answers_are_text_and_most_end_by_themselves(loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast]) -> None:
    model, tokenizer = loaded
    answers = [tiny_evaluation.answer(model, tokenizer, question, max_new_tokens=120) for question in QUESTIONS]
    for text in answers:
        assert len(text.split()) > 3
        assert sum(c.isascii() and (c.isprintable() or c in "\n\t") for c in text) > 0.95 * len(text)
    assert sum(text.endswith("<|end|>") for text in answers) >= 3  # all five where it was trained; kernels differ


def test_predicts_held_out_text_far_better_than_chance(
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = loaded
    score = tiny_evaluation.score_tokens(model, tokenizer(HELD_OUT_TEXT)["input_ids"])
    assert score.num_tokens > 250
    assert score.perplexity < 60  # an untrained model has about 4,096
