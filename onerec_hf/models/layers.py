"""Blocks that the OneRec models share: attention over a shared context, causal self-attention, SwiGLU.

OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T context items, R = B * m rows (m targets, beams or samples per
user, rows of one user adjacent), C target tokens, D width, H heads.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
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

    key_states: tuple[torch.FloatTensor, ...] | None = None
    value_states: tuple[torch.FloatTensor, ...] | None = None
    mask: torch.BoolTensor | None = None


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """softmax(q k^T * scaling + mask) v, written out; the reference for every other attention implementation."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SelfAttention(nn.Module):
    """Causal self-attention over the few tokens of one target, with grouped key/value heads."""

    def __init__(self, config, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)  # (R, H, C, head_dim)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:2], -1)), weights


class ContextAttention(nn.Module):
    """
    Attention of the rows of a user to that user's context: query and output projections only ("lazy", section 2.2.3).

    It is not causal, so the m rows of a user and the query heads that share a key/value head are folded into the query
    length: keys and values stay (B, H_kv, T, head_dim), copied for neither.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.is_causal = config, False
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_context_key_value_heads
        self.num_key_value_groups = 1  # the groups are folded here, nothing is left to repeat
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, hidden_states, key, value, attention_mask=None, **kwargs):
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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, hidden_states):
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


def age_buckets(age: torch.Tensor, num_buckets: int, max_distance: int) -> torch.Tensor:
    """
    Bucket of the age of a context item: exact up to half of the buckets, then logarithmic, as T5 does (arXiv:1910.10683).

    Args:
        age (`torch.LongTensor` of any shape): 1 for the item right before the target; 0 for the static slot.

    Returns:
        `torch.LongTensor` of the same shape, values 0 to `num_buckets - 1`.
    """
    exact = num_buckets // 2
    ratio = torch.log(age.clamp(min=exact).float() / exact) / torch.log(torch.tensor(max_distance / exact))
    large = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(age < exact, age.clamp(min=0), large.clamp(max=num_buckets - 1))


__all__ = ["ContextAttention", "ContextKV", "SelfAttention", "SwiGLU", "age_buckets", "eager_attention_forward"]
