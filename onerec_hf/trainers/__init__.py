"""Trainers: supervised (SFT) on `transformers.Trainer`, reinforcement learning on TRL's `GRPOTrainer`."""

from .balance import ExpertBalanceCallback
from .exposures import feedback_exposures, rejection_sample
from .grpo import OneRecGRPOTrainer
from .grpo_config import OneRecGRPOConfig
from .sft import OneRecSFTConfig, OneRecSFTTrainer

__all__ = [
    "ExpertBalanceCallback",
    "OneRecGRPOConfig",
    "OneRecGRPOTrainer",
    "OneRecSFTConfig",
    "OneRecSFTTrainer",
    "feedback_exposures",
    "rejection_sample",
]
