"""Scorers, one file each. Chance is 0.5 for accuracies and AUCs (1 / windows shown for the intruder), 0 for the others.

A scorer takes items, (examples of a feature, explanation or None), and returns one score for each that it can score.
"""

from saelab.analysis.autointerp.scorers.detection import DetectionScorer
from saelab.analysis.autointerp.scorers.embedding import EmbeddingScorer
from saelab.analysis.autointerp.scorers.example_embedding import ExampleEmbeddingScorer
from saelab.analysis.autointerp.scorers.fuzzing import FuzzingScorer
from saelab.analysis.autointerp.scorers.intervention import InterventionScorer
from saelab.analysis.autointerp.scorers.intruder import IntruderScorer
from saelab.analysis.autointerp.scorers.simulation import SimulationScorer
from saelab.analysis.autointerp.scorers.surface import SurfaceScorer
from saelab.analysis.autointerp.scorers.surprisal import SurprisalScorer

__all__ = [
    "DetectionScorer",
    "EmbeddingScorer",
    "ExampleEmbeddingScorer",
    "FuzzingScorer",
    "InterventionScorer",
    "IntruderScorer",
    "SimulationScorer",
    "SurfaceScorer",
    "SurprisalScorer",
]
