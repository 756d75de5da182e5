"""Circuit methods side by side, and the circuits that the docs tell of.

    python benchmarks/circuits.py table    # seconds, AUC, faithfulness, CPR, CMD of every method; the codes' null
    python benchmarks/circuits.py speed    # discrete codes and ACDC at 32 and 250 prompts
    python benchmarks/circuits.py null     # the codes on models whose heads are known, shuffled labels too
    python benchmarks/circuits.py trainings # the same on the induction model of two other training seeds
    python benchmarks/circuits.py embedded # circuits of the embedded model, with random circuits beside them

All methods of a row see the same prompts on the same machine, one after another. Writes one JSON object per line.
"""

import argparse
import json
import math
import sys
import tempfile

import numpy as np
import torch

from saelab.core.progress import set_progress
from saelab.workflows.circuits import (
    CompareJob,
    FindJob,
    HeadsJob,
    open_model,
    open_task,
    run_compare,
    run_find,
    run_heads,
)

TABLE = (
    CompareJob(task="trigger", model="hand-induction", ablation="zero", metric="kl", pooling="each", l1=0.005, n=128,
               methods=["codes", "patching", "patching-nodes", "acdc", "eap-ig", "dfa"]),
    CompareJob(task="trigger", model="induction-trained", pooling="each", l1=0.005, n=128),
    CompareJob(task="bracket", model="embedded", pooling="each", n=32),
    CompareJob(task="recall", model="embedded", pooling="last", n=32),
)  # fmt: skip
"""Rows of the table. Exact patching of the embedded model is 1,004 runs over all prompts, hence 32 there (`speed` has
the 250 prompts of each class of the discrete-code paper)."""

SEEDS = 5
"""Draws of prompts, SAE and relabellings in the codes' null."""


def table(scale: float, only: str | None) -> None:
    """Print one line for each method of each row; ``only`` names one model/task."""
    for job in TABLE:
        if only not in (None, f"{job.model}/{job.task}"):
            continue
        n = max(12, round(job.n * scale))
        found = run_compare(job.model_copy(update={"n": n, "n_heldout": min(n, 64)}))
        seconds = {row.method: row.cpu_seconds for row in found.rows}
        for row in found.rows:
            ratio = seconds["acdc"] / row.cpu_seconds
            data = {"model": job.model, "task": job.task, "n": n, **vars(row), "acdc_cpu_over_this": ratio}
            print(json.dumps({key: None if _is_nan(value) else value for key, value in data.items()}), flush=True)
        print(json.dumps({"model": job.model, "task": job.task, "truth": found.truth, "n_edges": found.n_edges,
                          "n_true_edges": found.n_true_edges}), flush=True)  # fmt: skip


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def null() -> None:
    """AUC of the discrete codes on the models whose heads are known, by pooling and score, true and shuffled labels."""
    for model, true in (
        ("hand-induction", {"a0.h0", "a1.h0"}),
        ("induction-trained", _true_heads("induction-trained")),
    ):
        for pooling in ("each", "last", "mean", "max"):
            _codes(model, model, true, pooling)


def trainings() -> None:
    """The same for induction models of other training seeds, their heads' roles measured again."""
    from saelab.analysis.circuits.trained import train_induction

    for seed in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            train_induction(folder, seed=seed)
            for pooling in ("each", "last"):
                _codes(f"induction, training seed {seed}", folder, _true_heads(folder), pooling)


def _true_heads(model: str) -> set[str]:
    """Heads of a two-layer model that look at the previous token (layer 0) or after the last occurrence (layer 1)."""
    from saelab.analysis.circuits.trained import head_roles
    from saelab.models.components import Components

    roles = head_roles(Components(open_model(model)))
    true = {f"a0.h{h}" for h in np.flatnonzero(roles.previous[0] > 0.5)}
    return true | {f"a1.h{h}" for h in np.flatnonzero(roles.induction[1] > 0.5)}


def _codes(name: str, model: str, true: set[str], pooling: str) -> None:
    """Print the AUCs of the codes on one model over ``SEEDS`` seeds."""
    from saelab.analysis.circuits.scores import roc_auc

    found = [
        run_heads(HeadsJob(task="trigger", model=model, pooling=pooling, l1=0.005, n=100, seed=seed))
        for seed in range(SEEDS)
    ]
    truth = np.array([found[0].graph.writers[w] in true for w in found[0].graph.heads])
    line: dict[str, object] = {"model": name, "pooling": pooling, "seeds": SEEDS, "true_heads": sorted(true)}
    line["auc"] = [round(roc_auc(f.excess, truth), 3) for f in found]
    line["auc_z"] = [round(roc_auc(f.z, truth), 3) for f in found]
    line["auc_unique"] = [round(roc_auc(f.unique, truth), 3) for f in found]
    line["auc_shuffled"] = float(np.mean([roc_auc(n, truth) for f in found for n in f.null_excess]))
    line["seconds"] = float(np.mean([f.seconds for f in found]))
    print(json.dumps(line), flush=True)


def speed() -> None:
    """Print seconds of ACDC and of the discrete codes on the same prompts, and the AUC of both over the heads.

    Truth: heads whose whole output, when patched, moves the metric by more than 2 % of what patching everything does.
    """
    from saelab.analysis.circuits.acdc import acdc
    from saelab.analysis.circuits.code_sae import CodesConfig
    from saelab.analysis.circuits.codes import discrete_codes
    from saelab.analysis.circuits.exact import patch_nodes
    from saelab.analysis.circuits.run import EdgeRunner
    from saelab.analysis.circuits.scores import roc_auc

    for task, n in (("recall", 100), ("bracket", 32), ("bracket", 250)):
        parts, train, _, setting = open_task(CompareJob(task=task, pooling="last", n=n, n_heldout=2))
        runner = EdgeRunner(parts, train, setting)
        heads = list(runner.graph.heads)
        everything = abs(float(runner.scores(runner.graph.valid[None])[0]) - runner.clean_score)
        truth = np.abs(patch_nodes(runner).nodes[heads]) > 0.02 * everything
        found = acdc(runner, 0.01 * everything)
        line = {"task": task, "n": len(train), "true_heads": int(truth.sum()), "heads": len(heads)}
        about = {"acdc_runs": found.details["runs"], "acdc_auc": roc_auc(found.nodes[heads], truth)}
        print(json.dumps({**line, **about, "acdc_seconds": found.seconds}), flush=True)
        for pooling in ("last", "each", "mean", "max"):
            codes = discrete_codes(parts, train, CodesConfig(pooling=pooling))
            auc = {"auc": roc_auc(codes.excess, truth), "auc_unique": roc_auc(codes.unique, truth)}
            auc["auc_shuffled"] = float(np.mean([roc_auc(null, truth) for null in codes.null_excess]))
            times = {"seconds": codes.seconds, "acdc_seconds_over_this": found.seconds / codes.seconds}
            print(json.dumps({**line, "pooling": pooling, **auc, **times}), flush=True)


def embedded() -> None:
    """Print the circuits of the embedded model's tasks by two methods."""
    for task in ("recall", "bracket", "induction"):
        for method in ("eap-ig", "acdc"):
            circuit = run_find(FindJob(task=task, method=method, n=64, n_heldout=128, target=0.9))
            line = {"task": task, "method": method, "edges": circuit.n_edges, "share": circuit.share}
            line |= {"heads": circuit.heads, "mlps": circuit.mlps, "faithfulness": circuit.faithfulness}
            line |= {"own_prompts": circuit.faithfulness_train, "without": circuit.completeness}
            line |= {f"random_{name}": [float(np.mean(v)), max(v)] for name, v in circuit.random_faithfulness.items()}
            print(json.dumps(line), flush=True)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "speed", "null", "trainings", "embedded"])
    parser.add_argument("--scale", type=float, default=1.0, help="prompts, as a share of the usual number")
    parser.add_argument("--only", help="of the table: one model/task, such as embedded/bracket")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    set_progress(False)
    if given.what == "table":
        table(given.scale, given.only)
    else:
        {"speed": speed, "null": null, "trainings": trainings, "embedded": embedded}[given.what]()


if __name__ == "__main__":
    sys.exit(main())
