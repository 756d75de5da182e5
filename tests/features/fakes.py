"""A ten-line language model, rows of tokens and hand-set dictionaries that follow the contracts."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from saelab.core.code import SparseCode
from saelab.core.errors import SiteError

SITE = "blocks.0.hook_resid_post"


class FakeModel:
    """x_t = E[token_t] at the site; logits from x_t + x_{t-1} / 2."""

    name = "fake"
    fingerprint = "f" * 8

    def __init__(self, d_vocab=11, d_in=6, seed=0, tokenizer=None, residual=True):
        generator = torch.Generator().manual_seed(seed)
        self.d_vocab, self.d_in, self.tokenizer = d_vocab, d_in, tokenizer
        self.embed = torch.randn(d_vocab, d_in, generator=generator)
        self.W_U = torch.randn(d_in, d_vocab, generator=generator)
        self.forwards = 0
        if residual:
            self.bridge = SimpleNamespace(W_U=self.W_U)

    def width(self, site):
        if site != SITE:
            raise SiteError(f"no site {site}")
        return self.d_in

    def read(self, tokens, sites):
        return dict.fromkeys(sites, self.embed[tokens])

    def logits(self, tokens, replace=None):
        self.forwards += 1
        x = self.embed[tokens]
        if replace:
            x = replace[SITE](x)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return (x + before / 2) @ self.W_U


@dataclass
class FakeRows:
    """Rows given as one tensor; token 0 is BOS and never kept, -1 in ``pad`` positions is not kept either."""

    tokens: torch.Tensor
    keep: torch.Tensor | None = None
    source: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(name="fake-text", fingerprint="t" * 8))

    def __post_init__(self):
        if self.keep is None:
            self.keep = self.tokens != 0

    def batches(self, rows_per_batch, start_row=0):
        for i in range(start_row, len(self.tokens), rows_per_batch):
            part = slice(i, i + rows_per_batch)
            yield SimpleNamespace(tokens=self.tokens[part], keep=self.keep[part])


def random_rows(n_rows=7, length=9, d_vocab=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, d_vocab, (n_rows, length), generator=generator)
    tokens[:, 0] = 0
    return FakeRows(tokens)


class Oracle:
    """A dictionary of given weights: code = relu(x W_enc + b_enc), x_hat = code W_dec + b_dec."""

    def __init__(self, W_enc, W_dec, b_enc=None, b_dec=None):
        self.W_enc, self.W_dec = W_enc, W_dec
        self.d_in, self.d_sae = W_enc.shape
        self.b_enc = torch.zeros(self.d_sae) if b_enc is None else b_enc
        self.b_dec = torch.zeros(self.d_in) if b_dec is None else b_dec

    def encode(self, x):
        return SparseCode.from_dense((x @ self.W_enc + self.b_enc).relu())

    def decode(self, code):
        return code.to_dense() @ self.W_dec + self.b_dec


def identity(d_in=6):
    """x = relu(x) - relu(-x): an exact dictionary of 2 d_in features."""
    eye = torch.eye(d_in)
    return Oracle(torch.cat([eye, -eye], 1), torch.cat([eye, -eye]))


def constant(value):
    """A dictionary that never fires and always says ``value``."""
    d_in = len(value)
    return Oracle(torch.zeros(d_in, 3), torch.zeros(3, d_in), b_enc=-torch.ones(3), b_dec=value)
