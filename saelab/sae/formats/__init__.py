"""SAEs in the formats of other libraries: import and export.

    sae = import_sae("path/to/their/folder")                   # the format is found out
    export_sae(sae, "out/for-saelens", "saelens")

Each format is a file here with ``detect``, ``read`` and ``write`` over :class:`~saelab.sae.formats.portable.Portable`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from saelab.core.artifacts import MANIFEST
from saelab.core.errors import FormatError, MissingFileError
from saelab.core.registry import Registry
from saelab.sae.base import SAE
from saelab.sae.formats import dictionary_learning, openai, openmoss, saelens, safety_foundation, sparsify
from saelab.sae.formats.portable import Portable

__all__ = ["FORMATS", "Format", "Portable", "detect_format", "export_sae", "import_sae", "read_checkpoint"]


class Format(NamedTuple):
    """An entry of :data:`FORMATS`."""

    detect: Callable[[Path], bool]
    """Whether a folder or file looks like this format; cheap, and never raises for another format."""
    read: Callable[[Path], Portable]
    write: Callable[[Portable, Path], None] | None
    """None: this format is read only."""


FORMATS: Registry[Format] = Registry("checkpoint format")
# The first that recognises a folder is taken: ai-safety-foundation shares its file names with SAELens.
FORMATS.register("ai-safety-foundation", Format(safety_foundation.detect, safety_foundation.read, None))
FORMATS.register("saelens", Format(saelens.detect, saelens.read, saelens.write))
FORMATS.register("sparsify", Format(sparsify.detect, sparsify.read, sparsify.write))
FORMATS.register(
    "dictionary_learning", Format(dictionary_learning.detect, dictionary_learning.read, dictionary_learning.write)
)
FORMATS.register("openmoss", Format(openmoss.detect, openmoss.read, openmoss.write))
FORMATS.register("openai", Format(openai.detect, openai.read, openai.write))


def detect_format(path: str | Path) -> str:
    """Return the name of the format of a folder or file; raise :class:`FormatError` when none recognises it."""
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    for name, entry in FORMATS.items():
        if entry.detect(path):
            return name
    if (path / MANIFEST).is_file():
        raise FormatError(f"{path} is a saelab folder; open it with load_sae, there is nothing to import")
    found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) if path.is_dir() else path.name
    raise FormatError(
        f"{path} is in no format known here ({', '.join(FORMATS)}); it holds {found or 'nothing'}. "
        "Give the folder with the weights and the config file"
    )


def read_checkpoint(path: str | Path, format: str = "auto") -> Portable:
    """Read another library's SAE as a :class:`Portable`, without needing its architecture to be registered.

    Raises :class:`MissingFileError`, :class:`FormatError` (unknown format, or something in it that saelab cannot
    represent) or :class:`CorruptError`. Warns where the file leaves open what it means.
    """
    path = Path(path)
    if not path.exists():
        raise MissingFileError(f"{path} does not exist")
    return FORMATS[detect_format(path) if format == "auto" else format].read(path)


def import_sae(folder_or_file: str | Path, format: str = "auto", device: str = "cpu") -> SAE:
    """Load another library's SAE as a saelab SAE with the same activations and reconstructions.

    BatchTopK and Matryoshka SAEs come as JumpReLU, which is what they are at inference. Pickles are read with
    ``weights_only=True`` and never executed. Raises what :func:`read_checkpoint` raises, and :class:`FormatError` when
    this version has no architecture for it.
    """
    return read_checkpoint(folder_or_file, format).to_sae(device)


def export_sae(sae: SAE, folder: str | Path, format: str) -> Path:
    """Write ``sae`` into ``folder`` in another library's format and return the folder.

    The input scale s is folded as that library does: SAELens' weights take it and activations stay as they are; in
    the other formats biases and thresholds take it, decoder rows keep their norm and activations come out 1/s times
    as large. Reconstructions are the same in all. An SAE whose inference uses a threshold is written as a JumpReLU.
    Raises :class:`FormatError` when the format cannot hold it.
    """
    write = FORMATS[format].write
    if write is None:
        raise FormatError(f"the format {format} can be read but not written")
    write(Portable.from_sae(sae), Path(folder))
    return Path(folder)
