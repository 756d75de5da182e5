"""Oracle dictionaries over planted features: half absent, shrunk, in superposition, with introduced error."""

import torch

from saelab.analysis.dark_matter.tokens import tokens_of_arrays
from saelab.core.code import SparseCode
from tests.features.fakes import Oracle
from tests.sae.synthetic import ortho, superpos

SITE = "site"


class OracleCodes:
    """A dictionary that knows the true codes of x by its first features; ``noise`` is added to what it says."""

    def __init__(self, x, features, codes, noise=None):
        self.table, self.noise = {}, noise
        self.W_dec = features.float()
        self.d_sae, self.d_in = features.shape
        self.W_enc = self.W_dec.T
        self.x, self.codes = x, codes.float()
        self.inputs = {row.numpy().tobytes(): k for k, row in enumerate(x)}
        self.last = None

    def encode(self, x):
        self.last = torch.tensor([self.inputs[row.numpy().tobytes()] for row in x], dtype=torch.int64)
        return SparseCode.from_dense(self.codes[self.last])

    def decode(self, code):
        x_hat = code.to_dense() @ self.W_dec
        if self.noise is not None and self.last is not None and code.n_tokens == len(self.last):
            x_hat = x_hat + self.noise[self.last]
        return x_hat


def contexts(n, length=50):
    return torch.arange(n) // length


def half_absent(magnitudes, tokens=20_000, introduced=0.0, seed=0):
    """128 orthonormal features of which the dictionary has 64; noise of ``introduced`` times the absent part's norm."""
    planted = ortho(tokens, magnitudes=magnitudes, seed=seed)
    x = planted.x.float()
    absent = planted.codes[:, 64:] @ planted.features[64:]
    scale = introduced * float(absent.square().sum(1).mean().sqrt()) / 128**0.5
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1)) * scale if introduced else None
    sae = OracleCodes(x, planted.features[:64], planted.codes[:, :64], noise)
    centred = absent - absent.mean(0)
    theory = float(centred.square().sum()) / (float(centred.square().sum()) + scale**2 * x.numel())
    return x, sae, theory


def superposition(tokens=20_000, learned=192):
    planted = superpos(tokens)
    x = planted.x.float()
    return x, OracleCodes(x, planted.features[:learned], planted.codes[:, :learned])


def data(x, **options):
    return tokens_of_arrays({SITE: x}, contexts(len(x)), **options)


def scaled(factor, d=16):
    """x_hat = factor x, by 2 d features."""
    eye = torch.eye(d)
    return Oracle(torch.cat([eye, -eye], 1), factor * torch.cat([eye, -eye]))
