"""Strong baselines that `onerec_hf.evaluation.evaluate` scores with the same call as our models."""

from typing import Any

from .bert4rec import BERT4Rec
from .cooccurrence import CoOccurrence
from .embedding_knn import EmbeddingKNN
from .fdsa import FDSA, attribute_codes
from .hstu import HSTU
from .item_knn import ItemKNN
from .popularity import Popularity
from .ranking import rank_items
from .sasrec import SASRec
from .tiger import TIGER

# what a re-ranker can be saved with
SCORERS: dict[str, Any] = {
    scorer.__name__: scorer for scorer in (BERT4Rec, CoOccurrence, EmbeddingKNN, FDSA, HSTU, SASRec)
}

__all__ = [
    "FDSA",
    "HSTU",
    "SCORERS",
    "TIGER",
    "BERT4Rec",
    "CoOccurrence",
    "EmbeddingKNN",
    "ItemKNN",
    "Popularity",
    "SASRec",
    "attribute_codes",
    "rank_items",
]
