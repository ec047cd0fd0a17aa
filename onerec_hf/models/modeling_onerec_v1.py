"""OneRecV1, the OneRec Technical Report (arXiv:2506.13695, section 2.2): four pathways, an encoder, a point-wise decoder.

Legend: B users, T context items of all pathways, L levels, N_q lifelong queries, D width.
"""

import torch
from torch import nn
from transformers.generation import GenerationMixin

from .configuration_onerec import OneRecV1Config
from .input_checks import checked_context
from .layers import EncoderAttention, FeatureEmbedding, FeedForward, item_ages
from .modeling_onerec import OneRecContextEncoder
from .modeling_semantic_id import SemanticIdMixin, SemanticIdModel, SemanticIdPreTrainedModel


class DenseLeakyDense(nn.Module):
    """h = Dense(LeakyReLU(Dense(f))) of section 2.2.1; the hidden width, which the report leaves out, is d_model."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.up_proj = nn.Linear(input_size, hidden_size)
        self.down_proj = nn.Linear(hidden_size, hidden_size)
        self.act_fn = nn.LeakyReLU()

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(features)))


class LifelongQFormerLayer(nn.Module):
    """h <- CrossAttn(h, v, v); h <- FFN(RMSNorm(h)) (section 2.2.1), with residual connections unless the config says no."""

    def __init__(self, config: OneRecV1Config):
        super().__init__()
        self.residual = config.lifelong_residual
        self.cross_attn = EncoderAttention(config, layer_idx=0)
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size, config.gated_mlp)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, queries: torch.Tensor, items: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attended, _ = self.cross_attn(queries, mask, attended_states=items)
        queries = queries + attended if self.residual else attended
        output = self.mlp(self.mlp_norm(queries))
        return queries + output if self.residual else output


class OneRecV1PathwayEmbedding(nn.Module):
    """
    Section 2.2.1: [h_u; h_s; h_p; h_l] + e_pos, (B, 1 + L_s + L_p + N_q, D), and its mask.

    `context_ids` holds the pathways side by side: `short_term_length` + `positive_length` + `lifelong_length` items, each padded to
    that length. Code and feature embeddings are shared by the pathways, the dense maps are not.
    """

    def __init__(self, config: OneRecV1Config):
        super().__init__()
        self.config = config
        width = config.hidden_size
        self.embed_codes = nn.Embedding(config.vocab_size, config.code_embed_dim, config.pad_token_id)
        self.embed_features = FeatureEmbedding(config.context_features, config, "context_features")
        self.embed_user = FeatureEmbedding(config.user_features, config, "user_features")
        item = config.num_levels * config.code_embed_dim + self.embed_features.width
        self.lengths = {name: length for name, length in config.pathway_lengths.items() if length}
        self.pathways = nn.ModuleDict({name: DenseLeakyDense(item, width) for name in self.lengths})
        self.static_slot = nn.Embedding(1, width)
        self.user_proj = DenseLeakyDense(self.embed_user.width, width) if config.user_features else None
        lifelong = "lifelong" in self.lengths
        self.lifelong_queries = nn.Embedding(config.num_lifelong_queries, width) if lifelong else None
        layers = config.num_lifelong_layers if lifelong else 0
        self.lifelong_layers = nn.ModuleList([LifelongQFormerLayer(config) for _ in range(layers)])
        encoded = {**self.lengths, "static": 1} | ({"lifelong": config.num_lifelong_queries} if lifelong else {})
        self.embed_positions = nn.ModuleDict({name: nn.Embedding(length, width) for name, length in encoded.items()})
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        mask = checked_context(self.config, context_ids, context_mask)
        if context_ids.shape[1] != sum(self.lengths.values()):
            raise ValueError(
                f"context_ids holds {context_ids.shape[1]} items: expected {sum(self.lengths.values())}, the pathways side by side "
                f"and each padded to its length {self.lengths}."
            )
        features = [
            self.embed_codes(context_ids).flatten(2),
            *self.embed_features(context_features, context_ids.shape[:2]),
        ]
        items = self.dropout(torch.cat(features, dim=-1))  # (B, T, L * code_dim + features)
        hidden = [self._static(context_ids.new_zeros(context_ids.shape[0], 1), user_features)]
        masks = [mask.new_ones(mask.shape[0], 1)]
        start = 0
        for name, length in self.lengths.items():
            own, own_mask = items[:, start : start + length], mask[:, start : start + length]
            states = self.pathways[name](own)  # (B, length, D)
            if name == "lifelong":
                states, own_mask = self._compress(states, own_mask)
                states = states + self.embed_positions[name](torch.arange(states.shape[1], device=states.device))
            else:
                states = states + self.embed_positions[name](item_ages(own_mask) - 1)
            hidden.append(states)
            masks.append(own_mask)
            start += length
        return torch.cat(hidden, dim=1), torch.cat(masks, dim=1)

    def _static(self, first, user_features):
        static = self.static_slot(first) + self.embed_positions["static"](first)  # (B, 1, D)
        user = self.embed_user(user_features, first.shape[:1])
        if self.user_proj is None:
            return static
        return static + self.user_proj(self.dropout(torch.cat(user, dim=-1))).unsqueeze(1)

    def _compress(self, items, mask):
        """QFormer: (B, L_l, D) -> (B, N_q, D); a user without a lifelong history has none of the N_q tokens."""
        query = torch.arange(self.config.num_lifelong_queries, device=items.device)
        queries = self.lifelong_queries(query).expand(items.shape[0], -1, -1)
        some = mask.any(1, keepdim=True)  # (B, 1)
        visible = (mask | ~some)[
            :, None, None
        ]  # a row without any key would be undefined; its tokens are masked below
        for layer in self.lifelong_layers:
            queries = layer(queries, items, visible)
        return queries, some.expand(-1, queries.shape[1])


class OneRecV1PreTrainedModel(SemanticIdPreTrainedModel):
    config: OneRecV1Config
    _no_split_modules = ["DecoderLayer", "EncoderLayer", "OneRecV1PathwayEmbedding"]


class OneRecV1Model(OneRecV1PreTrainedModel, SemanticIdModel):
    """Pathways, encoder and point-wise decoder, without a head."""

    def __init__(self, config: OneRecV1Config):
        super().__init__(config)
        self.context_processor = OneRecContextEncoder(config, OneRecV1PathwayEmbedding(config), config.encoder_moe)
        self.build_decoder(config.num_hidden_layers)
        self.post_init()


class OneRecV1ForCausalLM(SemanticIdMixin, OneRecV1PreTrainedModel, GenerationMixin):
    """OneRecV1 with its head: `forward` trains on single items, `generate` recommends."""

    def __init__(self, config: OneRecV1Config):
        super().__init__(config)
        self.model = OneRecV1Model(config)
        self.build_head()


__all__ = ["OneRecV1ForCausalLM", "OneRecV1Model", "OneRecV1PreTrainedModel"]
