"""Trainers: supervised (SFT) on `transformers.Trainer`."""

from .balance import ExpertBalanceCallback
from .sft import OneRecSFTConfig, OneRecSFTTrainer

__all__ = ["ExpertBalanceCallback", "OneRecSFTConfig", "OneRecSFTTrainer"]
