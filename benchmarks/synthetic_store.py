"""A feature store of any size from random codes, for benchmarks/app.py. It says nothing and costs no model."""

import time
from types import SimpleNamespace

import numpy as np
import torch

from saelab.core.code import SparseCode
from saelab.sae import TopKConfig, TopKSAE, save_sae

SITE = "blocks.0.hook_resid_post"


class Tokenizer:
    """Words ``w0``, ``w1`` ..."""

    all_special_ids = (0,)
    bos_token_id = eos_token_id = 0
    backend_tokenizer = SimpleNamespace(decoder="ByteLevel", pre_tokenizer="")

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def convert_ids_to_tokens(self, i):
        """Return the token as it stands in a byte-level vocabulary."""
        return f"Ġw{i}"


class Model:
    """Says nothing: activations are zeros."""

    name, fingerprint = "synthetic", "0" * 8

    def __init__(self, d_in, vocabulary):
        self.d_in, self.d_vocab, self.tokenizer = d_in, vocabulary, Tokenizer(vocabulary)
        generator = torch.Generator().manual_seed(1)
        self.bridge = SimpleNamespace(W_U=torch.randn(d_in, vocabulary, generator=generator))

    def width(self, site):
        """Return the width of the only site."""
        return self.d_in

    def read(self, tokens, sites):
        """Return zeros."""
        return dict.fromkeys(sites, torch.zeros(*tokens.shape, self.d_in))


class Rows:
    """Random tokens in rows of 256."""

    def __init__(self, tokens, vocabulary):
        self.n, self.vocabulary = tokens // 256, vocabulary

    def batches(self, rows_per_batch, start_row=0):
        """Yield the rows."""
        generator = torch.Generator().manual_seed(0)
        for k in range(0, self.n, rows_per_batch):
            size = (min(rows_per_batch, self.n - k), 256)
            tokens = torch.randint(1, self.vocabulary, size, generator=generator)
            yield SimpleNamespace(tokens=tokens, keep=torch.ones_like(tokens, dtype=torch.bool))


class Noise:
    """The SAE's weights, and codes of ``l0`` features drawn from a Zipf-like distribution."""

    def __init__(self, sae, l0):
        self.d_in, self.d_sae, self.l0 = sae.d_in, sae.d_sae, l0
        self.W_enc, self.W_dec, self.b_enc, self.b_dec = sae.W_enc, sae.W_dec, sae.b_enc, sae.b_dec
        self.generator = np.random.default_rng(0)

    def encode(self, x):
        """Return l0 distinct features for each token."""
        exponent = self.generator.random((len(x), self.l0)) ** 2
        step = self.d_sae // self.l0
        indices = np.arange(self.l0) * step + (exponent * step).astype(np.int64)
        values = self.generator.random(indices.shape, np.float32) * 9 + 1
        return SparseCode.from_topk(torch.from_numpy(indices), torch.from_numpy(values), self.d_sae)

    def decode(self, code):
        """Never asked for."""
        raise NotImplementedError


def make(folder, features, tokens, *, l0, d_in, vocabulary):
    """Build the store and the SAE."""
    from saelab.features.build import build_features

    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=features, k=l0), seed=0)
    save_sae(sae, folder / "sae", {"provenance": {"site": SITE}})
    started = time.perf_counter()
    with torch.no_grad():
        model, rows = Model(d_in, vocabulary), Rows(tokens, vocabulary)
        build_features(model, Noise(sae, l0), rows, SITE, folder / "features", nearest=False, rows_per_batch=64)
    print(f"built {features:,} features x {tokens:,} tokens in {time.perf_counter() - started:.0f} s")
