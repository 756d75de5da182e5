"""Sparse probing: how well the k best features of a dictionary tell a class from the rest.

For each class of each data set, balanced against the rest: the k features whose class means differ most *on the
training examples*, a logistic regression on them, accuracy on the test examples; k = 1, 2, 5. Beside it the probe on
all features, on the k best coordinates of the activation, and on the whole activation (SAEBench's definitions).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from saelab.analysis.saebench.examples import LabelledSet
from saelab.analysis.saebench.probes import balanced, fit_probe, mean_difference, top_k
from saelab.analysis.saebench.result import EvalResult, mean, skipped

EVAL = "sparse_probing"
KS = (1, 2, 5)


def sparse_probing(
    sets: Sequence[LabelledSet], *, train_size: int = 4000, test_size: int = 1000, seed: int = 0
) -> EvalResult:
    """Probe every data set with every dictionary of its codes (``sae`` and the controls)."""
    config = {"k_values": list(KS), "probe_train_set_size": train_size, "probe_test_set_size": test_size}
    config |= {"random_seed": seed, "dataset_names": [data.name for data in sets]}
    if not sets:
        return skipped(EVAL, "no labelled data: the text is no Python source, and no --labels were given", config)
    names = list(sets[0].pooled.codes)
    rows: list[dict[str, Any]] = []
    details = []
    for number, data in enumerate(sets):
        found = [
            _probe_class(data, k, train_size, test_size, np.random.default_rng([seed, 20, number, k]))
            for k in range(len(data.classes))
        ]
        rows += found
        detail: dict[str, Any] = {"dataset_name": data.name, "classes": list(data.classes), **data.about}
        detail |= {key: mean([row[key] for row in found]) for key in found[0]}
        details.append(detail)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    by_set = {key: mean([detail[key] for detail in details]) for key in columns}
    llm = {key: value for key, value in by_set.items() if key.startswith("llm_")}
    headline = [f"sae_top_{k}_test_accuracy" for k in KS]
    return EvalResult(
        EVAL,
        config,
        {"llm": llm, "sae": {key: value for key, value in by_set.items() if key.startswith("sae_")}},
        details,
        controls={name: {"llm": llm, "sae": _renamed(by_set, name)} for name in names if name != "sae"},
        better=dict.fromkeys(headline, "higher"),
        parts={key: {name: columns[key.replace("sae", name, 1)] for name in names} for key in headline},
    )


def _renamed(values: dict[str, float], name: str) -> dict[str, float]:
    """The numbers of a control under the SAE's names."""
    return {"sae" + key.removeprefix(name): value for key, value in values.items() if key.startswith(f"{name}_")}


def _probe_class(
    data: LabelledSet, k: int, train_size: int, test_size: int, rng: np.random.Generator
) -> dict[str, float]:
    """Test accuracies of one class against the rest."""
    y = data.y == k
    train = np.flatnonzero(data.train)[balanced(y[data.train], train_size, rng)]
    test = np.flatnonzero(~data.train)[balanced(y[~data.train], test_size, rng)]
    inputs = {"llm": data.pooled.x, **data.pooled.codes}
    result = {}
    for name, x in inputs.items():
        left, right = x[train], x[test]
        result[f"{name}_test_accuracy"] = fit_probe(left, y[train]).accuracy(right, y[test])
        order = top_k(np.abs(mean_difference(left, y[train])), max(KS))
        for size in KS:
            chosen = order[:size]
            columns = [m[:, chosen].toarray() if hasattr(m, "toarray") else m[:, chosen] for m in (left, right)]
            accuracy = fit_probe(columns[0], y[train]).accuracy(columns[1], y[test])
            result[f"{name}_top_{size}_test_accuracy"] = accuracy
    return result
