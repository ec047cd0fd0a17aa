"""The decoder over codes that every OneRec model has: blocks that attend to a context and to the codes before.

OneRec Technical Report, section 2.2.3 (arXiv:2506.13695); OneRec-V2, section 2.2.3 (arXiv:2508.20900). Legend: B users, T context
positions, R = B * m rows (rows of one user adjacent), C decoder tokens, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .input_checks import check_range
from .layers import ContextKV, DecoderLayer, FeedForward, PositionRMSNorm
from .modeling_outputs import CACHE
from .moe import SparseMoE


class SemanticIdDecoder(nn.Module):
    """
    Token embeddings, blocks and norm.

    Args:
        num_context_sets (`int`): Key/value sets of the context, shared out evenly: block l of N reads set floor(l * sets / N)
            (OneRec-V2, 2.2.3).
        num_norms (`int`, defaults to 1): Output norms, one for each position of a semantic ID.
        num_positions (`int`, *optional*): Learned positions of the tokens of a session; without, there are none.
    """

    def __init__(
        self,
        config: Any,
        num_context_sets: int,
        layer_class: type[DecoderLayer] = DecoderLayer,
        num_norms: int = 1,
        num_positions: int | None = None,
    ):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        blocks = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [
                layer_class(config, l, self._mlp(config, l), context_set=l * num_context_sets // blocks)
                for l in range(blocks)
            ]
        )
        self.norm = PositionRMSNorm(num_norms, config.hidden_size, config.rms_norm_eps)
        self.embed_positions = None if num_positions is None else nn.Embedding(num_positions, config.hidden_size)

    @staticmethod
    def _mlp(config, layer) -> nn.Module:
        if config.is_moe_layer(layer):
            return SparseMoE(config)
        return FeedForward(config.hidden_size, config.intermediate_size, config.gated_mlp)

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """Embeddings (R, C, D) of tokens, or the given ones."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is not None:
            return inputs_embeds
        hint = "Rows are BOS and codes plus config.level_offsets."
        check_range("input_ids", input_ids, self.config.vocab_size, hint)
        return self.embed_tokens(input_ids)

    def forward(
        self,
        inputs_embeds: Tensor,
        context_kv: ContextKV,
        context_mask: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            inputs_embeds (`torch.FloatTensor` of shape (R, C, D)): Of [`embed`].
            context_kv ([`ContextKV`]): Of B users; R is a multiple of B.
            context_mask (`torch.FloatTensor`): Added to the scores of the attention to the context, broadcastable to
                (B, H_kv, groups * m * C, T).
        """
        rows, length, _ = inputs_embeds.shape
        if rows % context_kv.mask.shape[0]:
            raise ValueError(f"{rows} rows of input_ids cannot share {context_kv.mask.shape[0]} contexts evenly.")
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        named: dict[str, Any] = {CACHE: cache}
        # before the default positions: given ones are searched for packed rows, which reads a tensor back
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named,
        )
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)
        # CUDA's fused attention is taken where positions are adjacent, and copies no mask where its rows start at multiples of 8;
        # never without padding, so that an export need not know whether there is any
        positions = context_mask.shape[-1]
        context_mask = F.pad(context_mask.contiguous(), (0, 8 - positions % 8))[..., :positions]
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            hidden_states = hidden_states + self.embed_positions(position_ids)
        hidden_states = self.dropout(hidden_states)
        layer: Any
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                context_kv.key_states[layer.context_set],
                context_kv.value_states[layer.context_set],
                context_mask,  # positional, as all that carries gradients: reentrant checkpointing asks for it
                attention_mask=causal_mask,
                cache=cache,
            )
        hidden_states = self.norm(hidden_states, position_ids % (self.config.num_levels + 1))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **named)


def padding_mask(context_kv: ContextKV) -> Tensor:
    """Additive mask (B, 1, 1, T) of a context that every row of a user sees whole."""
    dtype = context_kv.key_states[0].dtype
    mask = context_kv.mask[:, None, None]
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


__all__ = ["SemanticIdDecoder", "padding_mask"]
