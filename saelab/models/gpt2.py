"""A small GPT-2: built from a config, its gradient, and its Hugging Face folder."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from saelab.core.artifacts import read_safetensors, write_json, write_safetensors
from saelab.core.errors import ConfigError
from saelab.models.pretrain_config import PretrainConfig


def build_gpt2(config: PretrainConfig, bos: int) -> Any:
    """Build an untrained GPT-2 (tied embeddings, no dropout), its weights drawn from ``config.seed``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    # transformers draws initial weights from the global generator; forking leaves the caller's state as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.context,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                # The same function as GPT-2's gelu_new, in one kernel instead of eight.
                activation_function="gelu_pytorch_tanh",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=bos,
                eos_token_id=bos,
            )
        )


def load_start(model: Any, folder: Path) -> None:
    """Give a GPT-2 the weights of a model folder. Raises :class:`ConfigError` when it has other sizes."""
    weights = read_safetensors(folder / "model.safetensors")
    own = model.state_dict()
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            there = tuple(own[name].shape) if name in own else "no such weight"
            raise ConfigError(
                f"start: {folder} has {name} {tuple(value.shape)}, the config makes {there}; give n_layers, d_model, "
                "n_heads, context and vocab_size as in that model's config.json"
            )
    model.load_state_dict({name: value.to(own[name].dtype) for name, value in weights.items()}, strict=False)


def backward(
    model: Any,
    inputs: Int[Tensor, "rows context"],
    targets: Int[Tensor, "rows context"],
    *,
    tokens: int,
    precision: str,
    piece: int = 512,
) -> float:
    """Add the gradient of the mean loss over ``tokens`` tokens, of which these rows are a part; return their share.

    Logits are made and consumed for ``piece`` tokens at a time: all at once they would be the largest tensor by far,
    and fresh memory for them costs as much as the products.
    """
    half = precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    states, wanted = leaf.flatten(0, 1), targets.flatten()
    for first in range(0, len(wanted), piece):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model.lm_head(states[first : first + piece])
        loss = F.cross_entropy(logits.float(), wanted[first : first + piece], reduction="sum") / tokens
        torch.autograd.backward([loss])
        total += loss.item()
    torch.autograd.backward([hidden], [leaf.grad])
    return total


def write_model(model: Any, tokenizer: Any, config: PretrainConfig, out: Path) -> None:
    """Write the Hugging Face folder: config.json, model.safetensors in ``save_dtype``, tokenizer files."""
    dtype = getattr(torch, config.save_dtype)
    # The output matrix is the embedding; transformers ties them again on loading.
    weights = {name: value.to(dtype) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    write_safetensors(out / "model.safetensors", weights, {"format": "pt"})
    written = model.config.to_dict() | {
        "architectures": ["GPT2LMHeadModel"],
        "dtype": "float32",
    }
    write_json(out / "config.json", written)
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "model_max_length": config.context,
            "clean_up_tokenization_spaces": False,
        },
    )


def adamw(model: Any, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW as ``config`` says: matrices decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
