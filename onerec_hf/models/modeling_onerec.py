"""OneRec (arXiv:2502.18965, section 3): a bidirectional encoder over the behaviours, a decoder that writes a whole session.

Legend: B users, T context items, S encoder positions, L levels, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.generation import GenerationMixin

from .configuration_onerec import OneRecConfig
from .input_checks import checked_context
from .layers import (
    ContextKV,
    EncoderLayer,
    FeatureEmbedding,
    FeedForward,
    KeyValueProjection,
    item_ages,
)
from .modeling_semantic_id import SemanticIdMixin, SemanticIdModel, SemanticIdPreTrainedModel
from .moe import SparseMoE


class OneRecContextEmbedding(nn.Module):
    """
    Section 3.1: the behaviour sequence as encoder input (B, S, D) and its mask (B, S).

    In front stands one static slot, a learned vector plus the user features. An item is one token per code
    (`config.context_tokens="code"`), each with the item's features and position added, or one token.
    """

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.config = config
        dim, width = config.context_embed_dim, config.hidden_size
        self.embed_codes = nn.Embedding(config.vocab_size, dim, config.pad_token_id)
        self.embed_features = FeatureEmbedding(config.context_features, config, "context_features")
        self.embed_user = FeatureEmbedding(config.user_features, config, "user_features")
        codes = dim if config.context_tokens == "code" else config.num_levels * dim
        self.code_proj = nn.Linear(codes, width, bias=False)
        features, user = self.embed_features.width, self.embed_user.width
        self.feature_proj = nn.Linear(features, width, bias=False) if features else None
        self.user_proj = nn.Linear(user, width, bias=False) if user else None
        self.static_slot = nn.Embedding(1, width)
        self.embed_ages = nn.Embedding(config.max_context_items, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = checked_context(self.config, context_ids, context_mask)
        codes = self.embed_codes(context_ids)  # (B, T, L, dim)
        if self.config.context_tokens == "item":
            codes = codes.flatten(2).unsqueeze(2)  # (B, T, 1, L * dim)
        tokens = self.code_proj(self.dropout(codes))  # (B, T, L or 1, D)
        shared = self.embed_ages((item_ages(mask) - 1).clamp(max=self.config.max_context_items - 1))
        features = self.embed_features(context_features, context_ids.shape[:2])
        if self.feature_proj is not None:
            shared = shared + self.feature_proj(self.dropout(torch.cat(features, dim=-1)))
        tokens = tokens + shared.unsqueeze(2)
        mask = mask.repeat_interleave(tokens.shape[2], dim=1)
        static = self.static_slot(context_ids.new_zeros(context_ids.shape[0], 1))
        user = self.embed_user(user_features, context_ids.shape[:1])
        if self.user_proj is not None:
            static = static + self.user_proj(self.dropout(torch.cat(user, dim=-1))).unsqueeze(1)
        return torch.cat([static, tokens.flatten(1, 2)], dim=1), F.pad(mask, (1, 0), value=True)


class OneRecContextEncoder(nn.Module):
    """Technical Report, section 2.2.2: blocks of full self-attention; then keys and values for every block of the decoder."""

    def __init__(self, config: Any, embedding: nn.Module, moe: bool = False):
        super().__init__()
        self.embedding = embedding
        self.layers = nn.ModuleList(
            [
                EncoderLayer(
                    config,
                    layer,
                    SparseMoE(config)
                    if moe and config.is_moe_layer(layer)
                    else FeedForward(config.hidden_size, config.intermediate_size, config.gated_mlp),
                )
                for layer in range(config.num_encoder_layers)
            ]
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        heads = config.num_context_key_value_heads
        self.key_values = nn.ModuleList([KeyValueProjection(config, heads) for _ in range(config.num_hidden_layers)])

    def forward(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        **kwargs,
    ) -> ContextKV:
        hidden_states, mask = self.embedding(context_ids, context_mask, context_features, user_features)
        visible = mask[:, None, None]  # (B, 1, 1, S)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask=visible, **kwargs)
        hidden_states = self.norm(hidden_states)
        keys, values = zip(*(projection(hidden_states) for projection in self.key_values))
        return ContextKV(key_states=keys, value_states=values, mask=mask)


class OneRecPreTrainedModel(SemanticIdPreTrainedModel):
    config: OneRecConfig


class OneRecModel(OneRecPreTrainedModel, SemanticIdModel):
    """Encoder and session decoder, without a head. Decoder input: BOS and the codes of every item of the session (section 3.2)."""

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.context_processor = OneRecContextEncoder(config, OneRecContextEmbedding(config))
        self.build_decoder(config.num_hidden_layers)
        self.embed_positions = nn.Embedding(config.num_session_items * (config.num_levels + 1), config.hidden_size)
        self.post_init()


class OneRecForCausalLM(SemanticIdMixin, OneRecPreTrainedModel, GenerationMixin):
    """OneRec with its head: `forward` trains on sessions, `generate` writes sessions of `config.num_session_items` items."""

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.model = OneRecModel(config)
        self.build_head()
        self.num_items = config.num_session_items
        self.generation_config.max_new_tokens = self.num_items * (config.num_levels + 1) - 1


__all__ = ["OneRecContextEncoder", "OneRecForCausalLM", "OneRecModel", "OneRecPreTrainedModel"]
