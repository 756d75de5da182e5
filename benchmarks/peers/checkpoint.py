"""Make small real checkpoints with a peer's own code, and evaluate checkpoints with it.

    ... checkpoint.py --peer saelens --list
    ... checkpoint.py --peer saelens --arch topk --out DIR --x x.safetensors --y y.safetensors     make and evaluate
    ... checkpoint.py --peer saelens --load DIR --x x.safetensors --y y.safetensors                evaluate

``x.safetensors`` holds ``x`` (N, d_in); ``y.safetensors`` receives ``acts`` (N, d_sae) and ``recon`` (N, d_in).
``--jobs FILE`` runs a JSON list of such jobs in one process: importing a peer takes about ten seconds.
"""

import argparse
import json
import traceback
from pathlib import Path
from typing import Any

from common import PEERS, adapter, answers, say


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--list", action="store_true", help="list the kinds of checkpoint this peer can make")
    parser.add_argument("--arch")
    parser.add_argument("--out")
    parser.add_argument("--load")
    parser.add_argument("--x")
    parser.add_argument("--y")
    parser.add_argument("--jobs")
    parser.add_argument("--d-sae", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stream = answers()
    peer = adapter(options.peer)
    if options.list:
        say(stream, {"peer": options.peer, "version": peer.version(), "archs": sorted(peer.CHECKPOINTS)})
        return
    jobs = json.loads(Path(options.jobs).read_text()) if options.jobs else [vars(options)]
    for job in jobs:
        say(stream, _run(peer, {**vars(options), **job}))


def _run(peer: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Make or load one checkpoint and evaluate it; an error is an answer too."""
    import torch
    from safetensors.torch import load_file, save_file

    try:
        x = load_file(job["x"])["x"]
        torch.manual_seed(job["seed"])
        if job["load"]:
            folder, evaluate = Path(job["load"]), peer.load(Path(job["load"]))
        else:
            out = Path(job["out"])
            out.mkdir(parents=True, exist_ok=True)
            folder, evaluate = peer.CHECKPOINTS[job["arch"]](out, x, job["d_sae"], job["k"])
        with torch.no_grad():
            acts, recon = evaluate(x.clone())
        save_file({"acts": acts.float().contiguous(), "recon": recon.float().contiguous()}, job["y"])
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "arch": job["arch"], "error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"ok": True, "arch": job["arch"], "checkpoint": str(folder), "y": job["y"]}


if __name__ == "__main__":
    main()
