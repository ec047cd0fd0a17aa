"""Metrics and `evaluate()`: the same call for our models and for every baseline."""

from .classification import auc, calibration, gauc
from .entropy import prediction_entropy
from .evaluate import EvaluationResult, Recommender, evaluate
from .metrics import paired_bootstrap

__all__ = [
    "EvaluationResult",
    "Recommender",
    "auc",
    "calibration",
    "evaluate",
    "gauc",
    "paired_bootstrap",
    "prediction_entropy",
]
