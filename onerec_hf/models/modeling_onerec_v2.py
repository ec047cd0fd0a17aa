"""OneRec-V2 (arXiv:2508.20900, section 2.2): context processor and lazy decoder.

Legend: B users, T context items, L levels, R = B * m rows (m targets, beams or samples of a user, adjacent), C decoder
tokens, D width.
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

from .configuration_onerec_v2 import OneRecV2Config
from .input_checks import asked, check_causal, check_kwargs, checked_context, given_or_encoded, readable
from .modeling_attention import (
    AgeBias,
    ContextKV,
    ContextRotary,
    padding_mask,
    rotate,
    visible_ages,
    with_padding_channels,
)
from .modeling_layers import (
    ContextEmbedding,
    DecoderLayer,
    FixedEmbedding,
    SemanticIdDecoder,
    given_cache,
    real_tokens,
)
from .modeling_semantic_id import SemanticIdForCausalLM, SemanticIdPreTrainedModel


class KeyValueRMSNorm(nn.RMSNorm):
    """An RMSNorm that keeps the type of what it is given: under autocast, every block would narrow float32 keys
    again.
    """

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)


class OneRecV2ContextProcessor(ContextEmbedding):
    """
    Section 2.2.1: every context item becomes one vector of width S_kv * L_kv * G_kv * head_dim, whose slices are,
    after an RMSNorm and nothing else, the keys and values of the decoder.

    In front stands one static slot (the paper's N_s). An item is the concatenation of its code and feature embeddings
    under one linear map, which is what the FLOPs of the paper's Table 3 imply.
    """

    def __init__(self, config: OneRecV2Config):
        super().__init__(config, config.context_embed_dim, config.fixed_context_features)
        self.split = config.context_key_value_split
        width = self.split * config.num_context_layers * config.num_context_key_value_heads * config.head_dim
        self.item_proj = nn.Linear(self.item_width, width, bias=False)
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
        self.rotary = ContextRotary(config) if config.context_position == "rope" else None

    def forward(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> ContextKV:
        context_mask = checked_context(self.config, context_ids, context_mask)
        items = self.item_proj(self.dropout(self.item_vectors(context_ids, context_features)))  # (B, T, width)
        static = self.static_vector(context_ids, user_features, self.dropout)
        # autocast: an embedding is float32, a product is not, and so many vectors are better not made wider
        context = torch.cat([static.to(items.dtype), items], dim=1)  # (B, 1 + T, width)
        slices = context.unflatten(2, (self.config.num_context_layers * self.split, -1)).unbind(2)
        keys = tuple(self._heads(norm(slices[i * self.split])) for i, norm in enumerate(self.key_norm))
        values = keys
        if self.split == 2:
            values = tuple(self._heads(norm(slices[2 * i + 1])) for i, norm in enumerate(self.value_norm))
        mask = F.pad(context_mask, (1, 0), value=True)
        if self.rotary is not None:
            order = mask.long().cumsum(1)  # the static slot stands in front of the oldest item
            turn = self.rotary(order - order[:, -1:] - 1, keys[0].dtype)  # minus the age
            keys = tuple(rotate(key, *(part.unsqueeze(1) for part in turn)) for key in keys)
        return ContextKV(key_states=keys, value_states=values, mask=mask)

    def _heads(self, states):
        return states.unflatten(2, (-1, self.config.head_dim)).transpose(1, 2)  # (B, G_kv, 1 + T, head_dim)


class OneRecV2LazyDecoderLayer(DecoderLayer):
    """Section 2.2.2: cross-attention first, then causal self-attention, then the feed-forward or the experts."""

    context_first = True


class OneRecV2Model(SemanticIdPreTrainedModel):
    """The context processor and the lazy decoder, without a head."""

    config: OneRecV2Config
    _no_split_modules = ["OneRecV2LazyDecoderLayer", "OneRecV2ContextProcessor"]

    def __init__(self, config: OneRecV2Config):
        super().__init__(config)
        self.context_processor = OneRecV2ContextProcessor(config)
        self.decoder = SemanticIdDecoder(
            config, config.num_context_layers, OneRecV2LazyDecoderLayer, num_norms=config.num_levels
        )
        self.position_bias = AgeBias(config) if config.context_position == "bias" else None
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
        target_positions: torch.Tensor | None = None,
        causal_targets: bool | torch.Tensor = False,
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
            target_positions (`torch.LongTensor` of shape (R,), *optional*): How many history items each row may see;
                default all. An item's keys and values depend on that item alone, so one context serves every target.
            causal_targets (`bool` or `torch.BoolTensor` of shape (B,)): R = B * (1 + T), and row i of a user sees the
                static slot and the first i items of a history that is padded on the right, if at all. The same numbers
                as with `target_positions`, without a mask: faster, and memory grows with T instead of T squared.
        """
        cache = given_cache(past_key_values, kwargs)
        check_kwargs(self, kwargs)
        hidden_states = self.decoder.embed(input_ids, inputs_embeds)
        context_kv = given_or_encoded(self, context_kv, context_ids, context_mask, context_features, user_features)
        causal = asked(causal_targets)
        if causal:
            check_causal(context_kv.mask, len(hidden_states), target_positions)
        attention: dict[str, Any] = {"real": real_tokens(self, input_ids)}
        mask = None
        if self.position_bias is not None or (target_positions is not None and not causal):
            if causal:
                target_positions = torch.arange(context_kv.mask.shape[1], device=context_kv.mask.device)
                target_positions = target_positions.expand(len(context_kv.mask), -1)
            mask = self.context_mask(context_kv, hidden_states, target_positions)
        elif causal:
            attention["causal_context"] = True
        elif context_kv.mask.is_cuda:  # whether there is padding cannot be read; no fused kernel there takes a mask
            context_kv = with_padding_channels(context_kv)
        elif not (readable(context_kv.mask) and bool(context_kv.mask.all())):
            mask = padding_mask(context_kv)
        if self.context_processor.rotary is not None and (causal or target_positions is not None):
            attention["rotation"] = self._rotation(context_kv, None if causal else target_positions)
        return self.decoder(
            hidden_states, context_kv, mask, attention_mask, position_ids, cache, use_cache, **attention
        )

    def _rotation(self, context_kv: ContextKV, target_positions: torch.Tensor | None):
        """Cosines and sines (B, m, head_dim): a row is turned back by the items that it does not see."""
        mask = context_kv.mask
        count = mask.sum(1, keepdim=True) - 1
        seen = torch.arange(mask.shape[1], device=mask.device)
        if target_positions is not None:
            seen = target_positions.reshape(len(mask), -1)
        return self.context_processor.rotary(seen - count, context_kv.key_states[0].dtype)

    def context_mask(
        self, context_kv: ContextKV, hidden_states: torch.Tensor, target_positions: torch.Tensor | None
    ) -> torch.Tensor:
        """Additive mask (B, H_kv, groups * m * C, 1 + T): padding, items a target must not see yet, and with `"bias"`
        that over ages.
        """
        rows, length, _ = hidden_states.shape
        targets, heads = rows // context_kv.mask.shape[0], self.config.num_context_key_value_heads
        dtype = context_kv.key_states[0].dtype
        lowest = torch.finfo(dtype).min
        age, visible = visible_ages(context_kv.mask, target_positions, targets)  # (B, m or 1, 1 + T)
        if self.position_bias is None:
            bias = torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, lowest).unsqueeze(1)
        else:
            bias = self.position_bias(age).to(dtype).masked_fill(~visible.unsqueeze(3), lowest).permute(0, 3, 1, 2)
        if bias.shape[1] == heads or bias.shape[1] == 1:  # no grouped heads (or no bias): one mask for all groups
            groups = self.config.num_attention_heads // heads
            if bias.shape[2] == 1:
                return bias  # the same for every query
            bias = bias.unsqueeze(2).unsqueeze(4).expand(-1, -1, groups, -1, length, -1)
        else:
            bias = bias.unflatten(1, (heads, -1)).unsqueeze(4).expand(-1, -1, -1, targets, length, -1)
        return bias.flatten(2, 4)


class ItemHead(nn.Module):
    """
    Scores every item by a dot product, beside the codes: an item's vector is learned, plus a projection of its given
    one where the context has such (`item_vectors`).

    Codes share what they know between items; this head tells one item from its neighbours. Not in the papers.
    """

    def __init__(self, config: OneRecV2Config, table: nn.Module | None):
        super().__init__()
        self.query = nn.Linear(config.hidden_size, config.item_head_dim, bias=False)
        self.items = nn.Embedding(config.item_head_size, config.item_head_dim)
        width = None if table is None else table.get_buffer("weight").shape[1]
        self.project = None if width is None else nn.Linear(width, config.item_head_dim, bias=False)
        self._known: tuple[tuple, torch.Tensor] | None = None

    def forward(self, hidden_states: torch.Tensor, table: nn.Module | None) -> torch.Tensor:
        """States of BOS (R, D) to scores of all items (R, N)."""
        return self.query(hidden_states) @ self._vectors(table).T

    def train(self, mode: bool = True) -> "ItemHead":
        """Also forgets the items' vectors: sharded training changes weights in ways that no version counts."""
        self._known = None
        return super().train(mode)

    def _vectors(self, table: nn.Module | None) -> torch.Tensor:
        """Of all items (N, E). To project them all takes as long as a search, so they are kept while one serves.

        What changes weights through `weight.data` calls `eval()` afterwards, so that they are made anew.
        """
        if self.project is None or table is None:
            return self.items.weight
        given = table.get_buffer("weight")
        sources = [given, *self.items.parameters(), *self.project.parameters()]
        keeps = not (self.training or torch.is_grad_enabled() or any(own.is_inference() for own in sources))
        state = tuple((own.data_ptr(), own._version, own.dtype, own.device) for own in sources) if keeps else ()
        known = self._known
        if keeps and known is not None and known[0] == state:
            return known[1]
        items = self.items.weight + self.project(given[1:])  # row 0 is "unknown"
        if keeps and not items.is_inference():
            self._known = (state, items)
        return items


class OneRecV2ForCausalLM(SemanticIdForCausalLM, GenerationMixin):
    """
    OneRec-V2 (arXiv:2508.20900, section 2) with its head: a decoder alone. The items of a context become its
    keys and values by a projection, with no encoder.

    ```python
    model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=[4, 4], hidden_size=8, num_attention_heads=2)).eval()
    model.catalogue = Catalogue([[0, 1], [2, 3], [2, 0]], codebook_sizes=[4, 4])
    history = torch.tensor([[[4, 9], [6, 11]]])  # a user's items 0 and 1: codes plus config.level_offsets, [4, 8]
    loss = model(context_ids=history, target_ids=torch.tensor([[[6, 8]]])).loss  # of item 2 as the next one
    items, scores = model.recommend_items(2, context_ids=history)  # (1, 2) both: item indices, log-probabilities
    ```

    `forward` of [`SemanticIdForCausalLM`] says the shapes of all inputs and what the loss is; `generate` returns
    tokens in place of items.

    Args:
        config ([`OneRecV2Config`]): Sizes, features, experts, item head.
    """

    config: OneRecV2Config

    def __init__(self, config: OneRecV2Config):
        super().__init__(config, OneRecV2Model(config))
        self.item_head = None
        if config.item_head_dim:
            self.item_head = ItemHead(config, self._item_table())
            self.post_init()

    @torch.no_grad()
    def score_items(self, **context: Any) -> torch.Tensor:
        """
        What the item head thinks of every item as the next one.

        Args:
            context: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, or `context_kv`.

        Returns:
            Natural log-probabilities (B, N), by the item indices of the catalogue that the model was trained with.

        Raises:
            ValueError: For a model without an item head.
        """
        if self.item_head is None:
            raise ValueError("this model has no item head: train one with `--model '{\"item_head_dim\": 64}'`.")
        context_kv = context.pop("context_kv", None)
        if context_kv is None:
            context_kv = self.encode_context(**context)
        bos = context_kv.mask.new_full((len(context_kv.mask), 1), self.config.bos_token_id, dtype=torch.long)
        hidden = self.model(bos, context_kv=context_kv, use_cache=False).last_hidden_state[:, 0]
        return self.item_head(hidden, self._item_table()).float().log_softmax(1)

    def _item_table(self) -> nn.Module | None:
        """The given vectors of all items, where the context reads such."""
        tables = self.model.context_processor.embed_features.tables
        size = self.config.item_head_size + 1
        return next((t for t in tables if isinstance(t, FixedEmbedding) and len(t.weight) == size), None)

    def _target_loss(self, hidden_states, log_probs, target_ids, num_items):
        """With the cross-entropy of the target among all items, a mean over targets, times `item_loss_weight`."""
        loss = super()._target_loss(hidden_states, log_probs, target_ids, num_items)
        if self.item_head is None:
            return loss
        if num_items is not None and self.config.loss_reduction == "mean":  # it counts codes
            num_items = num_items / self.config.num_levels
        rows = target_ids.flatten(0, 1)  # (R, L)
        real = (rows != self.config.pad_token_id).all(1)
        # level by level, since a tensor of offsets would be copied to the device in every step
        codes = [rows[:, level] - offset for level, offset in enumerate(self.config.level_offsets)]
        catalogue = self._require_catalogue(None)
        leaves = catalogue.leaves_of(torch.stack(codes, dim=1).clamp(min=0))
        # of items that share a semantic ID, the most popular one stands for all; what is no item of the head, such as
        # one that joined the catalogue later, teaches the codes alone
        items = catalogue.item_of_each(leaves[None])[0]
        items = items.masked_fill(~real | (items < 0) | (items >= self.config.item_head_size), -100)
        scores = self.item_head(hidden_states[:, 0], self._item_table()).float()
        total = F.cross_entropy(scores, items, ignore_index=-100, reduction="sum")
        count = real.sum().clamp(min=1) if num_items is None else num_items
        return loss + self.config.item_loss_weight * total / count


__all__ = ["ItemHead", "OneRecV2ForCausalLM", "OneRecV2Model"]
