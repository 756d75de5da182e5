"""Time and peak memory of ``saelab.compare`` on two planted SAEs, in a fresh process for each size.

    python benchmarks/compare.py [--n 4096 16384] [--tokens 200000] [--k 32] [--d 768] [--json FILE]

B is A with its features in another order, four in five of its activations kept and noise on its decoder, so that the
right answer is known: the share of features that are matched to their own copy is printed beside time and memory.
Features fire by a power law (rank to the -0.7), k on each token.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def measure(n: int, tokens: int, k: int, d: int) -> dict[str, Any]:
    """Compare two planted SAEs of n features in this process."""
    import numpy as np
    from scipy import sparse

    from saelab.analysis.compare import CodeMatrix, Side, compare
    from saelab.core.progress import set_progress

    set_progress(False)
    rng = np.random.default_rng(0)
    rate = np.arange(1, n + 1) ** -0.7
    chosen = np.minimum(np.searchsorted((rate / rate.sum()).cumsum(), rng.random((tokens, k))), n - 1)
    offsets = np.arange(0, tokens * k + 1, k)
    codes = sparse.csr_matrix(((rng.random((tokens, k)) + 0.5).ravel(), chosen.ravel(), offsets), shape=(tokens, n))
    order = rng.permutation(n)
    other = codes[:, order]
    other.data *= rng.random(other.nnz) < 0.8
    rows = rng.standard_normal((n, d)).astype(np.float32)
    noisy = rows[order] + 0.5 * rng.standard_normal((n, d)).astype(np.float32)
    a, b = Side("a", rows, CodeMatrix(codes)), Side("b", noisy, CodeMatrix(other))
    del codes, other
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, used = time.perf_counter(), time.process_time()
    found = compare(a, b)
    result: dict[str, Any] = {
        "n": n,
        "tokens": tokens,
        "k": k,
        "d": d,
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - used,
        "before_mb": before / 1024,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    for name in ("decoders", "activations"):
        matching = getattr(found, name)
        right = float((order[matching.pair_b] == matching.pair_a).mean())
        result |= {f"{name}_recovered": right, f"{name}_matched": len(matching.pair_a), "exact": matching.exact}
    return result


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--d", type=int, default=768)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    rows = []
    names = ("features", "seconds", "CPU s", "peak MB", "recovered (cosine, correlation)")
    print("{:>9s} {:>8s} {:>7s} {:>8s} {:>32s}  matching".format(*names))
    for n in args.n:
        command = [sys.executable, __file__, "--measure", *map(str, (n, args.tokens, args.k, args.d))]
        row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(row)
        recovered = f"{row['decoders_recovered']:.1%}, {row['activations_recovered']:.1%}"
        method = "exact" if row["exact"] else "among candidates"
        print(
            f"{n:9d} {row['seconds']:8.1f} {row['cpu_seconds']:7.1f} {row['peak_mb']:8.0f} {recovered:>32s}  {method}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*map(int, sys.argv[2:6]))))
    else:
        main()
