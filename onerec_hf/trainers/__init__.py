"""Trainers: supervised (SFT) and Iterative Preference Alignment (IPA) on `transformers.Trainer`; LoRA defaults of the models."""

from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

from .balance import ExpertBalanceCallback
from .ipa import IPATrainer
from .ipa_config import IPAConfig
from .sft import OneRecSFTConfig, OneRecSFTTrainer

# What a `LoraConfig` without `target_modules` adapts. OneRec-V2's `item_proj` makes the keys and values of its context.
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.update(
    {"onerec": _ATTENTION, "onerec_v1": _ATTENTION, "onerec_v2": [*_ATTENTION, "item_proj"]}
)

__all__ = ["ExpertBalanceCallback", "IPAConfig", "IPATrainer", "OneRecSFTConfig", "OneRecSFTTrainer"]
