"""OneRecV1, the OneRec Technical Report (arXiv:2506.13695, sections 2.2 and 2.3): four pathways, an encoder, a
point-wise decoder.

Legend: B users, T context items of all pathways, L levels, N_q lifelong queries, D width.
"""

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_onerec import OneRecV1Config
from .input_checks import check_kwargs, checked_context, given_or_encoded
from .modeling_attention import ContextKV, EncoderAttention, item_ages, padding_mask
from .modeling_layers import ContextEmbedding, SemanticIdDecoder, given_cache, real_tokens
from .modeling_onerec import OneRecContextEncoder
from .modeling_semantic_id import SemanticIdForCausalLM, SemanticIdPreTrainedModel
from .moe import FeedForward


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
    """h <- CrossAttn(h, v, v); h <- FFN(RMSNorm(h)) (section 2.2.1), with residual connections unless the config says
    no.
    """

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


class OneRecV1PathwayEmbedding(ContextEmbedding):
    """
    Section 2.2.1: [h_u; h_s; h_p; h_l] + e_pos, (B, 1 + L_s + L_p + N_q, D), and its mask.

    `context_ids` holds the pathways side by side: `short_term_length` + `positive_length` + `lifelong_length` items,
    each padded to that length. Code and feature embeddings are shared by the pathways, the dense maps are not.
    """

    def __init__(self, config: OneRecV1Config):
        super().__init__(config, config.code_embed_dim)
        width = config.hidden_size
        self.lengths = {name: length for name, length in config.pathway_lengths.items() if length}
        self.pathways = nn.ModuleDict({name: DenseLeakyDense(self.item_width, width) for name in self.lengths})
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
                f"context_ids holds {context_ids.shape[1]} items: expected {sum(self.lengths.values())}, the pathways "
                f"side by side and each padded to its length {self.lengths}."
            )
        items = self.dropout(self.item_vectors(context_ids, context_features))
        static = self.static_vector(context_ids, user_features, self.dropout)
        hidden = [static + self.embed_positions["static"](context_ids.new_zeros(1, 1))]
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


class OneRecV1Model(SemanticIdPreTrainedModel):
    """Pathways, encoder and point-wise decoder, without a head."""

    config: OneRecV1Config
    _no_split_modules = ["DecoderLayer", "EncoderLayer", "OneRecV1PathwayEmbedding"]
    _tied_weights_keys = {"context_processor.embedding.embed_codes.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: OneRecV1Config):
        super().__init__(config)
        self.context_processor = OneRecContextEncoder(config, OneRecV1PathwayEmbedding(config), config.encoder_moe)
        self.decoder = SemanticIdDecoder(config, config.num_hidden_layers)
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
            context_ids (`torch.LongTensor` of shape (B, T, L)): Token ids of the pathways side by side, each oldest
                first.
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


class OneRecV1ForCausalLM(SemanticIdForCausalLM, GenerationMixin):
    """
    OneRecV1, the model of the OneRec Technical Report (arXiv:2506.13695, sections 2.2 and 2.3), with its head: four
    pathways, an encoder, and a decoder that writes single items.

    ```python
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_experts": 0}
    pathways = {"short_term_length": 2, "positive_length": 1, "lifelong_length": 0}
    model = OneRecV1ForCausalLM(OneRecV1Config(codebook_sizes=[4, 4], **sizes, **pathways)).eval()
    model.catalogue = Catalogue([[0, 1], [2, 3], [2, 0]], codebook_sizes=[4, 4])
    history = torch.tensor([[[4, 9], [6, 11], [6, 11]]])  # items 0 and 1; behind them item 1, which the user liked
    loss = model(context_ids=history, target_ids=torch.tensor([[[6, 8]]])).loss  # of item 2 as the next one
    items, scores = model.recommend_items(2, context_ids=history)  # (1, 2) both: item indices, log-probabilities
    ```

    `forward` of [`SemanticIdForCausalLM`] says the shapes of all inputs and what the loss is; [`PathwayCollator`]
    makes them of a log.

    Args:
        config ([`OneRecV1Config`]): Sizes, pathways, features, experts.
    """

    config: OneRecV1Config

    def __init__(self, config: OneRecV1Config):
        super().__init__(config, OneRecV1Model(config))


__all__ = ["OneRecV1ForCausalLM", "OneRecV1Model"]
