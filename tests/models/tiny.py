"""Model folders small enough to make in a test."""

from pathlib import Path

import torch

N_LAYERS, WIDTH, HEADS, VOCAB, CONTEXT = 3, 16, 2, 23, 12


def tiny_gpt2(folder: Path) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=N_LAYERS,
        n_embd=WIDTH,
        n_head=HEADS,
        vocab_size=VOCAB,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(GPT2LMHeadModel, config, folder)


def tiny_llama(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=N_LAYERS,
        hidden_size=WIDTH,
        intermediate_size=24,
        num_attention_heads=HEADS,
        num_key_value_heads=1,
        vocab_size=VOCAB,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _save(LlamaForCausalLM, config, folder)


def _save(model_class: type, config: object, folder: Path) -> Path:
    from saelab.models.loading import quiet

    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        model = model_class(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(folder)
    return folder


def tokenizer_for(folder: Path) -> None:
    """Add a one-letter-per-word fast tokenizer to a model folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<s>": 0} | {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuv", start=1)}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", unk_token="<s>").save_pretrained(folder)
