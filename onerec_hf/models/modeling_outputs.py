"""What the models with a head return."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, ModelOutput

# transformers 5.24 renamed `past_key_values`; our forwards take both names, and give each version the one that it reads
CACHE = "cache" if "cache" in CausalLMOutputWithCrossAttentions.__dataclass_fields__ else "past_key_values"


@dataclass
class SemanticIdCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """
    Args:
        loss (`torch.FloatTensor` of shape (1,)): Negative log-probability of the codes, in nats (`config.loss_reduction`).
        logits (`torch.FloatTensor` of shape (R, C, vocab_size)): Scores of the next token; everything outside the level that
            comes next is the lowest finite number, so a softmax over the vocabulary is the softmax over the level.
        target_log_probs (`torch.FloatTensor` of shape (B, n, L)): Log-probability of each code of each target, in nats; with
            `labels` of shape (R, items, L), one row per row of `input_ids`.
        router_logits (`tuple[torch.FloatTensor]`): With `output_router_logits=True`, one (tokens, experts) tensor per mixture.
    """

    target_log_probs: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def recorded(outputs: ModelOutput) -> dict[str, Any]:
    """What a base model was asked to record, under the names of [`SemanticIdCausalLMOutput`]."""
    names = ("hidden_states", "attentions", "cross_attentions", "router_logits")
    return {name: outputs.get(name) for name in names}


def given_cache(past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The cache, under the one or the other name of transformers; taken out of `kwargs`."""
    cache = kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names for one thing: give one of them.")
    return past_key_values if cache is None else cache


__all__ = ["CACHE", "SemanticIdCausalLMOutput", "given_cache", "recorded"]
