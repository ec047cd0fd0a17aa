"""OneRec (arXiv:2502.18965, section 3): a bidirectional encoder over the behaviours, a decoder that writes a whole
session.

Legend: B users, T context items, S encoder positions, L levels, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_onerec import OneRecConfig
from .input_checks import check_kwargs, checked_context, given_or_encoded
from .modeling_attention import ContextKV, KeyValueProjection, item_ages, padding_mask
from .modeling_layers import ContextEmbedding, EncoderLayer, SemanticIdDecoder, given_cache, real_tokens
from .modeling_semantic_id import SemanticIdForCausalLM, SemanticIdPreTrainedModel
from .moe import FeedForward, SparseMoE


class OneRecContextEmbedding(ContextEmbedding):
    """
    Section 3.1: the behaviour sequence as encoder input (B, S, D) and its mask (B, S).

    In front stands the static slot. An item is one token per code (`config.context_tokens="code"`), each with the
    item's features and position added, or one token.
    """

    def __init__(self, config: OneRecConfig):
        dim, width = config.context_embed_dim, config.hidden_size
        super().__init__(config, dim)
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
        static = self.static_vector(context_ids, user_features, self.dropout)
        return torch.cat([static, tokens.flatten(1, 2)], dim=1), F.pad(mask, (1, 0), value=True)


class OneRecContextEncoder(nn.Module):
    """Technical Report, section 2.2.2: blocks of full self-attention; then keys and values for every block of the
    decoder.
    """

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
            hidden_states = layer(hidden_states, attention_mask=visible, real=mask, **kwargs)
        hidden_states = self.norm(hidden_states)
        keys, values = zip(*(projection(hidden_states) for projection in self.key_values))
        return ContextKV(key_states=keys, value_states=values, mask=mask)


class OneRecModel(SemanticIdPreTrainedModel):
    """Encoder and session decoder, without a head. Decoder input: BOS and the codes of every item of the session
    (section 3.2).
    """

    config: OneRecConfig
    _no_split_modules = ["DecoderLayer", "EncoderLayer"]

    def __init__(self, config: OneRecConfig):
        super().__init__(config)
        self.context_processor = OneRecContextEncoder(config, OneRecContextEmbedding(config))
        length = config.num_session_items * (config.num_levels + 1)
        self.decoder = SemanticIdDecoder(config, config.num_hidden_layers, num_positions=length)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        context_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        context_kv: ContextKV | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (R, C)): BOS and codes. R may be a multiple of the B contexts; the
                rows of one context are adjacent.
            context_ids (`torch.LongTensor` of shape (B, T, L)): Token ids of the history, oldest first.
            context_mask (`torch.BoolTensor` of shape (B, T), *optional*): True for real items.
            context_features (`torch.LongTensor` of shape (B, T, F), *optional*): As `config.context_features`.
            user_features (`torch.LongTensor` of shape (B, F_u), *optional*): As `config.user_features`.
            context_kv (`ContextKV`, *optional*): Instead of the four above, the context encoded before.
        """
        cache = given_cache(past_key_values, kwargs)
        check_kwargs(self, kwargs)
        hidden_states = self.decoder.embed(input_ids, inputs_embeds)
        context_kv = given_or_encoded(self, context_kv, context_ids, context_mask, context_features, user_features)
        visible = padding_mask(context_kv)
        real = real_tokens(self, input_ids)
        given = (hidden_states, context_kv, visible, attention_mask, position_ids, cache, use_cache)
        return self.decoder(*given, real=real)


class OneRecForCausalLM(SemanticIdForCausalLM, GenerationMixin):
    """
    OneRec (arXiv:2502.18965, section 3) with its head: an encoder over the behaviours, and a decoder that writes
    sessions of `config.num_session_items` items.

    ```python
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_experts": 0}
    model = OneRecForCausalLM(OneRecConfig(codebook_sizes=[4, 4], num_session_items=2, **sizes)).eval()
    model.catalogue = Catalogue([[0, 1], [2, 3], [2, 0]], codebook_sizes=[4, 4])
    history = torch.tensor([[[4, 9]]])  # a user's item 0: its codes plus config.level_offsets, [4, 8]
    loss = model(context_ids=history, target_ids=torch.tensor([[[6, 8], [6, 11]]])).loss  # of items 2 and 1, a session
    items, scores = model.recommend_items(3, context_ids=history, num_session_items=2)  # (1, 3, 2) and (1, 3)
    ```

    `forward` of [`SemanticIdForCausalLM`] says the shapes of all inputs and what the loss is; `generate` returns
    tokens in place of items.

    Args:
        config ([`OneRecConfig`]): Sizes, sessions, features, experts.
    """

    config: OneRecConfig

    def __init__(self, config: OneRecConfig):
        super().__init__(config, OneRecModel(config))


__all__ = ["OneRecContextEncoder", "OneRecForCausalLM", "OneRecModel"]
