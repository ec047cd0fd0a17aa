"""Logs -> interactions -> splits of events or sessions -> batches; item embeddings."""

from .captions import CaptionDecoder, small_caption_model
from .collators import OneRecCollator, SessionCollator
from .embeddings import (
    check_item_embeddings,
    collaborative_embeddings,
    concat_embeddings,
    item_texts,
    load_embeddings,
    text_embeddings,
)
from .features import EventFeature, category_codes, category_map, reaches
from .interactions import Interactions, load_interactions
from .item_alignment import ItemAlignment, item_contrastive_loss
from .item_pairs import behaviour_pairs, item_to_item_pairs, swing_neighbors, user_to_item_pairs
from .labels import event_labels, session_labels
from .lifelong import compress_lifelong, hierarchical_kmeans
from .past_rates import past_rates, period_of, quantile_codes, rate_numbers
from .pathways import PathwayCollator
from .public_datasets import load_amazon, load_kuairand, load_kuairand_like_hate
from .reward_collator import RewardCollator
from .session_splits import session_splits, training_events
from .sessions import SessionConfig, session_criteria, session_index
from .splits import arrow_dataset, global_time_split, k_core, leave_last_out, load_splits, target_rows
from .tables import match_ids, read_table

__all__ = [
    "CaptionDecoder",
    "EventFeature",
    "Interactions",
    "ItemAlignment",
    "OneRecCollator",
    "PathwayCollator",
    "RewardCollator",
    "SessionCollator",
    "SessionConfig",
    "arrow_dataset",
    "behaviour_pairs",
    "category_codes",
    "category_map",
    "check_item_embeddings",
    "collaborative_embeddings",
    "compress_lifelong",
    "concat_embeddings",
    "event_labels",
    "global_time_split",
    "hierarchical_kmeans",
    "item_contrastive_loss",
    "item_texts",
    "item_to_item_pairs",
    "k_core",
    "leave_last_out",
    "load_amazon",
    "load_embeddings",
    "load_interactions",
    "load_kuairand",
    "load_kuairand_like_hate",
    "load_splits",
    "match_ids",
    "past_rates",
    "period_of",
    "quantile_codes",
    "rate_numbers",
    "reaches",
    "read_table",
    "session_criteria",
    "session_index",
    "session_labels",
    "session_splits",
    "small_caption_model",
    "swing_neighbors",
    "target_rows",
    "text_embeddings",
    "training_events",
    "user_to_item_pairs",
]
