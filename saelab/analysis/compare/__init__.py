"""Do two SAEs learn the same features? Matching, regression, clusters and splitting, on decoders and on activations."""

from saelab.analysis.compare.codes import CodeMatrix
from saelab.analysis.compare.compare import Side, compare
from saelab.analysis.compare.folder import load_comparison, save_comparison
from saelab.analysis.compare.result import Comparison

__all__ = ["CodeMatrix", "Comparison", "Side", "compare", "load_comparison", "save_comparison"]
