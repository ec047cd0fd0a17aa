"""OneRec-V2 (arXiv:2508.20900, section 2.2): context processor and lazy decoder.

Legend: B users, T context items, L levels, R = B * m rows (m targets, beams or samples of a user, adjacent), C decoder tokens,
D width.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_onerec import OneRecV2Config
from .layers import ContextAttention, ContextKV, SelfAttention, SwiGLU, age_buckets
from .modeling_semantic_id import SemanticIdCausalLMOutput, SemanticIdMixin


class FeatureEmbedding(nn.Module):
    """Concatenated embeddings of categorical features, (..., F) -> (..., F * dim), in the order of the config."""

    def __init__(self, features: dict[str, int], dim: int, kind: str):
        super().__init__()
        self.names, self.kind = list(features), kind
        self.tables = nn.ModuleList([nn.Embedding(size, dim) for size in features.values()])

    def forward(self, values: torch.LongTensor | None) -> list[torch.Tensor]:
        given = 0 if values is None else values.shape[-1]
        if given != len(self.names):
            raise ValueError(
                f"{self.kind} holds {given} features, the config names {len(self.names)} ({self.names}): give a tensor whose last "
                "dimension has one column per name, in this order."
            )
        return [table(values[..., i]) for i, table in enumerate(self.tables)]


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
        self.embed_features = FeatureEmbedding(config.context_features, dim, "context_features")
        self.embed_user = FeatureEmbedding(config.user_features, dim, "user_features")
        self.item_proj = nn.Linear((config.num_levels + len(config.context_features)) * dim, width, bias=False)
        self.user_proj = (
            nn.Linear(len(config.user_features) * dim, width, bias=False) if config.user_features else None
        )
        self.static_slot = nn.Embedding(1, width)
        self.dropout = nn.Dropout(config.dropout)
        norm_width = config.num_context_key_value_heads * config.head_dim
        self.key_norm = nn.ModuleList(
            [nn.RMSNorm(norm_width, eps=config.rms_norm_eps) for _ in range(config.num_context_layers)]
        )
        self.value_norm = nn.ModuleList(
            [
                nn.RMSNorm(norm_width, eps=config.rms_norm_eps)
                for _ in range(config.num_context_layers if self.split == 2 else 0)
            ]
        )

    def forward(self, context_ids, context_mask=None, context_features=None, user_features=None) -> ContextKV:
        if context_ids is None:
            raise ValueError(
                "context_ids is missing: give the histories as token ids of shape (batch, items, levels)."
            )
        if context_ids.dim() != 3 or context_ids.shape[2] != self.config.num_levels:
            raise ValueError(
                f"context_ids has shape {tuple(context_ids.shape)}: expected (batch, items, {self.config.num_levels}), one token "
                "per level of each item."
            )
        batch, length, _ = context_ids.shape
        if context_mask is None:
            context_mask = torch.ones(batch, length, dtype=torch.bool, device=context_ids.device)
        codes = self.embed_codes(context_ids).flatten(2)  # (B, T, L * dim)
        items = torch.cat([codes, *self.embed_features(context_features)], dim=-1)
        items = self.item_proj(self.dropout(items))  # (B, T, width)
        static = self.static_slot.weight.expand(batch, 1, -1)
        user = self.embed_user(user_features)
        if self.user_proj is not None:
            static = static + self.user_proj(self.dropout(torch.cat(user, dim=-1))).unsqueeze(1)
        context = torch.cat([static, items], dim=1)  # (B, 1 + T, width)
        slices = context.unflatten(2, (self.config.num_context_layers * self.split, -1)).unbind(2)
        keys = tuple(self._heads(norm(slices[i * self.split])) for i, norm in enumerate(self.key_norm))
        values = keys
        if self.split == 2:
            values = tuple(self._heads(norm(slices[2 * i + 1])) for i, norm in enumerate(self.value_norm))
        return ContextKV(key_states=keys, value_states=values, mask=F.pad(context_mask.bool(), (1, 0), value=True))

    def _heads(self, states):
        return states.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)  # (B, G_kv, 1 + T, head_dim)


class OneRecV2LazyDecoderLayer(GradientCheckpointingLayer):
    """Section 2.2.3: cross-attention first, then causal self-attention, then the feed-forward, each pre-normed and residual."""

    def __init__(self, config: OneRecV2Config, layer_idx: int):
        super().__init__()
        self.context_layer = (
            layer_idx * config.num_context_layers // config.num_hidden_layers
        )  # floor(l L_kv / N_layer)
        self.cross_attn = ContextAttention(config)
        self.self_attn = SelfAttention(config, layer_idx)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)
        self.cross_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, hidden_states, key, value, context_mask=None, attention_mask=None, past_key_values=None, **kwargs
    ):
        attended, _ = self.cross_attn(self.cross_attn_norm(hidden_states), key, value, context_mask, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        attended, _ = self.self_attn(self.self_attn_norm(hidden_states), attention_mask, past_key_values, **kwargs)
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.mlp_norm(hidden_states)))


class PositionRMSNorm(nn.Module):
    """Section 2.2.3, output: an RMSNorm with weights of its own for every position of the semantic ID."""

    def __init__(self, num_levels: int, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_levels, hidden_size))
        self.eps = eps

    def forward(self, hidden_states, levels):
        weight = self.weight[levels.clamp(max=len(self.weight) - 1)]
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.eps) * weight


class OneRecV2PreTrainedModel(PreTrainedModel):
    config: OneRecV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["OneRecV2LazyDecoderLayer", "OneRecV2ContextProcessor"]
    _skip_keys_device_placement = ["past_key_values", "context_kv"]
    _supports_sdpa = True
    # transformers' flash path unpads queries by the key mask: wrong for a padded context (T5 and Mllama say no as well)
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": OneRecV2LazyDecoderLayer,
        "attentions": OutputRecorder(SelfAttention, index=1),
        "cross_attentions": OutputRecorder(ContextAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, OneRecV2Model) and module.position_bias is not None:
            init.zeros_(module.position_bias.weight)


class OneRecV2Model(OneRecV2PreTrainedModel):
    """The context processor and the lazy decoder, without a head."""

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.context_processor = OneRecV2ContextProcessor(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        buckets = config.position_bias_buckets
        self.position_bias = nn.Embedding(buckets, config.num_attention_heads) if buckets else None
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList([OneRecV2LazyDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = PositionRMSNorm(config.num_levels, config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def encode_context(self, context_ids, context_mask=None, context_features=None, user_features=None) -> ContextKV:
        """Keys and values of the context, once per user; see [`OneRecV2ContextProcessor`] for the shapes."""
        return self.context_processor(context_ids, context_mask, context_features, user_features)

    def _context_mask(self, context_kv: ContextKV, rows: int, length: int, target_positions, dtype):
        """Additive mask (B, H_kv, groups * m * C, 1 + T): padding, items a target must not see yet, and the bias over ages."""
        mask = context_kv.mask
        batch, heads = mask.shape[0], self.config.num_context_key_value_heads
        order = mask.long().cumsum(1) - 1  # (B, 1 + T) 0 is the static slot, 1.. the items in time order
        if target_positions is None:
            seen = order[:, -1:]  # (B, 1): every row sees every item
        else:
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

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        context_ids: torch.LongTensor | None = None,
        context_mask: torch.BoolTensor | None = None,
        context_features: torch.LongTensor | None = None,
        user_features: torch.LongTensor | None = None,
        context_kv: ContextKV | None = None,
        target_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (R, C)): BOS and codes. R may be a multiple of the B contexts; the rows of one
                context are adjacent.
            context_ids (`torch.LongTensor` of shape (B, T, L)): Token ids of the history, oldest first.
            context_mask (`torch.BoolTensor` of shape (B, T), *optional*): True for real items.
            context_features (`torch.LongTensor` of shape (B, T, F), *optional*): As `config.context_features`.
            user_features (`torch.LongTensor` of shape (B, F_u), *optional*): As `config.user_features`.
            context_kv (`ContextKV`, *optional*): Instead of the four above, the context encoded before.
            target_positions (`torch.LongTensor` of shape (R,), *optional*): How many history items each row may see; default
                all. An item's keys and values depend on that item alone, so one context serves every target of a user.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        rows, length, _ = inputs_embeds.shape
        if context_kv is None:
            context_kv = self.encode_context(context_ids, context_mask, context_features, user_features)
        if rows % context_kv.mask.shape[0]:
            raise ValueError(f"{rows} rows of input_ids cannot share {context_kv.mask.shape[0]} contexts evenly.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        cross_mask = self._context_mask(context_kv, rows, length, target_positions, inputs_embeds.dtype)
        hidden_states = self.dropout(inputs_embeds)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                context_kv.key_states[layer.context_layer],
                context_kv.value_states[layer.context_layer],
                context_mask=cross_mask,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=self.norm(hidden_states, position_ids), past_key_values=past_key_values
        )


class OneRecV2ForCausalLM(SemanticIdMixin, OneRecV2PreTrainedModel, GenerationMixin):
    """
    OneRec-V2 with its head: `forward` trains, `generate` recommends.

    `lm_head` is one linear map whose rows are [specials | level 1 | ... | level L]; the paper's position-specific head is the
    slice of the level (section 2.2.3).
    """

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.model = OneRecV2Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.max_new_tokens = config.num_levels

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        context_ids: torch.LongTensor | None = None,
        context_mask: torch.BoolTensor | None = None,
        context_features: torch.LongTensor | None = None,
        user_features: torch.LongTensor | None = None,
        context_kv: ContextKV | None = None,
        target_ids: torch.LongTensor | None = None,
        target_positions: torch.LongTensor | None = None,
        **kwargs,
    ) -> SemanticIdCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (R, C)): BOS and codes of one item per row.
            labels (`torch.LongTensor` of shape (R, L + 1), *optional*): As `input_ids`, -100 where no loss is wanted.
            target_ids (`torch.LongTensor` of shape (B, n, L), *optional*): Instead of `input_ids` and `labels`: all n targets of
                each user in one pass, pad tokens where there are fewer.
            target_positions (`torch.LongTensor` of shape (B, n), *optional*): History items that each target may see.
            context_ids, context_mask, context_features, user_features, context_kv: See [`OneRecV2Model`].

        Returns:
            [`SemanticIdCausalLMOutput`]; the loss is -1/L sum_l log p(s^l | BOS, s^{<l}, context), averaged over targets
            (OneRec-V2, L_Gen). With `target_ids` it holds `target_log_probs` instead of `logits`.
        """
        context = {"context_ids": context_ids, "context_mask": context_mask, "context_features": context_features}
        context |= {"user_features": user_features, "context_kv": context_kv}
        if target_ids is not None:
            if input_ids is not None or labels is not None:
                raise ValueError("target_ids stands for input_ids and labels together: give one or the other.")
            rows = target_ids.flatten(0, 1)  # (B * n, L)
            input_ids = F.pad(rows[:, :-1], (1, 0), value=self.config.bos_token_id)
            positions = None if target_positions is None else target_positions.flatten()
            outputs = self.model(input_ids, target_positions=positions, use_cache=False, **context, **kwargs)
            log_probs = self.code_log_probs(outputs.last_hidden_state, rows)
            loss = self._mean_loss(log_probs, rows != self.config.pad_token_id)
            return SemanticIdCausalLMOutput(loss=loss, target_log_probs=log_probs.view(target_ids.shape))
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            target_positions=target_positions,
            **context,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        past = 0 if past_key_values is None else past_key_values.get_seq_length() - hidden.shape[1]
        levels = (
            position_ids
            if position_ids is not None
            else past + torch.arange(hidden.shape[1], device=hidden.device)[None]
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.mask_logits_to_level(self.lm_head(hidden[:, keep]), levels[:, keep])
        loss = None
        if labels is not None:
            if labels.shape[1] != self.config.num_levels + 1:
                raise ValueError(
                    f"labels has {labels.shape[1]} columns: expected BOS and {self.config.num_levels} codes."
                )
            loss = self._mean_loss(self.code_log_probs(hidden[:, :-1], labels[:, 1:]), labels[:, 1:] != -100)
        return SemanticIdCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    @staticmethod
    def _mean_loss(log_probs, real):
        return -torch.where(real, log_probs, 0.0).sum() / real.sum().clamp(min=1)


__all__ = ["OneRecV2ForCausalLM", "OneRecV2Model", "OneRecV2PreTrainedModel"]
