"""Rewards: duration-aware shaping of play times, and reward functions with TRL's signature."""

from .candidates import CandidateCollator, ModelReward, reward_of_model
from .duration import duration_aware_advantages, duration_buckets, play_time_percentiles
from .functions import (
    FormatReward,
    HitReward,
    IndustrialReward,
    completion_leaves,
    finite_or_none,
    is_legal,
    select_for_format,
)
from .reward_model import RewardModel
from .spelled import spelled_items

__all__ = [
    "CandidateCollator",
    "FormatReward",
    "HitReward",
    "IndustrialReward",
    "ModelReward",
    "RewardModel",
    "completion_leaves",
    "duration_aware_advantages",
    "duration_buckets",
    "finite_or_none",
    "is_legal",
    "play_time_percentiles",
    "reward_of_model",
    "select_for_format",
    "spelled_items",
]
