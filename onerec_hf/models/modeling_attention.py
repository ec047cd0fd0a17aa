"""Attention to a context that many rows share, what orders its items, and self-attention.

OneRec Technical Report, section 2.3 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T
context positions, R = B * m rows (m targets, beams or samples per user, rows of one user adjacent), C target tokens, D
width, H heads, n targets (or candidates) of a user.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .input_checks import check_range


@dataclass
class ContextKV(ModelOutput):
    """
    Keys and values of the context, made once per user and shared by all rows of that user.

    It is one object and not a tensor, so `generate` neither repeats it per beam nor reorders it.

    Args:
        key_states (`tuple[torch.FloatTensor]`): One (B, H_kv, T, head_dim) tensor per key/value set.
        value_states (`tuple[torch.FloatTensor]`): As `key_states`; the same tensors where keys and values are shared,
            unless keys are turned by a rotary position.
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
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if kwargs.get("is_causal") and attention_mask is None:
        attention_mask = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
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
    """Attention with grouped key/value heads; subclasses say whether it is causal, and are what `output_attentions`
    records.
    """

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
    Attention of the rows of a user to that user's context: query and output projections only, the context owns keys
    and values.

    All tokens of a row see the same keys, and so do all rows of a user unless each has a place of its own in the
    history. What sees the same keys is folded together, and keys and values stay (B, H_kv, T, head_dim), copied for
    nobody:

    - all rows see the whole context: rows and grouped query heads fold into the query length, without a mask;
    - row i sees the first i + 1 positions (`causal_context`: every next item of a history is a target): tokens fold
      into the query heads, and what is left is *causal* grouped-query attention of T queries over T keys, which every
      fused kernel knows; right padding needs no mask, since no real query sees it.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.config, self.is_causal = config, False
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_context_key_value_heads
        self.num_key_value_groups = 1  # query heads for each key/value head that are left to the attention function
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        rotation: tuple[Tensor, Tensor] | None = None,
        causal_context: bool = False,
        **kwargs,
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            hidden_states (`torch.FloatTensor` of shape (R, C, D)): R = B * m rows.
            key, value (`torch.FloatTensor` of shape (B, H_kv, T, head_dim)): Of the context. Keys may be wider, by
                the channels of [`with_padding_channels`].
            attention_mask (`torch.Tensor`, *optional*): Broadcastable to (B, H_kv, groups * m * C, T).
            rotation (`tuple`, *optional*): Of [`ContextRotary`], (B, m, head_dim) each: the place of every row.
            causal_context (`bool`): m = T, and row i of a user sees the positions 0 to i.

        Returns:
            (R, C, D), and the weights of the attention function.
        """
        rows, length, _ = hidden_states.shape
        batch, heads, positions, width = key.shape
        query = self.q_proj(hidden_states).view(batch, -1, length, heads, self.groups, self.head_dim)
        if rotation is not None:
            query = rotate(query, *(part[:, :, None, None, None] for part in rotation))
        if causal_context:  # (B, H_kv * C * groups, T, head_dim)
            query = query.permute(0, 3, 2, 4, 1, 5).reshape(batch, -1, positions, self.head_dim)
        else:  # (B, H_kv, groups * m * C, head_dim)
            query = query.permute(0, 3, 4, 1, 2, 5).reshape(batch, heads, -1, self.head_dim)
        if width > self.head_dim:
            query = F.pad(F.pad(query, (0, 1), value=1.0), (0, width - self.head_dim - 1))
        self.num_key_value_groups = query.shape[1] // heads
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, is_causal=causal_context, **kwargs
        )
        output = output[..., : self.head_dim]
        if causal_context:  # (B, T, H_kv * C * groups, head_dim)
            output = output.view(batch, positions, heads, length, self.groups, self.head_dim).transpose(2, 3)
        else:  # (B, groups * m * C, H_kv, head_dim)
            output = output.view(batch, self.groups, -1, heads, self.head_dim).permute(0, 2, 3, 1, 4)
        return self.o_proj(output.reshape(rows, length, -1)), weights


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` (..., head_dim), turned by the angles whose cosine and sine are given."""
    low, high = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-high, low], dim=-1) * sin


class ContextRotary(nn.Module):
    """
    Rotary positions (RoPE, arXiv:2104.09864) of a history: an attention score depends on query, key and the age of
    the item, and no mask is needed that says how old an item is.

    A key is turned back by its age as the row sees it that sees everything; the query of a row that sees fewer items
    is turned back by as many. So a search, whose rows see everything, turns no query.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.width, self.theta = config.head_dim, config.context_rope_theta

    def forward(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Places (...), in items, to cosines and sines (..., head_dim)."""
        # made anew each time: a buffer that is not saved would have to be made again after every kind of loading
        order = torch.arange(0, self.width, 2, device=places.device, dtype=torch.float32)
        angles = places.float().unsqueeze(-1) * self.theta ** (-order / self.width)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def with_padding_channels(context_kv: ContextKV) -> ContextKV:
    """
    The same context with 8 channels more in keys and values, the first of which says what is padding: against a query
    whose first extra channel is 1, the score of a padded key is the lowest.

    So a padded context needs no mask, and a fused kernel that takes none, whose widths are multiples of 8, serves it.
    """
    keys = []
    for key in context_kv.key_states:
        lowest = torch.finfo(key.dtype).min / 2  # a score stays finite
        channel = torch.zeros_like(key[..., :1]).masked_fill(~context_kv.mask[:, None, :, None], lowest)
        keys.append(F.pad(torch.cat([key, channel], dim=-1), (0, 7)))
    values = tuple(F.pad(value, (0, 8)) for value in context_kv.value_states)
    return ContextKV(key_states=tuple(keys), value_states=values, mask=context_kv.mask)


def item_ages(mask: Tensor) -> Tensor:
    """Age of every item of a history (B, T), oldest first: 1 for the most recent one; wherever the padding stands."""
    order = mask.long().cumsum(1)
    return (order[:, -1:] + 1 - order).clamp(min=1)


def age_buckets(age: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """
    Bucket of the age of a context item: exact up to half of the buckets, then logarithmic, as T5 does
    (arXiv:1910.10683).

    Args:
        age (`torch.LongTensor` of any shape): 1 for the item right before the target; 0 for the static slot.

    Returns:
        `torch.LongTensor` of the same shape, values 0 to `num_buckets - 1`.
    """
    exact = num_buckets // 2
    ratio = torch.log(age.clamp(min=exact).float() / exact) / torch.log(torch.tensor(max_distance / exact))
    large = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(age < exact, age.clamp(min=0), large.clamp(max=num_buckets - 1))


def visible_ages(
    mask: Tensor, target_positions: Tensor | None, num_targets: int, name: str = "rows"
) -> tuple[Tensor, Tensor]:
    """
    What each target sees of a context whose first position is the static slot.

    Args:
        mask (`torch.BoolTensor` of shape (B, 1 + T)): True for real positions.
        target_positions (`torch.LongTensor` of B * n numbers, *optional*): History items each target may see; default
            all, for every target alike.
        num_targets (`int`): n, read where `target_positions` is given.

    Returns:
        Ages, `torch.LongTensor` of shape (B, n or 1, 1 + T): 1 for the most recent item a target sees, 0 for the
        static slot; and which positions it sees, `torch.BoolTensor` of the same shape.
    """
    order = mask.long().cumsum(1) - 1  # 0 is the static slot, 1.. the items in time order
    if target_positions is None:
        seen = order[:, -1:]
    else:
        if target_positions.numel() != len(mask) * num_targets:
            raise ValueError(
                f"target_positions has shape {tuple(target_positions.shape)}: expected one number for each of the "
                f"{len(mask) * num_targets} {name}."
            )
        check_range("target_positions", target_positions, mask.shape[1], "It counts the history items a target sees.")
        seen = target_positions.reshape(len(mask), num_targets)
    age = seen.unsqueeze(2) + 1 - order.unsqueeze(1)
    static = order.unsqueeze(1) == 0
    return age.masked_fill(static, 0), mask.unsqueeze(1) & ((age > 0) | static)


class AgeBias(nn.Embedding):
    """A learned number per head and bucket of ages, added to the attention scores: ages (...) -> (..., H). Starts at
    0.
    """

    def __init__(self, config: Any):
        super().__init__(config.position_bias_buckets, config.num_attention_heads)
        self.max_distance = config.position_bias_max_distance

    def forward(self, age: Tensor) -> Tensor:
        return super().forward(age_buckets(age, self.num_embeddings, self.max_distance))


def padding_mask(context_kv: ContextKV) -> Tensor:
    """Additive mask (B, 1, 1, T) of a context that every row of a user sees whole."""
    dtype = context_kv.key_states[0].dtype
    mask = context_kv.mask[:, None, None]
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = [
    "AgeBias",
    "ContextAttention",
    "ContextKV",
    "ContextRotary",
    "EncoderAttention",
    "KeyValueProjection",
    "SelfAttention",
    "age_buckets",
    "item_ages",
    "padding_mask",
    "rotate",
    "visible_ages",
    "with_padding_channels",
]
