"""Time one TopK optimiser step of a peer, by the peer's own training loop. Run with the peer's own interpreter.

    .venv-peers/sparsify/bin/python benchmarks/peers/step.py --peer sparsify --n 2048 --d-in 512 --d-sae 8192 --k 32

prints one JSON line: ``{"peer", "version", "median_ms", "ms": [...], "peak_extra_mb"}``. With ``--serve`` it answers
``{"ready": true, ...}`` once warm, then one line per command read from stdin (``step``, ``memory``, ``quit``), so that
a caller can interleave several peers in one run.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterable, Iterator

from common import PEERS, Done, Meter, adapter, answers, say


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--n", type=int, default=2048, help="tokens per step")
    parser.add_argument("--d-in", type=int, default=512)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--no-memory", action="store_true", help="skip the step that measures memory")
    parser.add_argument("--serve", action="store_true", help="answer commands from stdin")
    options = parser.parse_args()
    stream = answers()
    peer = adapter(options.peer)

    import torch

    if options.threads:
        torch.set_num_threads(options.threads)
    x = torch.randn(options.n, options.d_in, generator=torch.Generator().manual_seed(0))
    about = {"peer": options.peer, "version": peer.version(), "threads": torch.get_num_threads()}

    def served() -> Iterator[str]:
        yield from ["step"] * options.warmup
        meter.stream = stream
        say(stream, {"ready": True, **about})
        yield from (line.strip() for line in sys.stdin if line.strip())

    memory = [] if options.no_memory else ["memory"]
    commands: Iterable[str] = served() if options.serve else ["step"] * (options.warmup + options.repeats) + memory
    meter = Meter(x, commands, None)
    with contextlib.suppress(Done):
        peer.train_topk(meter, options.d_in, options.d_sae, options.k)
    if not options.serve:
        ms = [answer["ms"] for answer in meter.answers if "ms" in answer][options.warmup :]
        peak = meter.answers[-1].get("peak_extra_mb")
        say(stream, {**about, "median_ms": statistics.median(ms), "ms": ms, "peak_extra_mb": peak})


if __name__ == "__main__":
    main()
