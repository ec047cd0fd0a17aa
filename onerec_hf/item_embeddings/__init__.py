"""What the semantic IDs are made from: a vector per item, of its texts, of who watched it, or of both."""

from .captions import CaptionDecoder, small_caption_model
from .embeddings import (
    check_item_embeddings,
    collaborative_embeddings,
    concat_embeddings,
    item_texts,
    load_embeddings,
    text_embeddings,
)
from .item_alignment import ItemAlignment, item_contrastive_loss
from .item_pairs import behaviour_pairs, item_to_item_pairs, swing_neighbors, user_to_item_pairs
from .text_files import text_embedding_files

__all__ = [
    "CaptionDecoder",
    "ItemAlignment",
    "behaviour_pairs",
    "check_item_embeddings",
    "collaborative_embeddings",
    "concat_embeddings",
    "item_contrastive_loss",
    "item_texts",
    "item_to_item_pairs",
    "load_embeddings",
    "small_caption_model",
    "swing_neighbors",
    "text_embedding_files",
    "text_embeddings",
    "user_to_item_pairs",
]
