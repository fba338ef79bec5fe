"""A checkpoint folder without weights: a tokenizer in which every byte is one token, and a tiny config.json."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"
USER = "<user>"
ASSISTANT = "<assistant>"
SPECIAL_TOKENS = (END, USER, ASSISTANT)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' }}{{ message['content'] }}"
    "{% endfor %}<assistant>"
)
VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)
MAX_MODEL_LEN = 512


def write_checkpoint(folder: Path, *, chat: bool = True) -> Path:
    """Fill `folder` and return it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL_TOKENS))
    wrapper = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE if chat else None,
    )
    wrapper.save_pretrained(folder)
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_MODEL_LEN,
        "eos_token_id": core.token_to_id(END),
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
