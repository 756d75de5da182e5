"""Import and export: SAE folders from and to the checkpoint formats of other libraries."""

from pathlib import Path

from saelab.core.artifacts import prepare_output
from saelab.sae.base import SAE
from saelab.sae.folder import load_sae, save_sae
from saelab.sae.formats import detect_format, export_sae, import_sae


def run_import(path: str | Path, out: str | Path, *, format_name: str = "auto", force: bool = False) -> SAE:
    """Read a checkpoint of another library and write it as an SAE folder; scales are folded on the way."""
    found = detect_format(path) if format_name == "auto" else format_name
    sae = import_sae(path, found)
    save_sae(sae, prepare_output(out, force=force), {"imported": {"format": found, "path": str(path)}})
    return sae


def run_export(sae: str | Path, out: str | Path, *, format_name: str, force: bool = False) -> Path:
    """Write an SAE folder as a checkpoint of another library, taking raw activations."""
    return export_sae(load_sae(sae), prepare_output(out, force=force), format_name)
