"""A byte-level BPE tokenizer trained on the project's own text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tether.errors import InvalidArgumentError
from tether_services.recipes import base_model

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
"""Three distinct special tokens, ids 0, 1 and 2: the end of a text is never confused with padding."""


def train_tokenizer(
    documents: Iterable[str], *, vocab_size: int, max_length: int, lowercase: bool = False
) -> PreTrainedTokenizerFast:
    """Return a tokenizer that encodes any text and puts `<s>` in front, without loss unless `lowercase` is true.

    `split_special_tokens` is on and stored with the tokenizer: the characters `</s>` in a text are encoded as those
    characters, never as the end token.

    Args:
        documents: Texts to learn the merges from.
        vocab_size: Tokens in all, with 3 special ones and 256 bytes.
        max_length: Longest sequence of the model in tokens.
        lowercase: Turn texts into lower case and put a space in front: a word is the same tokens wherever it stands.

    Raises:
        InvalidArgumentError: The texts hold too few distinct pairs for that many tokens.
    """
    core = Tokenizer(models.BPE())
    if lowercase:
        core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=lowercase)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(documents, trainer)
    if core.get_vocab_size() != vocab_size:
        raise InvalidArgumentError(
            f"the text yields {core.get_vocab_size()} tokens, not {vocab_size}; give more text or a smaller number",
            field="vocab_size",
        )
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, core.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        padding_side="right",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(folder: Path, *, field: str) -> Any:
    """Return the tokenizer of a folder to pretrain with, which must tell padding from the end of a text.

    Raises:
        InvalidArgumentError: No tokenizer there, or its bos, eos and pad tokens are not three.
    """
    tokenizer = base_model.load_tokenizer(folder, field=field)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if None in ids or len(set(ids)) != len(ids):
        raise InvalidArgumentError(f"the tokenizer in {folder} needs distinct bos, eos and pad tokens", field=field)
    return tokenizer
