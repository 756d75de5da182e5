"""Reading what other libraries wrote, without executing any of it."""

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saelab.core.artifacts import output_error, read_json
from saelab.core.errors import CorruptError, FormatError, MissingFileError

PICKLES = (".pt", ".pth", ".bin", ".pkl", ".ckpt")
"""Suffixes of files that torch or pickle write."""


def load_pickle(path: Path) -> dict[str, Any]:
    """Load a torch pickle of tensors and plain values with ``weights_only=True``; anything more is refused.

    Raises :class:`MissingFileError`, :class:`FormatError` or :class:`CorruptError`.
    """
    if not path.is_file():
        raise MissingFileError(f"{path} does not exist")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle protocol; the error that follows says what matters
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\w+(?:\.\w+)+)", str(error))
        raise FormatError(
            f"{path} is not a pickle of tensors and plain values only{f' (it calls {code[1]})' if code else ''}; "
            "saelab does not execute it, save only its state_dict with the library that made it"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        reason = str(error).split(". ")[0].splitlines()[0]
        raise CorruptError(f"{path} is not a readable torch file ({reason}); copy or make it again") from None
    if not isinstance(data, dict):
        raise FormatError(f"{path} holds a {type(data).__name__}, expected a dictionary of tensors")
    return data


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold a mapping."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise FormatError(f"{path} must hold a mapping of settings, got a {type(data).__name__}")
    return data


class Weights:
    """Tensors of a file, taken by name and shape; a missing or misshapen one is one clear error."""

    def __init__(self, path: Path, tensors: Mapping[str, Any]) -> None:
        self.path, self.tensors = path, tensors

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def matrix(self, name: str, *, transposed: bool = False) -> Float[Tensor, "rows columns"]:
        """Return a matrix in float32."""
        tensor = self._tensor(name)
        if tensor.ndim != 2:
            raise FormatError(f"{self.path}: '{name}' has shape {tuple(tensor.shape)}, expected a matrix")
        return (tensor.T if transposed else tensor).float().contiguous()

    def vector(self, name: str, size: int) -> Float[Tensor, " size"]:
        """Return a vector in float32; one number is repeated."""
        tensor = self._tensor(name).float()
        if tensor.numel() == 1:
            tensor = tensor.reshape(1).expand(size)
        if tensor.shape != (size,):
            raise FormatError(f"{self.path}: '{name}' has shape {tuple(tensor.shape)}, expected ({size},)")
        return tensor.contiguous()

    def number(self, name: str) -> float:
        """Return the one number a tensor holds."""
        tensor = self._tensor(name)
        if tensor.numel() != 1:
            raise FormatError(f"{self.path}: '{name}' has shape {tuple(tensor.shape)}, expected one number")
        return float(tensor.item())

    def decoder(self, name: str, w_enc: Float[Tensor, "d_in d_sae"], *, transposed: bool) -> Float[Tensor, "d_sae d"]:
        """Return a decoder (d_sae, d_out), checked against the encoder; ``transposed`` says how the file has it."""
        w_dec = self.matrix(name, transposed=transposed)
        if w_dec.shape[0] != w_enc.shape[1]:
            raise FormatError(
                f"{self.path}: '{name}' is for {w_dec.shape[0]} features and the encoder for {w_enc.shape[1]}; "
                "is it a file of another format?"
            )
        return w_dec

    def _tensor(self, name: str) -> Tensor:
        tensor = self.tensors.get(name)
        if not isinstance(tensor, Tensor):
            raise FormatError(f"{self.path} has no tensor '{name}'; it holds {', '.join(sorted(self.tensors))}")
        return tensor


def make_folder(folder: Path) -> None:
    """Create a folder to export to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from error
