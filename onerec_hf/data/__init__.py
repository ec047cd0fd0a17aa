"""Logs -> interactions -> splits; item embeddings."""

from .collators import OneRecCollator
from .embeddings import (
    check_item_embeddings,
    collaborative_embeddings,
    concat_embeddings,
    item_texts,
    load_embeddings,
    text_embeddings,
)
from .features import EventFeature, category_codes
from .interactions import Interactions, load_interactions
from .labels import event_labels, session_labels
from .public_datasets import load_amazon, load_kuairand, load_kuairand_like_hate
from .splits import global_time_split, k_core, leave_last_out

__all__ = [
    "EventFeature",
    "Interactions",
    "OneRecCollator",
    "category_codes",
    "check_item_embeddings",
    "collaborative_embeddings",
    "concat_embeddings",
    "event_labels",
    "global_time_split",
    "item_texts",
    "k_core",
    "leave_last_out",
    "load_amazon",
    "load_embeddings",
    "load_interactions",
    "load_kuairand",
    "load_kuairand_like_hate",
    "session_labels",
    "text_embeddings",
]
