"""OneRec-V2 (arXiv:2508.20900, section 2.2): context processor and lazy decoder.

Legend: B users, T context items, L levels, R = B * m rows (m targets, beams or samples of a user, adjacent), C decoder tokens,
D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin

from .configuration_onerec import OneRecV2Config
from .input_checks import check_range, checked_context
from .layers import ContextKV, DecoderLayer, FeatureEmbedding, age_buckets
from .modeling_semantic_id import SemanticIdMixin, SemanticIdModel, SemanticIdPreTrainedModel


class KeyValueRMSNorm(nn.RMSNorm):
    """An RMSNorm that keeps the type of what it is given: under autocast, every block would narrow float32 keys again."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)


class OneRecV2ContextProcessor(nn.Module):
    """
    Section 2.2.2: every context item becomes one vector of width S_kv * L_kv * G_kv * head_dim, whose slices are, after an
    RMSNorm and nothing else, the keys and values of the decoder.

    In front stands one static slot (the paper's N_s): a learned vector plus the user features; a user without history has this
    slot alone. An item is the concatenation of its code and feature embeddings under one linear map, which is what the FLOPs of
    the paper's Table 3 imply.
    """

    def __init__(self, config: OneRecV2Config):
        super().__init__()
        self.config = config
        dim = config.context_embed_dim
        self.split = config.context_key_value_split
        width = self.split * config.num_context_layers * config.num_context_key_value_heads * config.head_dim
        self.embed_codes = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.embed_features = FeatureEmbedding(
            config.context_features, config, "context_features", config.fixed_context_features
        )
        self.embed_user = FeatureEmbedding(config.user_features, config, "user_features")
        self.item_proj = nn.Linear(config.num_levels * dim + self.embed_features.width, width, bias=False)
        self.user_proj = nn.Linear(self.embed_user.width, width, bias=False) if config.user_features else None
        self.static_slot = nn.Embedding(1, width)
        self.dropout = nn.Dropout(config.context_dropout)
        norm_width = config.num_context_key_value_heads * config.head_dim
        self.key_norm = nn.ModuleList(
            [KeyValueRMSNorm(norm_width, eps=config.rms_norm_eps) for _ in range(config.num_context_layers)]
        )
        self.value_norm = nn.ModuleList(
            [
                KeyValueRMSNorm(norm_width, eps=config.rms_norm_eps)
                for _ in range(config.num_context_layers if self.split == 2 else 0)
            ]
        )

    def forward(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> ContextKV:
        context_mask = checked_context(self.config, context_ids, context_mask)
        codes = self.embed_codes(context_ids).flatten(2)  # (B, T, L * dim)
        items = torch.cat([codes, *self.embed_features(context_features, context_ids.shape[:2])], dim=-1)
        items = self.item_proj(self.dropout(items))  # (B, T, width)
        static = self.static_slot(context_ids.new_zeros(context_ids.shape[0], 1))
        user = self.embed_user(user_features, context_ids.shape[:1])
        if self.user_proj is not None:
            static = static + self.user_proj(self.dropout(torch.cat(user, dim=-1))).unsqueeze(1)
        # autocast: an embedding is float32, a product is not, and so many vectors are better not made wider
        context = torch.cat([static.to(items.dtype), items], dim=1)  # (B, 1 + T, width)
        slices = context.unflatten(2, (self.config.num_context_layers * self.split, -1)).unbind(2)
        keys = tuple(self._heads(norm(slices[i * self.split])) for i, norm in enumerate(self.key_norm))
        values = keys
        if self.split == 2:
            values = tuple(self._heads(norm(slices[2 * i + 1])) for i, norm in enumerate(self.value_norm))
        return ContextKV(key_states=keys, value_states=values, mask=F.pad(context_mask, (1, 0), value=True))

    def _heads(self, states):
        return states.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)  # (B, G_kv, 1 + T, head_dim)


class OneRecV2LazyDecoderLayer(DecoderLayer):
    """Section 2.2.3: cross-attention first, then causal self-attention, then the feed-forward or the experts."""

    context_first = True


class OneRecV2PreTrainedModel(SemanticIdPreTrainedModel):
    config: OneRecV2Config
    _no_split_modules = ["OneRecV2LazyDecoderLayer", "OneRecV2ContextProcessor"]


class OneRecV2Model(OneRecV2PreTrainedModel, SemanticIdModel):
    """The context processor and the lazy decoder, without a head."""

    decoder_layer_class = OneRecV2LazyDecoderLayer

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.context_processor = OneRecV2ContextProcessor(config)
        self.build_decoder(config.num_context_layers, num_norms=config.num_levels)
        buckets = config.position_bias_buckets
        self.position_bias = nn.Embedding(buckets, config.num_attention_heads) if buckets else None
        self.post_init()

    def cross_attention_mask(
        self, context_kv: ContextKV, rows: int, length: int, target_positions: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Additive mask (B, H_kv, groups * m * C, 1 + T): padding, items a target must not see yet, and the bias over ages."""
        mask = context_kv.mask
        batch, heads = mask.shape[0], self.config.num_context_key_value_heads
        order = mask.long().cumsum(1) - 1  # (B, 1 + T) 0 is the static slot, 1.. the items in time order
        if target_positions is None:
            seen = order[:, -1:]  # (B, 1): every row sees every item
        else:
            if target_positions.numel() != rows:
                raise ValueError(
                    f"target_positions has shape {tuple(target_positions.shape)}: expected one number for each of the {rows} rows."
                )
            check_range(
                "target_positions", target_positions, mask.shape[1], "It counts the history items a target sees."
            )
            seen = target_positions.view(batch, rows // batch)  # (B, m)
        age = seen.unsqueeze(2) + 1 - order.unsqueeze(1)  # (B, m, 1 + T), 1 is the most recent item
        static = order.unsqueeze(1) == 0
        visible = mask.unsqueeze(1) & ((age > 0) | static)
        lowest = torch.finfo(dtype).min
        if self.position_bias is None:
            bias = (
                torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest).unsqueeze(1)
            )  # (B, 1, m, 1 + T)
        else:
            bucket = age_buckets(
                age.masked_fill(static, 0), self.config.position_bias_buckets, self.config.position_bias_max_distance
            )
            bias = self.position_bias(bucket).to(dtype).masked_fill(~visible.unsqueeze(3), lowest).permute(0, 3, 1, 2)
        if bias.shape[1] == heads or bias.shape[1] == 1:  # no grouped heads (or no bias): one mask for all groups
            groups = self.config.num_attention_heads // heads
            if bias.shape[2] == 1:
                return bias  # the same for every query
            bias = bias.unsqueeze(2).unsqueeze(4).expand(-1, -1, groups, -1, length, -1)
        else:
            bias = bias.unflatten(1, (heads, -1)).unsqueeze(4).expand(-1, -1, -1, rows // batch, length, -1)
        return bias.flatten(2, 4)


class OneRecV2ForCausalLM(SemanticIdMixin, OneRecV2PreTrainedModel, GenerationMixin):
    """
    OneRec-V2 with its head: `forward` trains, `generate` recommends.

    `lm_head` is one linear map whose rows are [specials | level 1 | ... | level L]; the paper's position-specific head is the
    slice of the level (section 2.2.3).
    """

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.model = OneRecV2Model(config)
        self.build_head()


__all__ = ["OneRecV2ForCausalLM", "OneRecV2Model", "OneRecV2PreTrainedModel"]
