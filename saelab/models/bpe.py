"""Training a fast byte-level BPE tokenizer, and wrapping it as a Hugging Face tokenizer."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"
"""The one special token: beginning of a row, end of a document, separator between documents. Its id is 0."""


def train_bpe(documents: Iterable[str], vocab_size: int, n_ctx: int) -> Any:
    """Train byte-level BPE (GPT-2's splitting rule) on ``documents`` and return a ``PreTrainedTokenizerFast``.

    All 256 bytes are in the vocabulary, so every text can be encoded and decoded back exactly.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return wrap_tokenizer(tokenizer, n_ctx)


def wrap_tokenizer(tokenizer: Any, n_ctx: int) -> Any:
    """Wrap a ``tokenizers.Tokenizer`` whose special token is :data:`END_OF_TEXT` for use with transformers."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=n_ctx,
        clean_up_tokenization_spaces=False,
    )


def load_bpe(folder: str | Path, n_ctx: int) -> Any:
    """Load the tokenizer that :func:`train_bpe` made from ``folder/tokenizer.json``."""
    from tokenizers import Tokenizer

    return wrap_tokenizer(Tokenizer.from_file(str(Path(folder) / "tokenizer.json")), n_ctx)
