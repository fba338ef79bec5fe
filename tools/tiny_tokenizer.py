"""The tokenizer of tandem-tiny: byte-level BPE with 4,096 entries, learned from the training part of the corpus.

Byte-level: every byte string has a spelling, so no input is unknown, and one character may take several tokens (which
is what a streaming detokenizer must cope with). Encoding a plain text adds the begin marker; a rendered chat has it.
"""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools.tiny_chat import BEGIN, CHAT_TEMPLATE, END, PAD, ROLE_MARKERS, SPECIAL_TOKENS
from tools.tiny_corpus import Document, Kind

VOCAB_SIZE = 4096
MAX_LENGTH_TOKENS = 2048


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Learns the merges from `documents` and wraps the result for transformers. Takes seconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for d in documents if d.kind is not Kind.CHAT), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLE_MARKERS.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json, in the form that transformers 4 and other servers read too."""
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # transformers 5 writes a name that only it knows
    path.write_text(json.dumps(config, indent=2) + "\n")


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> list[NDArray[np.uint16]]:
    """Returns one array of token ids per document, each `<|begin|> text <|end|>`."""
    end = tokenizer.backend_tokenizer.token_to_id(END)
    rows = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch([d.text for d in documents])]
    return [np.array(row if row[-1] == end else [*row, end], dtype=np.uint16) for row in rows]
