"""What the models with a head return."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import ModelOutput


@dataclass
class SemanticIdCausalLMOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape (1,)): Negative log-probability of the codes, in nats (`config.loss_reduction`).
        logits (`torch.FloatTensor` of shape (R, C, vocab_size)): Scores of the next token; everything outside the level that
            comes next is the lowest finite number, so a softmax over the vocabulary is the softmax over the level.
        target_log_probs (`torch.FloatTensor` of shape (B, n, L)): Log-probability of each code of each target, in nats; with
            `labels` of shape (R, items, L), one row per row of `input_ids`.
        router_logits (`tuple[torch.FloatTensor]`): With `output_router_logits=True`, one (tokens, experts) tensor per mixture.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    target_log_probs: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def recorded(outputs: ModelOutput) -> dict[str, tuple[torch.Tensor, ...] | None]:
    """What a base model was asked to record, under the names of [`SemanticIdCausalLMOutput`]."""
    names = ("hidden_states", "attentions", "cross_attentions", "router_logits")
    return {name: outputs.get(name) for name in names}


__all__ = ["SemanticIdCausalLMOutput", "recorded"]
