"""Rows of a split -> batches of tensors: one collator per system, each saves and loads itself."""

from .loading import collator_of
from .onerec_collator import OneRecCollator, SessionCollator
from .pathway_collator import PathwayCollator
from .reward_collator import RewardCollator

__all__ = ["OneRecCollator", "PathwayCollator", "RewardCollator", "SessionCollator", "collator_of"]
