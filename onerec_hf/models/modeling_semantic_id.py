"""What every OneRec model with a head shares: forward, loss, catalogue and `generate`.

OneRec Technical Report, section 2.2.3 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T context
positions, R = B * m rows (rows of one user adjacent), C decoder tokens, L levels, V_l codes of level l, D width.
"""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_onerec import SemanticIdConfig
from .context_embedding import AgeBias
from .decoder import SemanticIdDecoder
from .input_checks import check_targets, checked_labels
from .item_recommendation import ItemRecommendationMixin
from .layers import (
    ContextAttention,
    ContextKV,
    DecoderLayer,
    EncoderAttention,
    LevelHead,
    SelfAttention,
)
from .level_probabilities import LevelProbabilityMixin
from .modeling_outputs import CACHE, SemanticIdCausalLMOutput, given_cache, recorded
from .moe import Experts, Router
from .parallel import unsharded_class


class SemanticIdPreTrainedModel(PreTrainedModel):
    config: SemanticIdConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # where transformers looks before it switches the cache off
    accepts_loss_kwargs = False  # the loss is a mean of its own: `Trainer` divides it by the accumulation steps
    _skip_keys_device_placement = ["past_key_values", "cache", "context_kv"]
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

    @property
    def _decoder(self) -> SemanticIdDecoder:
        return getattr(self, self.base_model_prefix, self).decoder  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the decoder's tokens."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Puts a module in the place of the decoder's token embeddings."""
        self._decoder.embed_tokens = value

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, Router):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, std=self.config.initializer_range)
            init.normal_(module.down_proj, std=self.config.initializer_range)
        elif isinstance(module, AgeBias):
            init.zeros_(module.weight)


class SemanticIdForCausalLM(LevelProbabilityMixin, ItemRecommendationMixin, SemanticIdPreTrainedModel):
    """
    Head, loss, catalogue and `generate` around a base model that turns a context and codes into hidden states.

    `lm_head` is one linear map whose rows are [specials | level 1 | ... | level L]; OneRec-V2's position-specific head is the slice
    of the level (section 2.2.3). A subclass also names `GenerationMixin` among its bases, where transformers looks for it.
    """

    def __init__(self, config: Any, model: SemanticIdPreTrainedModel):
        super().__init__(config)
        self.model = model
        self.lm_head = LevelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.num_items = config.num_session_items if config.session_wise else 1
        self.generation_config.max_new_tokens = self.num_items * (config.num_levels + 1) - 1
        # `transformers.Trainer` counts the codes in `labels`; its count fits a loss that is a mean over codes, and no other
        self.accepts_loss_kwargs = config.loss_reduction == "mean"

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
        past_key_values = given_cache(past_key_values, kwargs)
        context: dict[str, Any]
        context = {"context_ids": context_ids, "context_mask": context_mask, "context_features": context_features}
        context |= {"user_features": user_features, "context_kv": context_kv}
        if target_positions is not None:  # a model whose encoder mixes the items refuses it
            context["target_positions"] = target_positions.flatten()
        if target_ids is not None:
            others: dict[str, Any] = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels}
            others |= {"shift_labels": shift_labels, "attention_mask": attention_mask, "position_ids": position_ids}
            others |= {"past_key_values": past_key_values, "use_cache": use_cache or None}
            whole = isinstance(logits_to_keep, int) and logits_to_keep == 0
            others["logits_to_keep"] = None if whole else logits_to_keep
            check_targets(self.config, target_ids, target_positions, others)
            rows = F.pad(target_ids, (1, 0), value=self.config.bos_token_id)  # (B, n, L + 1)
            rows = rows.flatten(1) if self.config.session_wise else rows.flatten(0, 1)
            outputs = self.model(rows[:, :-1], use_cache=False, **context, **kwargs)
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
            **{CACHE: outputs.get(CACHE)},
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


__all__ = ["SemanticIdCausalLMOutput", "SemanticIdForCausalLM", "SemanticIdPreTrainedModel"]
