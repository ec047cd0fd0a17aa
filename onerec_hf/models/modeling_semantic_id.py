"""What every OneRec model shares: the decoder over a context, one head over [specials | level 1 | ... | level L], and
log-probabilities that normalise within a level.

OneRec Technical Report, section 2.2.3 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T context
positions, R = B * m rows (rows of one user adjacent), C decoder tokens, L levels, V_l codes of level l, D width.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .catalogue import Catalogue
from .configuration_onerec import SemanticIdConfig
from .generation_semantic_id import CatalogueGenerationMixin
from .input_checks import check_codes, check_kwargs, check_range, check_targets, checked_labels
from .layers import (
    ContextAttention,
    ContextKV,
    DecoderLayer,
    EncoderAttention,
    FeedForward,
    LevelHead,
    PositionRMSNorm,
    SelfAttention,
)
from .modeling_outputs import SemanticIdCausalLMOutput, recorded
from .moe import Experts, Router, SparseMoE
from .parallel import unsharded_class


class SemanticIdPreTrainedModel(PreTrainedModel):
    config: SemanticIdConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss is a mean of its own: `Trainer` divides it by the accumulation steps
    _no_split_modules = ["DecoderLayer", "EncoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "context_kv"]
    _supports_sdpa = True
    # transformers' flash path unpads queries by the key mask: wrong for a padded context (T5 and Mllama say no as well)
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DecoderLayer,
        "attentions": OutputRecorder(SelfAttention, index=1),
        "cross_attentions": OutputRecorder(ContextAttention, index=1),
        "encoder_attentions": OutputRecorder(EncoderAttention, index=1),
        "router_logits": OutputRecorder(Router, index=0),
    }

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        if config.has_experts:
            self._keep_in_fp32_modules_strict = ["e_score_correction_bias"]

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; of a model that FSDP2 has sharded, give the gathered `state_dict`."""
        with unsharded_class(self):
            super().save_pretrained(save_directory, *args, **kwargs)

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]
        # no class method: whether there are experts is in the config. transformers looks for the decorator in the model's own file
        return self.config.has_experts

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, SemanticIdModel) and module.position_bias is not None:
            init.zeros_(module.position_bias.weight)


class SemanticIdModel(SemanticIdPreTrainedModel):
    """
    A decoder over codes that attends to a context; a subclass says what encodes the context and how it is masked.

    A subclass's `__init__` calls `build_decoder` after it has set `context_processor`.
    """

    decoder_layer_class = DecoderLayer
    context_processor: nn.Module
    embed_positions: nn.Embedding | None  # of the tokens of a session
    position_bias: nn.Embedding | None  # over the ages of context items

    def build_decoder(self, num_context_sets: int, num_norms: int = 1) -> None:
        """`num_context_sets` key/value sets are shared out evenly over the blocks: floor(l * sets / blocks) (OneRec-V2, 2.2.3)."""
        config = self.config
        self.embed_positions = self.position_bias = None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            [
                self.decoder_layer_class(
                    config,
                    layer,
                    SparseMoE(config)
                    if config.is_moe_layer(layer)
                    else FeedForward(config.hidden_size, config.intermediate_size, config.gated_mlp),
                    context_set=layer * num_context_sets // config.num_hidden_layers,
                )
                for layer in range(config.num_hidden_layers)
            ]
        )
        self.norm = PositionRMSNorm(num_norms, config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False

    def encode_context(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> ContextKV:
        """Keys and values of the context, once per user; shapes as in `forward`."""
        return self.context_processor(context_ids, context_mask, context_features, user_features)

    def cross_attention_mask(
        self, context_kv: ContextKV, rows: int, length: int, target_positions: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """Additive mask, broadcastable to (B, H_kv, groups * m * C, T): padding."""
        if target_positions is not None:
            raise ValueError(
                f"target_positions: the encoder of {type(self).__name__} mixes the items of a context, so every target sees all of "
                "them. Give one row per target, with the items before it as context."
            )
        mask = context_kv.mask[:, None, None]
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

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
            target_positions (`torch.LongTensor` of shape (R,), *optional*): OneRec-V2 only: how many history items each row may
                see; default all. An item's keys and values depend on that item alone, so one context serves every target.
        """
        check_kwargs(self, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            check_range(
                "input_ids", input_ids, self.config.vocab_size, "Rows are BOS and codes plus config.level_offsets."
            )
            inputs_embeds = self.embed_tokens(input_ids)
        rows, length, _ = inputs_embeds.shape
        if context_kv is None:
            context_kv = self.encode_context(context_ids, context_mask, context_features, user_features)
        if rows % context_kv.mask.shape[0]:
            raise ValueError(f"{rows} rows of input_ids cannot share {context_kv.mask.shape[0]} contexts evenly.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        # before the default positions: given ones are searched for packed rows, which reads a tensor back
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)
        dtype = context_kv.key_states[0].dtype
        cross_mask = self.cross_attention_mask(context_kv, rows, length, target_positions, dtype)
        # CUDA's fused attention is taken where positions are adjacent, and copies no mask where its rows start at multiples of 8;
        # never without padding, so that an export need not know whether there is any
        positions = cross_mask.shape[-1]
        cross_mask = F.pad(cross_mask.contiguous(), (0, 8 - positions % 8))[..., :positions]
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
                cross_mask,  # positional, as all that carries gradients: reentrant checkpointing asks for it
                attention_mask=causal_mask,
                past_key_values=past_key_values,
            )
        hidden_states = self.norm(hidden_states, position_ids % (self.config.num_levels + 1))
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=hidden_states, past_key_values=past_key_values
        )


class SemanticIdMixin(CatalogueGenerationMixin):
    """Head, loss, catalogue and `generate` of a model whose `self.model` turns a context and codes into hidden states."""

    def build_head(self) -> None:
        """`lm_head`, and a generation config that stops after the last code."""
        self.lm_head = LevelHead(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.post_init()
        self.generation_config.max_new_tokens = self.config.num_levels
        # `transformers.Trainer` counts the codes in `labels`; its count fits a loss that is a mean over codes, and no other
        self.accepts_loss_kwargs = self.config.loss_reduction == "mean"

    # ---- the one place where scores become log-probabilities -----------------------------------------------------------

    def level_log_probs(
        self,
        hidden_states: torch.Tensor,
        level: int,
        node: torch.Tensor | None = None,
        catalogue: Catalogue | None = None,
    ) -> torch.Tensor:
        """
        Log-probabilities of the codes of one level (OneRec-V2, eq. of L_Gen): softmax over the level's codes, or, with
        `config.score_normalization="valid"`, over the codes that continue the prefix to an existing item.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, D)): Last hidden states at the position before the code.
            level (`int`): 0-based level.
            node (`torch.LongTensor` of shape (R,), *optional*): Catalogue node of each row's prefix; None at the first level.
            catalogue (`Catalogue`, *optional*): Read only under `"valid"`; defaults to the model's own.

        Returns:
            `torch.FloatTensor` of shape (R, V_level), float32, in nats.
        """
        start = self.config.level_offsets[level]
        logits = self.lm_head(hidden_states, slice(start, start + self.config.codebook_sizes[level])).float()
        if self.config.score_normalization == "valid":
            codes, _, real = self._require_catalogue(catalogue).children(node, level)
            spare = torch.where(real, codes, logits.shape[1]).expand(logits.shape[0], -1)
            valid = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
            logits = logits.masked_fill(~valid.scatter_(1, spare, True)[:, :-1], torch.finfo(torch.float32).min)
        return logits.log_softmax(-1)

    def code_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Log-probability of given codes: what the loss, preference losses, RL ratios and beam scores are made of.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless numbers.

        Returns:
            `torch.FloatTensor` of shape (R, L), in nats.
        """
        result, node = [], None
        check_codes(self.config, "target", token_ids, (self.config.pad_token_id, -100))
        for level, offset in enumerate(self.config.level_offsets):
            code = (token_ids[:, level] - offset).clamp(min=0)
            log_probs = self.level_log_probs(hidden_states[:, level], level, node)
            result.append(log_probs.gather(1, code.unsqueeze(1)))
            if self.config.score_normalization == "valid" and level + 1 < self.config.num_levels:
                node = self._require_catalogue().step(node, level, code).clamp(min=0)
        return torch.cat(result, dim=1)

    def row_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        As `code_log_probs`, for whole rows: BOS and the codes of one item, and so on for every item of a session.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, C, D)): One position per token; the one of the last code may be missing.
            token_ids (`torch.LongTensor` of shape (R, items * (L + 1))): BOS and codes.

        Returns:
            `torch.FloatTensor` of shape (R, items, L), in nats: the codes' log-probabilities, never BOS's.
        """
        size = self.config.num_levels + 1
        if token_ids.shape[1] % size or (token_ids.shape[1] > size and not self.config.session_wise):
            rows = f"{size} columns, BOS and {size - 1} codes" + (
                ", for every item" if self.config.session_wise else ""
            )
            raise ValueError(f"rows have {token_ids.shape[1]} tokens: expected {rows}.")
        code = torch.arange(token_ids.shape[1] // size * (size - 1), device=token_ids.device)
        before_code = code + code // (size - 1)  # every position but each item's last; a mask would be read back
        hidden_states = hidden_states[:, before_code].reshape(-1, size - 1, hidden_states.shape[-1])
        codes = token_ids[:, before_code + 1].reshape(-1, size - 1)
        return self.code_log_probs(hidden_states, codes).view(token_ids.shape[0], -1, size - 1)

    def mask_logits_to_level(self, logits: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """
        `logits` (R, C, vocab) with everything that cannot follow at the lowest finite number: position p of a row predicts level
        p mod (L + 1); behind the last level stands `<|sid_begin|>` of a session's next item, or `<|sid_end|>`.
        `positions` (1 or R, C).
        """
        levels = positions % (self.config.num_levels + 1)
        edges = torch.tensor([*self.config.level_offsets, self.config.vocab_size], device=logits.device)
        token = torch.arange(self.config.vocab_size, device=logits.device)
        low = edges[levels.clamp(max=self.config.num_levels - 1)]
        high = edges[levels.clamp(max=self.config.num_levels - 1) + 1]
        inside = (token >= low.unsqueeze(-1)) & (token < high.unsqueeze(-1))
        ends = (levels == self.config.num_levels).unsqueeze(-1)
        # without an end token, what follows the last item is the begin of one more
        follower = self.config.bos_token_id if self.config.eos_token_id is None else self.config.eos_token_id
        follower = torch.full_like(positions, follower)
        if self.config.session_wise:
            last = positions + 1 == self.config.num_session_items * (self.config.num_levels + 1)
            follower = torch.where(last, follower, self.config.bos_token_id)
        inside = torch.where(ends, token == follower.unsqueeze(-1), inside)
        return logits.masked_fill(~inside, torch.finfo(logits.dtype).min)

    # ---- training ------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        context_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        context_kv: ContextKV | None = None,
        target_ids: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> SemanticIdCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (R, C)): BOS and codes of one item per row; of a session-wise model, of every
                item of a session. R may be a multiple of the B contexts, the rows of one context being adjacent.
            labels (`torch.LongTensor` of shape (R, C), *optional*): As `input_ids`, -100 where no loss is wanted; never on BOS.
            shift_labels (`torch.LongTensor` of shape (R, C), *optional*): Instead of `labels`: at each place the label of the next.
            target_ids (`torch.LongTensor` of shape (B, n, L), *optional*): Instead of `input_ids` and `labels`: n targets of each
                user that share one context (of a session-wise model, the n items of one session), pad tokens where there are fewer.
            target_positions (`torch.LongTensor` of shape (B, n), *optional*): OneRec-V2 only: history items each target may see.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the summed loss is divided by, in place of this batch's
                own number ([`loss_items`]): that of all batches of an optimizer step, as `Trainer` gives it.
            context_ids, context_mask, context_features, user_features, context_kv: See the base model's `forward`.

        Returns:
            [`SemanticIdCausalLMOutput`]; the loss is -log p(s^l | BOS, s^{<l}, context), summed over the codes of a row (OneRec
            eq. 1; Technical Report, L_NTP) or averaged (OneRec-V2, L_Gen). With `target_ids` there are no `logits`.
        """
        context: dict[str, Any]
        context = {"context_ids": context_ids, "context_mask": context_mask, "context_features": context_features}
        context |= {"user_features": user_features, "context_kv": context_kv}
        if target_ids is not None:
            others: dict[str, Any] = {
                "input_ids": input_ids,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
            }
            others |= {"past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "labels": labels}
            others |= {"shift_labels": shift_labels, "use_cache": use_cache or None}
            check_targets(self.config, target_ids, target_positions, others)
            rows = F.pad(target_ids, (1, 0), value=self.config.bos_token_id)  # (B, n, L + 1)
            rows = rows.flatten(1) if self.config.session_wise else rows.flatten(0, 1)
            positions = None if target_positions is None else target_positions.flatten()
            outputs = self.model(rows[:, :-1], target_positions=positions, use_cache=False, **context, **kwargs)
            log_probs = self.row_log_probs(outputs.last_hidden_state, rows).view(target_ids.shape)
            real = target_ids != self.config.pad_token_id
            loss = self._loss(log_probs, real, num_items_in_batch)
            return SemanticIdCausalLMOutput(loss=loss, target_log_probs=log_probs, **recorded(outputs))
        labels = checked_labels(labels, shift_labels, input_ids if inputs_embeds is None else inputs_embeds)
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
        if position_ids is None:
            past = 0 if past_key_values is None else past_key_values.get_seq_length() - hidden.shape[1]
            position_ids = past + torch.arange(hidden.shape[1], device=hidden.device)[None]
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.mask_logits_to_level(self.lm_head(hidden[:, keep]), position_ids[:, keep])
        loss = log_probs = None
        if labels is not None:
            # a prefix is read where no loss is wanted, too: `score_normalization="valid"` follows it down the catalogue
            tokens = labels
            if input_ids is not None:
                rows = F.pad(input_ids, (0, labels.shape[1] - input_ids.shape[1]))
                tokens = torch.where(labels == -100, rows, labels)
            log_probs = self.row_log_probs(hidden, tokens)
            size = self.config.num_levels + 1
            loss = self._loss(log_probs, labels.unflatten(1, (-1, size))[..., 1:] != -100, num_items_in_batch)
        return SemanticIdCausalLMOutput(
            loss=loss,
            logits=logits,
            target_log_probs=log_probs,
            past_key_values=outputs.past_key_values,
            **recorded(outputs),
        )

    def loss_items(self, real: torch.Tensor) -> torch.Tensor:
        """What the loss is a mean over, a scalar: the codes (OneRec-V2), items or sessions that `real` (B, n, L) says are there."""
        if self.config.loss_reduction == "mean":
            return real.sum()
        return (real.flatten(1) if self.config.session_wise else real.flatten(0, 1)).any(1).sum()

    def _loss(self, log_probs, real, num_items):
        """`log_probs` and `real` (rows, items, L): the mean over codes, or the sum over a row's codes averaged over rows."""
        if num_items is None:
            num_items = self.loss_items(real).clamp(min=1)
        return -torch.where(real, log_probs, 0.0).sum() / num_items

    def resize_token_embeddings(self, *args, **kwargs) -> None:
        """Refused: the vocabulary is the semantic IDs."""
        raise NotImplementedError(
            "the vocabulary of a OneRec model is its semantic IDs (codebook_sizes in the config); a token more would be no code of "
            "any item. New items get semantic IDs from the same codebooks and join the catalogue instead."
        )


__all__ = ["SemanticIdCausalLMOutput", "SemanticIdMixin", "SemanticIdModel", "SemanticIdPreTrainedModel"]
