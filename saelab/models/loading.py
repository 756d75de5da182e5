"""From a name to a plain Hugging Face model, its tokenizer and a fingerprint of its weights, quietly."""

import contextlib
import io
import json
import logging
import os
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from saelab.core.assets import EMBEDDED_MODEL, embedded_model_dir
from saelab.core.errors import FormatError, ModelError, nearest

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tekken.json")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_HASH_WHOLE = 1 << 30


@dataclass(frozen=True)
class Loaded:
    """A model as Hugging Face gives it."""

    plain: nn.Module
    """The causal LM, in eval mode, without gradients."""
    source: str
    """What ``from_pretrained`` was given: a folder or a hub id."""
    folder: Path | None
    """The folder of its files (the hub cache's, for a hub id)."""
    fingerprint: str


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars, log lines, prints and warnings of third-party loaders."""
    from transformers.utils import logging as hf_logging

    bars = hf_logging.is_progress_bar_enabled()
    verbosity = hf_logging.get_verbosity()
    disabled = logging.root.manager.disable
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_plain(name: str, dtype: str, device: str, revision: str | None) -> Loaded:
    """Load ``embedded``, a local folder or a hub id; every way to fail is one line (:class:`ModelError`)."""
    if dtype not in DTYPES:
        raise ModelError(f"unknown model dtype '{dtype}'{nearest(dtype, DTYPES)} (known: {', '.join(DTYPES)})")
    folder = _local_folder(name)
    source = str(folder) if folder else name
    from transformers import AutoModelForCausalLM

    try:
        with quiet():
            plain = AutoModelForCausalLM.from_pretrained(
                source, dtype=DTYPES[dtype], revision=revision, use_safetensors=True, trust_remote_code=False
            )
            plain = plain.to(device)
    except Exception as error:  # transformers and safetensors raise many kinds for a bad name or a bad file
        raise _load_error(name, folder, error) from error
    plain = cast(nn.Module, plain).eval().requires_grad_(False)
    if DTYPES[dtype] == torch.float32:
        _fuse_gelu(plain)
    files = folder or _hub_folder(name, cast(Any, plain).config)
    return Loaded(plain, source, files, fingerprint(files, cast(Any, plain).config))


def load_tokenizer(loaded: Loaded, revision: str | None) -> Any:
    """Load the model's own fast tokenizer, unchanged; :class:`ModelError` when there is none."""
    where = loaded.folder or loaded.source
    if loaded.folder is not None and not any((loaded.folder / file).is_file() for file in _TOKENIZER_FILES):
        raise ModelError(
            f"{where} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:4])}); add the tokenizer's files to "
            "the folder, or give token ids instead of text"
        )
    from transformers import AutoTokenizer

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(loaded.source, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizer back ends raise anything on a broken file
        raise ModelError(f"cannot read the tokenizer of {where}: {_first_line(error)}") from error


def boot_bridge(loaded: Loaded, tokenizer: Any, dtype: str) -> tuple[Any, dict[int, str]]:
    """Build a ``TransformerBridge`` that shares the plain model's weights.

    The bridge rebuilds the module tree it is given, so it gets a copy of the tree whose parameters and buffers are
    the plain model's own. Returns the bridge, and the plain path of each module of that copy by ``id``.
    """
    import copy

    with quiet():
        from transformer_lens.model_bridge import TransformerBridge

        shared = {id(t): t for t in (*loaded.plain.parameters(), *loaded.plain.buffers())}
        twin = copy.deepcopy(loaded.plain, shared)
        paths = {id(module): path for path, module in twin.named_modules() if path}
        try:
            bridge = TransformerBridge.boot_transformers(
                loaded.source,
                hf_model=twin,
                tokenizer=copy.deepcopy(tokenizer) if tokenizer is not None else _placeholder_tokenizer(),
                dtype=DTYPES[dtype],
                device=str(next(loaded.plain.parameters()).device),
            )
        except Exception as error:  # an architecture that TransformerLens does not know fails in many ways
            raise ModelError(
                f"TransformerLens cannot wrap {loaded.source}: {_first_line(error)}; choose a model whose "
                "architecture it supports"
            ) from error
    for parameter in nn.Module.parameters(bridge):  # the bridge splits joint projections into parameters of its own
        parameter.requires_grad_(False)
    return bridge.eval(), paths


def fingerprint(folder: Path | None, config: Any) -> str:
    """Identify a model by its config and the content of its safetensors files, wherever the folder lies.

    CRC-32 of each file (of its length and 64 pieces of 1 MiB spread over it, above 1 GiB). Without a folder: the
    commit that the hub gave.
    """
    if folder is None or not (folder / "config.json").is_file():
        return f"commit:{getattr(config, '_commit_hash', None) or 'unknown'}"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key in _VOLATILE_CONFIG:
        settings.pop(key, None)
    value = zlib.crc32(json.dumps(settings, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        value = zlib.crc32(path.name.encode(), value)
        if path.name.startswith("model"):
            value = _file_crc(path, value)
    return f"crc32:{value:08x}"


def _fuse_gelu(model: nn.Module) -> None:
    """Let torch compute GPT-2's ``gelu_new`` in one kernel instead of eight: the same function but for rounding.

    On a CPU it takes a third of the time. In 16 bits the roundings between the eight would be missed, so it is left
    alone there.
    """
    from transformers.activations import NewGELUActivation

    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is NewGELUActivation:
                setattr(module, name, nn.GELU(approximate="tanh"))


def _file_crc(path: Path, value: int) -> int:
    size = path.stat().st_size
    with open(path, "rb") as file:
        if size <= _HASH_WHOLE:
            while piece := file.read(1 << 22):
                value = zlib.crc32(piece, value)
            return value
        value = zlib.crc32(str(size).encode(), value)
        for i in range(64):
            file.seek(i * (size - (1 << 20)) // 63)
            value = zlib.crc32(file.read(1 << 20), value)
    return value


def _local_folder(name: str) -> Path | None:
    """Return the folder that ``name`` means, or None for a hub id; refuse folders that hold no safetensors model."""
    folder = embedded_model_dir() if name == EMBEDDED_MODEL else Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise ModelError(f"{folder} is a file, expected a model folder, a hub id or '{EMBEDDED_MODEL}'")
        looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or os.sep * 2 in name
        if looks_like_path:
            raise ModelError(f"model folder {folder} does not exist; give a folder, a hub id or '{EMBEDDED_MODEL}'")
        return None
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; expected a Hugging Face model folder")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise FormatError(
                f"{folder / pickles[0]} is a pickle, expected model.safetensors; saelab does not execute pickles, "
                "convert it first (model.save_pretrained writes safetensors)"
            )
        raise ModelError(f"{folder} has a config.json but no model.safetensors; copy the weights there")
    return folder


def _hub_folder(name: str, config: Any) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    commit = getattr(config, "_commit_hash", None)
    found = try_to_load_from_cache(name, "config.json", revision=commit) if commit else None
    return Path(found).parent if isinstance(found, str) else None


def _load_error(name: str, folder: Path | None, error: Exception) -> ModelError | FormatError:
    text = _first_line(error)
    if folder is not None:
        return ModelError(f"cannot load the model in {folder}: {text}")
    if "safetensors" in str(error) and "does not appear" in str(error):
        return FormatError(f"{name} on the hub has no safetensors weights; saelab does not execute pickles")
    offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
    return ModelError(
        f"unknown model '{name}': it is no local folder, not '{EMBEDDED_MODEL}', and not available from the Hugging "
        f"Face hub or its cache{offline}: {text}"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _placeholder_tokenizer() -> Any:
    """A one-word tokenizer for the bridge of a model that has none: the bridge insists, saelab never uses it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    names = dict.fromkeys(("unk_token", "eos_token", "pad_token"), "<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)
