"""Metrics and `evaluate()`: the same call for our models and for every baseline."""

from .bootstrap import Lift, bootstrap_lift, paired_bootstrap
from .classification import auc, calibration, feedback_report, gauc
from .entropy import prediction_entropy
from .evaluate import EvaluationResult, Recommender, evaluate
from .metrics import novelty_at_k
from .strata import frequency_strata, history_strata, recall_by_frequency, recall_by_history

__all__ = [
    "EvaluationResult",
    "Lift",
    "Recommender",
    "auc",
    "bootstrap_lift",
    "calibration",
    "evaluate",
    "feedback_report",
    "frequency_strata",
    "gauc",
    "history_strata",
    "novelty_at_k",
    "paired_bootstrap",
    "prediction_entropy",
    "recall_by_frequency",
    "recall_by_history",
]
