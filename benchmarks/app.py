"""Latency and memory of the feature browser on a synthetic store, through the pages themselves.

    python benchmarks/app.py --features 100000 --tokens 5000000 --folder /tmp/saelab-app-benchmark

The store is built by saelab's own builder from codes drawn at random (Zipf-distributed features), and kept for the next
run. Each page is run as Streamlit's server runs it, in a process that has just been started, for features drawn at
random; the time is that of the whole script with everything it sends.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from saelab.core.assets import asset
from saelab.core.code import SparseCode
from saelab.sae import TopKConfig, TopKSAE, save_sae

SITE = "blocks.0.hook_resid_post"
VOCABULARY = 20_000


class Tokenizer:
    """Words ``w0``, ``w1`` ..."""

    all_special_ids = (0,)
    bos_token_id = eos_token_id = 0
    backend_tokenizer = SimpleNamespace(decoder="ByteLevel", pre_tokenizer="")

    def __len__(self):
        return VOCABULARY

    def convert_ids_to_tokens(self, i):
        """Return the token as it stands in a byte-level vocabulary."""
        return f"Ġw{i}"


class Model:
    """Says nothing: activations are zeros."""

    name, fingerprint, d_vocab, tokenizer = "synthetic", "0" * 8, VOCABULARY, Tokenizer()

    def __init__(self, d_in):
        self.d_in = d_in
        generator = torch.Generator().manual_seed(1)
        self.bridge = SimpleNamespace(W_U=torch.randn(d_in, VOCABULARY, generator=generator))

    def width(self, site):
        """Return the width of the only site."""
        return self.d_in

    def read(self, tokens, sites):
        """Return zeros."""
        return dict.fromkeys(sites, torch.zeros(*tokens.shape, self.d_in))


class Rows:
    """Random tokens in rows of 256."""

    def __init__(self, tokens):
        self.n = tokens // 256

    def batches(self, rows_per_batch, start_row=0):
        """Yield the rows."""
        generator = torch.Generator().manual_seed(0)
        for k in range(0, self.n, rows_per_batch):
            size = (min(rows_per_batch, self.n - k), 256)
            tokens = torch.randint(1, VOCABULARY, size, generator=generator)
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


def make(folder, features, tokens, l0, d_in):
    """Build the store and the SAE."""
    from saelab.features.build import build_features

    sae = TopKSAE(TopKConfig(d_in=d_in, d_sae=features, k=l0), seed=0)
    save_sae(sae, folder / "sae", {"provenance": {"site": SITE}})
    started = time.perf_counter()
    with torch.no_grad():
        build_features(
            Model(d_in), Noise(sae, l0), Rows(tokens), SITE, folder / "features", nearest=False, rows_per_batch=64
        )
    print(f"built {features:,} features x {tokens:,} tokens in {time.perf_counter() - started:.0f} s")


def memory():
    """Return resident MiB of this process: private, and mapped from files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]


def measure(folder, runs):
    """Run the pages; print one JSON object."""
    sys.path.insert(0, str(asset("app")))
    sys.argv = ["main.py", str(folder)]
    from streamlit import config
    from streamlit.testing.v1 import AppTest

    config.set_option("runner.magicEnabled", False)  # as saelab app does
    result = {}
    app = AppTest.from_file(str(asset("app", "main.py")), default_timeout=300)
    started = time.perf_counter()
    app.run()
    result["first page, cold (imports too)"] = [time.perf_counter() - started]
    result["overview"] = timed(app, runs, lambda k: None)
    app.switch_page("views/features.py").run()
    result["features, sort by another column"] = timed(
        app, runs, lambda k: app.selectbox(key="sort").set_value(["max", "token_entropy", "mean", "density"][k % 4])
    )
    result["features, another page"] = timed(app, runs, lambda k: app.number_input(key="page_number").set_value(k + 1))
    from saelab.features.store import open_features

    n = open_features(next(folder.rglob("features"))).n_features
    chosen = np.random.default_rng(7).integers(0, n, runs + 1).tolist()
    app.switch_page("views/feature.py").run()

    def other(k):
        app.query_params["feature"] = str(chosen[k])

    result["feature"] = timed(app, runs, other)
    assert not app.exception
    print(json.dumps({"seconds": result, "memory": memory()}))


def timed(app, runs, change):
    """Seconds of each of some runs of a page, after one that is not counted."""
    seconds = []
    for k in range(runs + 1):
        change(k)
        started = time.perf_counter()
        app.run()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def main():
    """Parse, build if needed, measure in a fresh process, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--l0", type=int, default=16)
    parser.add_argument("--d_in", type=int, default=256)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/saelab-app-benchmark"))
    parser.add_argument("--existing", action="store_true", help="measure what is in --folder (a demo run, say)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        measure(options.folder, options.runs)
        return
    if not options.existing and not (options.folder / "features" / "manifest.json").is_file():
        make(options.folder, options.features, options.tokens, options.l0, options.d_in)
    command = [sys.executable, __file__, "--child", "--folder", str(options.folder), "--runs", str(options.runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    result = json.loads(done.stdout.splitlines()[-1])
    print(f"{'page':40} {'median':>9} {'p95':>9}")
    for name, seconds in result["seconds"].items():
        print(f"{name:40} {np.median(seconds) * 1e3:6.0f} ms {np.quantile(seconds, 0.95) * 1e3:6.0f} ms")
    private, mapped = result["memory"]
    print(
        f"resident memory: {private:.0f} MiB of its own, {mapped:.0f} MiB mapped from files (libraries and the store)"
    )


if __name__ == "__main__":
    main()
