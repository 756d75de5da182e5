"""A full evaluation on disk: one JSON file per evaluation in SAEBench's shape, a summary, and the manifest."""

from pathlib import Path
from typing import Any

from saelab.analysis.saebench.result import FullEvaluation
from saelab.core.artifacts import prepare_output, read_json, read_manifest, write_json, write_manifest
from saelab.core.errors import CorruptError

KIND = "saebench"
SUMMARY = "summary.json"


def save_full_evaluation(result: FullEvaluation, folder: str | Path, *, force: bool = False) -> Path:
    """Write ``<evaluation>.json`` for each, ``summary.json`` (headline metrics, controls, flags) and the manifest."""
    folder = prepare_output(folder, force=force)
    data = result.to_dict()
    for name, content in data["evals"].items():
        write_json(folder / f"{name}.json", content)
    rows = result.to_frame().to_dict("records")
    write_json(folder / SUMMARY, {**{k: v for k, v in data.items() if k != "evals"}, "headline": rows})
    manifest = {"evals": list(data["evals"]), "flags": len(data["flags"]), "sae": result.sae, "seed": result.seed}
    write_manifest(folder, KIND, manifest)
    return folder


def load_full_evaluation(folder: str | Path) -> dict[str, Any]:
    """Read what :func:`save_full_evaluation` wrote, as plain data: the summary, and ``evals`` by name."""
    folder = Path(folder)
    manifest = read_manifest(folder, KIND)
    summary = read_json(folder / SUMMARY)
    evals = {name: read_json(folder / f"{name}.json") for name in manifest["evals"]}
    for name, content in evals.items():
        if not isinstance(content, dict) or content.get("eval_type_id") != name:
            raise CorruptError(f"{folder / name}.json is not the evaluation '{name}'; evaluate again")
    return {**summary, "evals": evals}
