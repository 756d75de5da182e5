"""SAEBench's evaluations that need no download, on labels that Python, the tokenizer or the user provides."""

from saelab.analysis.saebench.folder import load_full_evaluation, save_full_evaluation
from saelab.analysis.saebench.result import EvalResult, Flag, FullEvaluation
from saelab.analysis.saebench.run import EVALS, BenchSettings, full_evaluate

__all__ = [
    "EVALS",
    "BenchSettings",
    "EvalResult",
    "Flag",
    "FullEvaluation",
    "full_evaluate",
    "load_full_evaluation",
    "save_full_evaluation",
]
