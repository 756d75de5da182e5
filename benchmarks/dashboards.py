"""Seconds to gather what dashboards show, for all features of an SAE: saelab's feature store against SAEDashboard.

    benchmarks/peers/setup.sh saelens        # and benchmarks/peers/requirements-sae_dashboard.txt, see docs/app.md
    python benchmarks/dashboards.py saelab-demo/train/sae --rows 512

The same model (the embedded one), SAE, token ids and features; each tool's own code and defaults; they take turns,
``--runs`` times. SAEDashboard keeps all features' data in memory as Python objects; saelab writes its store to disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from saelab.core.artifacts import write_safetensors
from saelab.core.assets import embedded_model_dir
from saelab.core.progress import set_progress
from saelab.features.build import build_features
from saelab.models.subject import load_model
from saelab.models.text import open_text
from saelab.models.tokens import TokenRows, TokensConfig
from saelab.sae.folder import load_meta, load_sae
from saelab.sae.formats import export_sae

HERE = Path(__file__).resolve().parent
PEER = HERE.parent / ".venv-peers" / "sae_dashboard" / "bin" / "python"


class Rows:
    """Given token ids; BOS is not encoded."""

    def __init__(self, tokens, bos):
        self.tokens, self.bos = tokens, bos

    def batches(self, rows_per_batch, start_row=0):
        """Yield the rows."""
        for part in self.tokens[start_row:].split(rows_per_batch):
            yield SimpleNamespace(tokens=part, keep=part != self.bos)


def peer(folder, features, options):
    """Run the peer once; return its answer."""
    script = HERE / "peers" / "dashboard_build.py"
    command = [PEER, "-W", "ignore", script, "--model", embedded_model_dir(), "--sae", folder / "sae"]
    command += ["--tokens", folder / "tokens.safetensors", "--site", options.site, "--features", features]
    if options.threads:
        command += ["--threads", options.threads]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, cwd=HERE / "peers")
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main():
    """Parse, prepare, take turns, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sae", type=Path, help="folder of an SAE of the embedded model")
    parser.add_argument("--rows", type=int, default=512, help="rows of text")
    parser.add_argument("--length", type=int, default=128, help="tokens in a row")
    parser.add_argument("--features", type=int, help="the peer gathers only the first so many; default: all")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    set_progress(False)
    if options.threads:
        torch.set_num_threads(options.threads)
    if not PEER.exists():
        sys.exit(f"no {PEER}; see the first lines of this script")
    model, sae = load_model("embedded"), load_sae(options.sae)
    options.site = load_meta(options.sae)["provenance"]["site"]
    rows = TokenRows(model.tokenizer, open_text("stdlib:heldout"), TokensConfig(context=options.length), model.n_ctx)
    tokens = torch.cat([b.tokens for b, _ in zip(rows.batches(64), range(-(-options.rows // 64)), strict=False)])
    tokens = tokens[: options.rows]
    features = min(options.features or sae.d_sae, sae.d_sae)
    mine, theirs, their_cpu, my_cpu = [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_sae(sae, folder / "sae", "saelens")
        write_safetensors(folder / "tokens.safetensors", {"tokens": tokens})
        for k in range(options.runs):
            started = time.perf_counter(), time.process_time()
            build_features(model, sae, Rows(tokens, model.tokenizer.bos_token_id), options.site, folder / f"store{k}")
            mine.append(time.perf_counter() - started[0])
            my_cpu.append(time.process_time() - started[1])
            answer = peer(folder, features, options)
            theirs.append(answer["seconds"])
            their_cpu.append(answer["cpu"])
            print(f"run {k}: saelab {mine[-1]:.1f} s, SAEDashboard {theirs[-1]:.1f} s", flush=True)
    said = f"{tokens.numel():,} tokens in rows of {options.length}, d_sae {sae.d_sae:,}"
    print(f"\n{said}\n{'':30} {'seconds':>9} {'CPU s':>9} {'features':>9}")
    print(f"{'saelab build (all panes)':30} {np.median(mine):9.1f} {np.median(my_cpu):9.1f} {sae.d_sae:9,}")
    print(f"{'SAEDashboard 0.8.0':30} {np.median(theirs):9.1f} {np.median(their_cpu):9.1f} {features:9,}")
    scale = sae.d_sae / features
    for what, a, b in (("seconds", theirs, mine), ("CPU seconds", their_cpu, my_cpu)):
        ratios = np.array(a) / np.array(b) * scale
        print(f"SAEDashboard / saelab, {what} per feature, in each run: {', '.join(f'{r:.1f}' for r in ratios)}")


if __name__ == "__main__":
    main()
