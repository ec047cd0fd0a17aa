"""Logs -> interactions -> splits; item embeddings."""

from .interactions import Interactions, load_interactions
from .public_datasets import load_amazon
from .splits import global_time_split, k_core, leave_last_out

__all__ = ["Interactions", "global_time_split", "k_core", "leave_last_out", "load_amazon", "load_interactions"]
