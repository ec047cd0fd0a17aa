"""Strong baselines that `onerec_hf.evaluation.evaluate` scores with the same call as our models."""

from .cooccurrence import CoOccurrence
from .popularity import Popularity
from .ranking import rank_items
from .sasrec import SASRec

__all__ = ["CoOccurrence", "Popularity", "SASRec", "rank_items"]
