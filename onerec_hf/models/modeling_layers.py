"""Blocks that the OneRec models share: encoder and decoder blocks, the embedding of a context, and the decoder over
codes.

OneRec Technical Report, sections 2.2 and 2.3 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B
users, T context positions, R = B * m rows (m targets, beams or samples per user, rows of one user adjacent), C target
tokens, L levels, D width, H heads, n targets (or candidates) of a user.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel

from .input_checks import check_range
from .modeling_attention import ContextAttention, ContextKV, EncoderAttention, SelfAttention
from .moe import FeedForward, SparseMoE
from .parallel import unsharded_class

# transformers 5.24 renamed `past_key_values`; our forwards take both names, and give each version the one that it
# reads
CACHE = "cache" if "cache" in BaseModelOutputWithPastAndCrossAttentions.__dataclass_fields__ else "past_key_values"


class OneRecPreTrainedModel(PreTrainedModel):
    """What generative and reward models have in common with the platform around them."""

    _supports_sdpa = True
    # transformers' flash path unpads queries by the key mask: wrong for a padded context (T5 and Mllama say no as
    # well)
    _supports_flash_attn = False
    _supports_attention_backend = True

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; of a model that FSDP2 has sharded, give the gathered `state_dict`."""
        with unsharded_class(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def set_use_kernels(self, use_kernels: bool, *args: Any, **kwargs: Any) -> None:
        """Refused where it would replace nothing: `use_kernels=True`."""
        if use_kernels:
            raise ValueError(
                f"use_kernels=True would do nothing: the Hub has no kernel for a layer of {type(self).__name__}. Its "
                "norms are torch's fused ones, its attention is fused with attn_implementation='sdpa'. Leave it out."
            )
        super().set_use_kernels(use_kernels, *args, **kwargs)


class EncoderLayer(GradientCheckpointingLayer):
    """Technical Report, section 2.2.2: self-attention over everything, then `mlp` (dense or a mixture), pre-normed and
    residual.
    """

    def __init__(self, config: Any, layer_idx: int, mlp: nn.Module):
        super().__init__()
        self.self_attn = EncoderAttention(config, layer_idx)
        self.mlp = mlp
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, real: Tensor | None = None, **kwargs
    ) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(feed(self.mlp, self.mlp_norm(hidden_states), real))


def feed(mlp: nn.Module, hidden_states: Tensor, real: Tensor | None) -> Tensor:
    """A dense feed-forward, or a mixture, which counts its `real` tokens."""
    return mlp(hidden_states, real) if isinstance(mlp, SparseMoE) else mlp(hidden_states)


def real_tokens(model: nn.Module, input_ids: Tensor | None) -> Tensor | None:
    """Which tokens (R, C) of a decoder are neither padding nor the BOS in front of it; None where no expert counts."""
    config: Any = model.config
    if input_ids is None or not (model.training and config.num_experts):
        return None
    padding = input_ids == config.pad_token_id
    return ~(padding | F.pad(padding[:, 1:], (0, 1)))


class DecoderLayer(GradientCheckpointingLayer):
    """
    Causal self-attention and attention to the context, then `mlp` (dense or a mixture), each pre-normed and residual.

    The Technical Report (section 2.3) attends to the target's own tokens first, OneRec-V2 (section 2.2.2) to the
    context first.
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
        rotation: tuple[Tensor, Tensor] | None = None,
        causal_context: bool = False,
        real: Tensor | None = None,
        **kwargs,
    ) -> Tensor:
        to_context = (key, value, context_mask, rotation, causal_context)
        if self.context_first:
            hidden_states = self._attend_to_context(hidden_states, *to_context, **kwargs)
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, cache, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        if not self.context_first:
            hidden_states = self._attend_to_context(hidden_states, *to_context, **kwargs)
        return hidden_states + self.dropout(feed(self.mlp, self.mlp_norm(hidden_states), real))

    def _attend_to_context(self, hidden_states, *to_context, **kwargs):
        attended, _ = self.cross_attn(self.cross_attn_norm(hidden_states), *to_context, **kwargs)
        return hidden_states + self.dropout(attended)


class PositionRMSNorm(nn.Module):
    """OneRec-V2, section 2.2.2, output: an RMSNorm with weights of its own for every position of the semantic ID."""

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
        # in its own forward, so that whoever moves or gathers weights before a module runs (offload, FSDP) sees the
        # slice too
        return F.linear(hidden_states, self.weight[rows])


class FixedEmbedding(nn.Module):
    """A given table (V, width), saved with the model and not trained: a buffer."""

    weight: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, width))

    def forward(self, values: Tensor) -> Tensor:
        return F.embedding(values, self.weight)


class FeatureEmbedding(nn.Module):
    """Embeddings of categorical features, (..., F) -> a list of (..., width), in the order of the config; `fixed`:
    given ones.
    """

    def __init__(
        self, features: dict[str, int], config: Any, kind: str, fixed: Sequence[str] = (), width: int | None = None
    ):
        super().__init__()
        self.names, self.sizes, self.kind = list(features), list(features.values()), kind
        widths = [config.feature_embed_dims.get(name, width or config.context_embed_dim) for name in features]
        self.width = sum(widths)
        tables = zip(features.items(), widths)
        self.tables = nn.ModuleList(
            [
                FixedEmbedding(size, width) if name in fixed else nn.Embedding(size, width)
                for (name, size), width in tables
            ]
        )

    def forward(self, values: Tensor | None, shape: Sequence[int]) -> list[Tensor]:
        """`values` (*shape, F); `shape` is that of the items or users that the features belong to."""
        given = 0 if values is None else values.shape[-1]
        if given != len(self.names):
            raise ValueError(
                f"{self.kind} holds {given} features, the config names {len(self.names)} ({self.names}): give a "
                "tensor whose last dimension has one column per name, in this order."
            )
        if values is None:
            return []
        if values.shape[:-1] != torch.Size(shape):
            raise ValueError(
                f"{self.kind} has shape {tuple(values.shape)}: expected {(*shape, given)}, one row for each of what "
                "it describes."
            )
        for i, (name, size) in enumerate(zip(self.names, self.sizes)):
            hint = "Value 0 stands for unknown; the config says how many values there are."
            check_range(f"{self.kind}, column {i} ({name!r}),", values[..., i], size, hint)
        return [table(values[..., i]) for i, table in enumerate(self.tables)]

    def fill(self, name: str, vectors: Tensor) -> None:
        """Table of a fixed feature: row i of `vectors` (N, width) goes to value i + 1, zeros to value 0
        ("unknown").
        """
        table = self.tables[self.names.index(name)].get_buffer("weight")
        if vectors.shape != (table.shape[0] - 1, table.shape[1]):
            raise ValueError(
                f"vectors of {name!r} have shape {tuple(vectors.shape)}, the config says {table.shape[0] - 1} rows "
                f"(its values without 0) of width {table.shape[1]}."
            )
        table.copy_(F.pad(vectors, (0, 0, 1, 0)))


class ContextEmbedding(nn.Module):
    """
    The tables that a context is read from; each system puts its own maps on top.

    A subclass sets `static_slot`, the learned vector in front of the items, and `user_proj`, which adds the user
    features to it: a user without a history has this slot alone.
    """

    static_slot: nn.Embedding
    user_proj: nn.Module | None

    def __init__(self, config: Any, code_width: int, fixed_features: Sequence[str] = ()):
        super().__init__()
        self.config = config
        self.embed_codes = nn.Embedding(config.vocab_size, code_width, config.pad_token_id)
        self.embed_features = FeatureEmbedding(config.context_features, config, "context_features", fixed_features)
        self.embed_user = FeatureEmbedding(config.user_features, config, "user_features", width=config.user_embed_dim)
        self.item_width = config.num_levels * code_width + self.embed_features.width

    def item_vectors(self, context_ids: Tensor, context_features: Tensor | None) -> Tensor:
        """Codes and features of each item side by side, (B, T, `item_width`)."""
        codes = self.embed_codes(context_ids).flatten(2)  # (B, T, L * code width)
        return torch.cat([codes, *self.embed_features(context_features, context_ids.shape[:2])], dim=-1)

    def static_vector(self, context_ids: Tensor, user_features: Tensor | None, dropout: nn.Module) -> Tensor:
        """The static slot of each user, (B, 1, width)."""
        static = self.static_slot(context_ids.new_zeros(context_ids.shape[0], 1))
        user = self.embed_user(user_features, context_ids.shape[:1])
        if self.user_proj is None:
            return static
        return static + self.user_proj(dropout(torch.cat(user, dim=-1))).unsqueeze(1)


def given_cache(past_key_values: Any, kwargs: dict[str, Any]) -> Any:
    """The cache, under the one or the other name of transformers; taken out of `kwargs`."""
    cache = kwargs.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names for one thing: give one of them.")
    return past_key_values if cache is None else cache


class SemanticIdDecoder(nn.Module):
    """
    Token embeddings, blocks and norm.

    Args:
        num_context_sets (`int`): Key/value sets of the context, shared out evenly: block l of N reads set floor(l *
            sets / N) (OneRec-V2, 2.2.2).
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
        context_mask: Tensor | None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        **attention,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        """
        Args:
            inputs_embeds (`torch.FloatTensor` of shape (R, C, D)): Of [`embed`].
            context_kv ([`ContextKV`]): Of B users; R is a multiple of B.
            context_mask (`torch.FloatTensor`, *optional*): Added to the scores of the attention to the context,
                broadcastable to (B, H_kv, groups * m * C, T).
            attention: `rotation` and `causal_context` of [`ContextAttention`], and `real`, as [`real_tokens`] says.
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
        # CUDA's fused attention is taken where positions are adjacent, and copies no mask where its rows start at
        # multiples of 8; never without padding, so that an export need not know whether there is any
        if context_mask is not None:
            positions = context_mask.shape[-1]
            context_mask = F.pad(context_mask.contiguous(), (0, 8 - positions % 8))[..., :positions]
        hidden_states = inputs_embeds
        if self.embed_positions is not None:
            if length > self.embed_positions.num_embeddings:
                raise ValueError(
                    f"rows of {length} tokens, and the model has {self.embed_positions.num_embeddings} positions: "
                    f"sessions of num_session_items={self.config.num_session_items} items, each a BOS and "
                    f"{self.config.num_levels} codes. Give shorter sessions, or make a model for longer ones."
                )
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
                **attention,
            )
        hidden_states = self.norm(hidden_states, position_ids % (self.config.num_levels + 1))
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states, **named)


__all__ = [
    "CACHE",
    "ContextEmbedding",
    "DecoderLayer",
    "EncoderLayer",
    "FeatureEmbedding",
    "LevelHead",
    "PositionRMSNorm",
    "SemanticIdDecoder",
    "given_cache",
    "real_tokens",
]
