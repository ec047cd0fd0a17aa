"""Trainers: supervised (SFT) on `transformers.Trainer`."""

from .sft import OneRecSFTConfig, OneRecSFTTrainer

__all__ = ["OneRecSFTConfig", "OneRecSFTTrainer"]
