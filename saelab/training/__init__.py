"""The training loop: receives batches, knows no model and no store."""

from saelab.training.config import FitConfig, TrainingConfig
from saelab.training.loggers import Logger, TensorBoardLogger, WandbLogger, open_loggers
from saelab.training.loop import FitResult, fit
from saelab.training.stopping import Stopped

__all__ = [
    "FitConfig",
    "FitResult",
    "Logger",
    "Stopped",
    "TensorBoardLogger",
    "TrainingConfig",
    "WandbLogger",
    "fit",
    "open_loggers",
]
