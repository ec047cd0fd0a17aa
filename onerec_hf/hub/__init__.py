"""A model at home on the Hub: its card, the pictures in it, and one commit that uploads everything."""

from .cards import model_card, reranking_text, results_table, table_cell, training_text
from .pictures import plot_prediction_entropy, plot_recall_by_frequency, plot_training_curve
from .push import push_to_hub, repository_files

__all__ = [
    "model_card",
    "plot_prediction_entropy",
    "plot_recall_by_frequency",
    "plot_training_curve",
    "push_to_hub",
    "repository_files",
    "reranking_text",
    "results_table",
    "table_cell",
    "training_text",
]
