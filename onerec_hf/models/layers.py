"""Blocks that the OneRec models share: attention over a shared context, self-attention, feed-forward, encoder and decoder blocks.

OneRec Technical Report, section 2.2 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T context
positions, R = B * m rows (m targets, beams or samples per user, rows of one user adjacent), C target tokens, D width, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass
class ContextKV(ModelOutput):
    """
    Keys and values of the context, made once per user and shared by all rows of that user.

    It is one object and not a tensor, so `generate` neither repeats it per beam nor reorders it.

    Args:
        key_states (`tuple[torch.FloatTensor]`): One (B, H_kv, T, head_dim) tensor per key/value set.
        value_states (`tuple[torch.FloatTensor]`): As `key_states`; the same tensors where keys and values are shared.
        mask (`torch.BoolTensor` of shape (B, T)): True for real positions, which include the leading static slot.
    """

    key_states: tuple[Tensor, ...] | None = None
    value_states: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None


def eager_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling + mask) v, written out; the reference for every other attention implementation."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros_like(attention_mask, dtype=weights.dtype).masked_fill(
                ~attention_mask, torch.finfo(weights.dtype).min
            )
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class KeyValueProjection(nn.Module):
    """One set of keys and values of a sequence of hidden states: (B, T, D) -> two of (B, H_kv, T, head_dim)."""

    def __init__(self, config: Any, num_key_value_heads: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.k_proj = nn.Linear(config.hidden_size, num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, num_key_value_heads * config.head_dim, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        key, value = (proj(hidden_states).view(shape).transpose(1, 2) for proj in (self.k_proj, self.v_proj))
        return key, value


class MultiHeadAttention(KeyValueProjection):
    """Attention with grouped key/value heads; subclasses say whether it is causal, and are what `output_attentions` records."""

    is_causal = False

    def __init__(self, config: Any, layer_idx: int):
        super().__init__(config, config.num_key_value_heads)
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        attended_states: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """(R, C, D) -> (R, C, D) and weights; keys and values come from `attended_states` (R, T, D) where given."""
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (R, H, C, head_dim)
        key, value = super().forward(hidden_states if attended_states is None else attended_states)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights


class SelfAttention(MultiHeadAttention):
    """Causal, over the tokens of a target."""

    is_causal = True


class EncoderAttention(MultiHeadAttention):
    """Fully visible, over the positions of a context."""


class ContextAttention(nn.Module):
    """
    Attention of the rows of a user to that user's context: query and output projections only, the context owns keys and values.

    It is not causal, so the m rows of a user and the query heads that share a key/value head are folded into the query
    length: keys and values stay (B, H_kv, T, head_dim), copied for neither.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.is_causal = config, False
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_context_key_value_heads
        self.num_key_value_groups = 1  # the groups are folded here, nothing is left to repeat
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **kwargs
    ) -> tuple[Tensor, Tensor]:
        rows, length, _ = hidden_states.shape
        batch, heads = key.shape[:2]
        query = self.q_proj(hidden_states).view(batch, rows // batch * length, heads, self.groups, self.head_dim)
        query = query.permute(0, 2, 3, 1, 4).reshape(
            batch, heads, -1, self.head_dim
        )  # (B, H_kv, groups * m * C, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, is_causal=False, **kwargs
        )  # (B, groups * m * C, H_kv, head_dim)
        output = output.view(batch, self.groups, -1, heads, self.head_dim).permute(0, 2, 3, 1, 4)
        return self.o_proj(output.reshape(rows, length, -1)), weights


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)), or, without a gate, down(silu(up(x)))."""

    def __init__(self, hidden_size: int, intermediate_size: int, gated: bool):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False) if gated else None
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        up = self.up_proj(hidden_states)
        return self.down_proj(F.silu(up) if self.gate_proj is None else F.silu(self.gate_proj(hidden_states)) * up)


class EncoderLayer(GradientCheckpointingLayer):
    """Technical Report, section 2.2.2: self-attention over everything, then `mlp` (dense or a mixture), pre-normed and residual."""

    def __init__(self, config: Any, layer_idx: int, mlp: nn.Module):
        super().__init__()
        self.self_attn = EncoderAttention(config, layer_idx)
        self.mlp = mlp
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class DecoderLayer(GradientCheckpointingLayer):
    """
    Causal self-attention and attention to the context, then `mlp` (dense or a mixture), each pre-normed and residual.

    The Technical Report (section 2.2.3) attends to the target's own tokens first, OneRec-V2 (section 2.2.3) to the context first.
    """

    context_first = False

    def __init__(self, config: Any, layer_idx: int, mlp: nn.Module, context_set: int):
        super().__init__()
        self.context_set = context_set  # which of the context's key/value sets this block reads
        self.cross_attn = ContextAttention(config)
        self.self_attn = SelfAttention(config, layer_idx)
        self.mlp = mlp
        self.cross_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        context_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **kwargs,
    ) -> Tensor:
        if self.context_first:
            hidden_states = self._attend_to_context(hidden_states, key, value, context_mask, **kwargs)
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        if not self.context_first:
            hidden_states = self._attend_to_context(hidden_states, key, value, context_mask, **kwargs)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))

    def _attend_to_context(self, hidden_states, key, value, context_mask, **kwargs):
        attended, _ = self.cross_attn(self.cross_attn_norm(hidden_states), key, value, context_mask, **kwargs)
        return hidden_states + self.dropout(attended)


class PositionRMSNorm(nn.Module):
    """OneRec-V2, section 2.2.3, output: an RMSNorm with weights of its own for every position of the semantic ID."""

    def __init__(self, num_levels: int, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_levels, hidden_size))
        self.eps = eps

    def forward(self, hidden_states: Tensor, levels: Tensor) -> Tensor:
        weight = self.weight[levels.clamp(max=len(self.weight) - 1)]
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps) * weight


class LevelHead(nn.Linear):
    """The output head, rows [specials | level 1 | ... | level L]; with `rows`, the scores of these rows alone."""

    def forward(self, hidden_states: Tensor, rows: slice = slice(None)) -> Tensor:
        # in its own forward, so that whoever moves or gathers weights before a module runs (offload, FSDP) sees the slice too
        return F.linear(hidden_states, self.weight[rows])


__all__ = [
    "ContextAttention",
    "ContextKV",
    "DecoderLayer",
    "EncoderAttention",
    "EncoderLayer",
    "FeedForward",
    "KeyValueProjection",
    "LevelHead",
    "PositionRMSNorm",
    "SelfAttention",
]
