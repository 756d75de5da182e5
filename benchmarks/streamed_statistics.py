"""Memory and speed of streamed least squares: activations and an error of the same width, R2 on held-out tokens.

    python benchmarks/streamed_statistics.py [--tokens 10000000] [--d 768] [--batch 8192] [--json FILE]

Batches are made as they are needed (a known linear map plus noise, so the R2 must come out as 0.5) and given to the
moments of the fit and of the test in turn. Reported: peak resident memory of the whole process, memory after a tenth of
the tokens (they must be equal: nothing grows with tokens), and tokens per second.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from memory import PeakMemory, _resident

from saelab.core.regression import CrossMoments


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 10_000_000), ("d", 768), ("batch", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(args.d, args.d, generator=generator) / args.d**0.5
    fit, test = CrossMoments(args.d, args.d), CrossMoments(args.d, args.d)
    early, seconds, done = 0, 0.0, 0
    with PeakMemory() as memory:
        while done < args.tokens:
            x = torch.randn(args.batch, args.d, generator=generator) + 3
            y = x @ weight + torch.randn(args.batch, args.d, generator=generator)
            began = time.perf_counter()
            (fit if (done // args.batch) % 2 == 0 else test).update(x, y)
            seconds += time.perf_counter() - began
            done += args.batch
            if not early and done * 10 >= args.tokens:
                early = memory.peak
        found = test.r2(fit.fit())
    result = {
        "tokens": done,
        "d": args.d,
        "peak_mb": memory.peak / 1e6,
        "peak_after_a_tenth_mb": early / 1e6,
        "final_mb": _resident() / 1e6,
        "tokens_per_second": done / seconds,
        "r2": found.pooled,
        "seconds": seconds,
    }
    for key, value in result.items():
        print(f"{key:24s} {value:,.4g}" if isinstance(value, float) else f"{key:24s} {value:,}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    if memory.peak > 2e9:
        sys.exit("over 2 GB")


if __name__ == "__main__":
    main()
