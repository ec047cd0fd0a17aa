"""Trainers: supervised (SFT), iterative preference alignment (IPA), reinforcement learning (GRPO, ECPO, GBPO); LoRA
defaults.
"""

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from .base import ExpertBalanceCallback, OneRecTrainer
from .exposures import feedback_exposures, rejection_sample
from .grpo import OneRecGRPOTrainer
from .grpo_config import OneRecGRPOConfig
from .ipa import IPATrainer
from .ipa_config import IPAConfig
from .pair_files import load_pairs
from .resume import ResumableTrainer, StopAtNonFinite
from .sft import OneRecSFTConfig, OneRecSFTTrainer

# What a `LoraConfig` without `target_modules` adapts. OneRec-V2's `item_proj` makes the keys and values of its
# context.
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.update(
    {"onerec": _ATTENTION, "onerec_v1": _ATTENTION, "onerec_v2": [*_ATTENTION, "item_proj"]}
)

__all__ = [
    "ExpertBalanceCallback",
    "IPAConfig",
    "IPATrainer",
    "OneRecGRPOConfig",
    "OneRecGRPOTrainer",
    "OneRecSFTConfig",
    "OneRecSFTTrainer",
    "OneRecTrainer",
    "ResumableTrainer",
    "StopAtNonFinite",
    "feedback_exposures",
    "load_pairs",
    "rejection_sample",
]
