"""Train a peer's SAE on given activations, with its own trainer and its recommended normalisation.

    .venv-peers/saelens/bin/python benchmarks/peers/train.py --peer saelens --activations x.safetensors --d-sae 2048 \
        --k 32 --tokens 1000000 --out out/saelens

The activations are the tensor ``x`` (T, d_in) of a safetensors file; their rows are reshuffled each epoch by
``--seed``. The checkpoint is in the peer's own format; the JSON answer says where, and with which settings. ``--lr``
left out means the peer's default. ``--jobs FILE`` trains a JSON list of SAEs in one process, an answer each: an entry
has the options that differ (arch, k, lr, seed, tokens, out).
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import PEERS, Epochs, adapter, answers, say


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--arch", choices=("topk", "batchtopk"), default="topk")
    parser.add_argument("--activations", required=True, help="safetensors file with a tensor x (T, d_in)")
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--k", type=int)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out")
    parser.add_argument("--jobs", help="JSON file with a list of SAEs to train")
    options = parser.parse_args()
    if not options.jobs and None in (options.k, options.tokens, options.out):
        parser.error("give --k, --tokens and --out, or --jobs")
    stream = answers()
    peer = adapter(options.peer)

    import torch
    from safetensors.torch import load_file

    if options.threads:
        torch.set_num_threads(options.threads)
    x = load_file(options.activations)["x"].float()
    jobs = json.loads(Path(options.jobs).read_text()) if options.jobs else [{}]
    for job in jobs:
        say(stream, _train(peer, x, argparse.Namespace(**{**vars(options), **job})))


def _train(peer: Any, x: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Train one SAE and say where it is."""
    import torch

    batch, steps = min(options.batch, len(x)), max(1, options.tokens // min(options.batch, len(x)))
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    start = time.perf_counter()
    checkpoint, settings = peer.train(
        Epochs(x, batch, options.seed),
        d_in=x.shape[1],
        d_sae=options.d_sae,
        k=options.k,
        arch=options.arch,
        steps=steps,
        batch=batch,
        lr=options.lr,
        seed=options.seed,
        out=out,
    )
    return {
        "peer": options.peer,
        "version": peer.version(),
        "arch": options.arch,
        "checkpoint": str(checkpoint),
        "steps": steps,
        "batch": batch,
        "seconds": time.perf_counter() - start,
        "settings": settings,
    }


if __name__ == "__main__":
    main()
