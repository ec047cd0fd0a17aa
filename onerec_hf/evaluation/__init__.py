"""Metrics and `evaluate()`: the same call for our models and for every baseline."""

from .evaluate import EvaluationResult, Recommender, evaluate
from .metrics import paired_bootstrap

__all__ = ["EvaluationResult", "Recommender", "evaluate", "paired_bootstrap"]
