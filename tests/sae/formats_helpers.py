"""Random tensors, and activations written down independently of the library."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, M, K, N = 6, 20, 4, 64


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Return weights with decoder rows of different norms, a batch, and a threshold."""
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(N, D, generator=g) * 2 + 0.5,
        "W_enc": torch.randn(D, M, generator=g),
        "b_enc": torch.randn(M, generator=g) * 0.3,
        "W_dec": torch.randn(M, D, generator=g) * torch.rand(M, 1, generator=g).add(0.5),
        "b_dec": torch.randn(D, generator=g) * 0.5,
        "threshold": torch.rand(M, generator=g) * 0.8 + 0.1,
        "b_mag": torch.randn(M, generator=g) * 0.3,
        "r_mag": torch.randn(M, generator=g) * 0.3,
    }


def topk(z: Tensor, k: int) -> Tensor:
    """Keep what is at least the k-th largest of each row, then ReLU."""
    return z.relu() * (z >= z.sort(dim=1, descending=True).values[:, k - 1 : k])


def folder(path: Path, files: dict[str, Any]) -> Path:
    """Write a folder: mappings of tensors as safetensors or pickles, by suffix, everything else as JSON."""
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".json":
            file.write_text(json.dumps(content))
        elif file.suffix == ".pt":
            torch.save(content, file)
        else:
            save_file({key: value.contiguous().clone() for key, value in content.items()}, file)
    return path


def close(actual: tuple[Tensor, Tensor], acts: Tensor, recon: Tensor) -> None:
    """Require equality to float error, and that the comparison says something."""
    assert acts.count_nonzero() > 0
    assert (acts == 0).any()
    torch.testing.assert_close(actual[0], acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual[1], recon, rtol=1e-5, atol=1e-5)
