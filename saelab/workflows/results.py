"""Saved results as the browser shows them: evaluations side by side, comparisons of SAEs, errors by token."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from saelab.core.errors import SaelabError
from saelab.features.table import quoted
from saelab.features.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pandas as pd

    from saelab.analysis.compare.result import Comparison
    from saelab.analysis.dark_matter.result import DarkMatter
    from saelab.workflows.browse import Library, Place

LEAST_OCCURRENCES = 10
"""Tokens seen less often say little about the error on them."""


def short(path: Path) -> str:
    """Return the end of a path that tells a result: its folder and the one above."""
    return "/".join(path.parts[-2:])


def evaluation_frame(folders: Sequence[Path]) -> "tuple[pd.DataFrame, list[str]]":
    """Return one row for each evaluation that can be read, and one line for each that cannot.

    Columns: ``name``, ``architecture``, ``d_sae``, ``l0``, ``fvu``, ``ce_recovered``, ``cosine``, ``dead_fraction``,
    ``dense_fraction``, ``model``, ``site``, ``tokens``, ``text``.
    """
    import pandas as pd

    from saelab.analysis.evaluation import load_evaluation

    rows, problems = [], []
    for folder in folders:
        try:
            e = load_evaluation(folder)
        except SaelabError as error:
            problems.append(str(error))
            continue
        rows.append(
            {
                "name": short(folder),
                "architecture": e.sae,
                "d_sae": e.d_sae,
                **{name: getattr(e, name) for name in ("l0", "fvu", "ce_recovered", "cosine")},
                **{name: getattr(e, name) for name in ("dead_fraction", "dense_fraction", "model", "site")},
                "tokens": e.n_tokens,
                "text": e.source,
            }
        )
    return pd.DataFrame(rows), problems


def place_named(found: "Library", name: str) -> "Place | None":
    """Return the place that a comparison means by the end of a path, if it is among the folders that are open."""
    parts = Path(name).parts
    for place in found.places:
        for path in (place.store, place.sae):
            if path is not None and path.parts[-len(parts) :] == parts:
                return place
    return None


def sae_folder(found: "Library", recorded: str) -> Path:
    """Return where the SAE of a saved result is: among the folders that are open, else where the result says it was.

    Results record the path as it was given, which is seldom right from another folder or on another machine.
    """
    place = place_named(found, recorded)
    return Path(recorded) if place is None or place.sae is None else place.sae


def matched_frame(comparison: "Comparison") -> "pd.DataFrame":
    """Return the pairs of the one-to-one matching, the most alike first.

    Columns: ``a``, ``b`` (features), ``correlation`` where activations were compared, ``cosine`` of the decoder rows
    where they share a space, and what the comparison knows of each pair (``either``, ``jaccard``).
    """
    import pandas as pd

    found, name = comparison.activations, "correlation"
    if found is None:
        found, name = comparison.decoders, "cosine"
    if found is None:
        return pd.DataFrame({"a": [], "b": []})
    frame = pd.DataFrame({"a": found.pair_a, "b": found.pair_b, name: found.pair_value})
    if name == "correlation":
        for column, values in comparison.pairs.items():
            frame[column] = values
    return frame.sort_values(name, ascending=False, kind="stable").reset_index(drop=True)


def split_frame(comparison: "Comparison") -> "pd.DataFrame":
    """Return the split features of the smaller SAE: ``feature``, ``parts`` (their features in the larger one), R2s."""
    import pandas as pd

    columns = ["feature", "parts", "r2_single", "r2_group"]
    found = comparison.splitting
    if found is None:
        return pd.DataFrame(columns=columns)
    which = np.flatnonzero(found.split)
    frame = pd.DataFrame(
        {
            "feature": which,
            "parts": [", ".join(map(str, found.groups[i].tolist())) for i in which],
            "r2_single": found.r2_single[which],
            "r2_group": found.r2_group[which],
        }
    )
    return frame.sort_values("r2_group", ascending=False, kind="stable", na_position="last").reset_index(drop=True)


def worst_tokens(result: "DarkMatter", name: str, vocabulary: Vocabulary | None, n: int = 50) -> "pd.DataFrame":
    """Return the tokens that an SAE reconstructs worst: those with the largest share of ``||x||^2`` in the error.

    Sums are over all occurrences of a token, those seen fewer than ``LEAST_OCCURRENCES`` times are left out. Columns:
    ``token``, ``occurrences``, ``error`` (share of the squared norm), ``linear`` and ``nonlinear`` (of its parts).
    """
    import pandas as pd

    ids = result.tokens["token_id"].astype(np.int64)
    counts = np.bincount(ids)
    norms = np.bincount(ids, result.tokens["x"])
    often = np.flatnonzero((counts >= LEAST_OCCURRENCES) & (norms > 0))
    frame = pd.DataFrame({"id": often, "occurrences": counts[often]})
    for column, part in (("error", "total"), ("linear", "linear"), ("nonlinear", "nonlinear")):
        frame[column] = np.bincount(ids, result.tokens[f"{name}/{part}"])[often] / norms[often]
    frame = frame.sort_values(["error", "id"], ascending=[False, True]).head(n).reset_index(drop=True)
    known = 0 if vocabulary is None else len(vocabulary)
    texts = [quoted(vocabulary.strings([i])[0]) if vocabulary and i < known else f"<{i}>" for i in frame["id"].tolist()]
    frame.insert(0, "token", texts)
    return frame.drop(columns="id")
