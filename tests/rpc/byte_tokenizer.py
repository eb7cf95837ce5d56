"""Tokenizers for tests, written as folders that transformers loads."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tether_services.runtime.text import ByteCodec


def write_byte_tokenizer(folder: Path) -> Path:
    """Write a tokenizer with the ids of the fake engines' ByteCodec, for the printable ASCII characters."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(code): 3 + code for code in range(32, 127)}
    vocabulary |= {f"<{token}>": token for token in range(ByteCodec.vocab_size) if token not in vocabulary.values()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder
