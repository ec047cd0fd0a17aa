"""Rewards: duration-aware shaping of play times, and reward functions with TRL's signature."""

from .duration import duration_aware_advantages, duration_buckets, play_time_percentiles
from .functions import (
    FormatReward,
    HitReward,
    IndustrialReward,
    ModelReward,
    WeightedSum,
    completion_leaves,
    is_legal,
    select_for_format,
)

__all__ = [
    "FormatReward",
    "HitReward",
    "IndustrialReward",
    "ModelReward",
    "WeightedSum",
    "completion_leaves",
    "duration_aware_advantages",
    "duration_buckets",
    "is_legal",
    "play_time_percentiles",
    "select_for_format",
]
