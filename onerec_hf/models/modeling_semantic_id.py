"""What every OneRec model with a head shares: log-probabilities within a level, recommending items, forward and loss.

OneRec Technical Report, section 2.3 (arXiv:2506.13695); OneRec-V2, section 2.2 (arXiv:2508.20900). Legend: B users, T
context positions, R = B * m rows (rows of one user adjacent), C decoder tokens, L levels, V_l codes of level l, D
width, N items of the catalogue, K beams, m items of a session.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, ModelOutput
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .beam_search import beam_search
from .catalogue import Catalogue
from .configuration_onerec import SemanticIdConfig
from .generation_semantic_id import CatalogueGenerationMixin
from .input_checks import (
    asked,
    check_attention_mask,
    check_codes,
    check_finite,
    check_generate,
    check_targets,
    checked_labels,
    widths_of,
)
from .item_ids import allowed_mask
from .modeling_attention import AgeBias, ContextAttention, ContextKV, EncoderAttention, SelfAttention
from .modeling_layers import CACHE, DecoderLayer, LevelHead, OneRecPreTrainedModel, given_cache
from .moe import Experts, Router


class SemanticIdPreTrainedModel(OneRecPreTrainedModel):
    """
    The base of all generative models here, with a head or without: a context is read once, by `encode_context`, and a
    decoder over codes attends to it. Load a model by its own class or an Auto class.

    A subclass sets `context_processor`, which makes a [`ContextKV`] of the context, and `decoder`. The attention is
    `"sdpa"` or `"eager"`; `output_attentions=True` needs `"eager"`.
    """

    config: SemanticIdConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    gradient_checkpointing = False  # where transformers looks before it switches the cache off
    accepts_loss_kwargs = False  # the loss is a mean of its own: `Trainer` divides it by the accumulation steps
    _skip_keys_device_placement = ["past_key_values", "cache", "context_kv"]
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

    def _can_set_experts_implementation(self) -> bool:  # type: ignore[override]
        # no class method: whether there are experts is in the config. transformers looks for the decorator in the
        # model's own file
        return self.config.has_experts

    def encode_context(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> ContextKV:
        """
        Keys and values of the context, made once per user: what `forward`, `generate` and `recommend_items` take as
        `context_kv`.

        Args:
            context_ids (`torch.LongTensor` of shape (B, T, L)): Token ids of the histories, oldest item first (code
                plus `config.level_offsets`, padding `config.pad_token_id`). OneRecV1: T is the sum of
                `config.pathway_lengths`, each pathway padded to its length.
            context_mask (`torch.BoolTensor` of shape (B, T), *optional*): True for real items; default what is not
                padding.
            context_features (`torch.LongTensor` of shape (B, T, F), *optional*): One column for each of
                `config.context_features`, in their order; needed where there are any.
            user_features (`torch.LongTensor` of shape (B, F_u), *optional*): The same for `config.user_features`.

        Returns:
            [`ContextKV`].

        Raises:
            ValueError: Tensors of another shape, features that are missing or not in the config; on a CPU also tokens
                that are no code of their level, and feature values that the config does not have.
        """
        return self._base.context_processor(context_ids, context_mask, context_features, user_features)

    @property
    def _base(self) -> Any:
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the decoder's tokens."""
        return self._base.decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Puts a module in the place of the decoder's token embeddings."""
        self._base.decoder.embed_tokens = value

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


@dataclass
class SemanticIdCausalLMOutput(CausalLMOutputWithCrossAttentions):
    """
    Args:
        loss (`torch.FloatTensor`, a scalar): Negative log-probability of the codes, in nats (`config.loss_reduction`).
        logits (`torch.FloatTensor` of shape (R, C, vocab_size)): Scores of the next token;
            everything outside the level that comes next is the lowest finite number, so a softmax over the vocabulary
            is the softmax over the level.
        target_log_probs (`torch.FloatTensor` of shape (B, n, L)): Log-probability of each code of each target, in
            nats; with `labels` of shape (R, items, L), one row per row of `input_ids`.
        router_logits (`tuple[torch.FloatTensor]`): With `output_router_logits=True`, one (tokens, experts) tensor per
            mixture.
    """

    target_log_probs: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None


def recorded(outputs: ModelOutput) -> dict[str, Any]:
    """What a base model was asked to record, under the names of [`SemanticIdCausalLMOutput`]."""
    names = ("hidden_states", "attentions", "cross_attentions", "router_logits")
    return {name: outputs.get(name) for name in names}


class RecommendedItems(NamedTuple):
    """
    Args:
        items (`torch.LongTensor` of shape (B, k), sessions (B, k, m)): Item indices of the catalogue, best first, -1
            for none.
        scores (`torch.FloatTensor` of shape (B, k)): Natural log-probability of the semantic IDs of an item,
            or of all items of a session; `-inf` for none.
    """

    items: torch.Tensor
    scores: torch.Tensor


def _judged(found: RecommendedItems, item_scorer: Callable, k: int) -> RecommendedItems:
    """The `k` best by the numbers that `item_scorer` gives."""
    scores = item_scorer(found.items, found.scores)
    if not isinstance(scores, torch.Tensor) or scores.shape != found.scores.shape:
        what = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise ValueError(
            f"item_scorer returned {what}: a tensor of shape {tuple(found.scores.shape)}, one number each."
        )
    none = found.scores == float("-inf")
    scores = scores.to(found.scores).masked_fill(none, float("-inf"))
    if bool(scores.isnan().any()):
        raise ValueError(
            "item_scorer returned NaN, by which nothing can be ranked: return -inf for what must not come."
        )
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]  # equal ones stay in the order of the search
    shape = order.shape + (1,) * (found.items.dim() - 2)
    return RecommendedItems(found.items.take_along_dim(order.view(shape), 1), scores.gather(1, order))


class SemanticIdForCausalLM(CatalogueGenerationMixin, SemanticIdPreTrainedModel):
    """
    Head, loss, catalogue and `generate` around a base model that turns a context and codes into hidden states.

    `lm_head` is one linear map whose rows are [specials | level 1 | ... | level L]; OneRec-V2's position-specific head
    is the slice of the level (section 2.2.2). A subclass also names `GenerationMixin` among its bases, where
    transformers looks for it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}  # with config.tie_word_embeddings

    def __init__(self, config: Any, model: SemanticIdPreTrainedModel):
        super().__init__(config)
        self.model = model
        self.lm_head = LevelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        self.num_session_items = config.num_session_items if config.session_wise else 1
        self.generation_config.max_new_tokens = self.num_session_items * (config.num_levels + 1) - 1
        # `transformers.Trainer` counts the codes in `labels`; its count fits a loss that is a mean over codes, and no
        # other
        self.accepts_loss_kwargs = config.loss_reduction == "mean"

    def _require_catalogue(self, catalogue: Catalogue | None = None) -> Catalogue:
        catalogue = catalogue if catalogue is not None else self.catalogue
        if catalogue is None:
            raise ValueError(
                f"{type(self).__name__} has no catalogue. Set `model.catalogue = Catalogue(semantic_ids, "
                "codebook_sizes, item_ids)`, pass `catalogue=...`, or, in `generate`, `constrained=False` for codes "
                "without a check."
            )
        if catalogue.codebook_sizes != self.config.codebook_sizes:
            raise ValueError(
                f"the catalogue has codebook_sizes={catalogue.codebook_sizes}, the model "
                f"{self.config.codebook_sizes}: they come from different semantic IDs. Use the catalogue that the "
                "model was trained with."
            )
        # where the head computes; under offloading its weights lie elsewhere
        hook = getattr(self.lm_head, "_hf_hook", None)
        return catalogue.to(getattr(hook, "execution_device", self.lm_head.weight.device))

    def next_hidden(self, tokens: torch.Tensor, context_kv: ContextKV, cache: Any) -> torch.Tensor:
        """Last hidden state (R, D) after C more tokens (R, C) per row; `cache` grows by C positions."""
        return self.model(tokens, context_kv=context_kv, past_key_values=cache, use_cache=True).last_hidden_state[
            :, -1
        ]

    # ---- the one place where scores become log-probabilities

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
            node (`torch.LongTensor` of shape (R,), *optional*): Catalogue node of each row's prefix; None at the first
                level.
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

    def level_distributions(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> Iterator[torch.Tensor]:
        """
        The walk over the levels of given codes: the log-probabilities of every code of a level, behind the codes
        before it.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless
                numbers.

        Yields:
            `torch.FloatTensor` of shape (R, V_l) for each level l, in nats, one at a time: together they can be large.
        """
        node = None
        check_codes(self.config, "target", token_ids, (self.config.pad_token_id, -100))
        for level, offset in enumerate(self.config.level_offsets):
            yield self.level_log_probs(hidden_states[:, level], level, node)
            if self.config.score_normalization == "valid" and level + 1 < self.config.num_levels:
                code = (token_ids[:, level] - offset).clamp(min=0)
                node = self._require_catalogue().step(node, level, code).clamp(min=0)

    def code_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        Log-probability of given codes: what the loss, preference losses, RL ratios and beam scores are made of.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, L, D)): Position l is the one before code l.
            token_ids (`torch.LongTensor` of shape (R, L)): Tokens of the codes; rows of pad tokens give meaningless
                numbers.

        Returns:
            `torch.FloatTensor` of shape (R, L), in nats.
        """
        result = []
        for level, log_probs in enumerate(self.level_distributions(hidden_states, token_ids)):
            # a number in place of a tensor of offsets, whose copy to a GPU the host would wait for in every step
            code = (token_ids[:, level] - self.config.level_offsets[level]).clamp(min=0)
            result.append(log_probs.gather(1, code.unsqueeze(1)))
        return torch.cat(result, dim=1)

    def row_log_probs(self, hidden_states: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        """
        As `code_log_probs`, for whole rows: BOS and the codes of one item, and so on for every item of a session.

        Args:
            hidden_states (`torch.FloatTensor` of shape (R, C, D)): One position per token; the one of the last code
                may be missing.
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
        `logits` (R, C, vocab) with everything that cannot follow at the lowest finite number: position p of a row
        predicts level p mod (L + 1); behind the last level stands `<|sid_begin|>` of a session's next item, or
        `<|sid_end|>`. `positions` (1 or R, C).
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

    # ---- recommending

    @torch.no_grad()
    def recommend_items(
        self,
        k: int = 10,
        *,
        num_beams: int | Sequence[int] | None = None,
        allowed_items: Any = None,
        num_session_items: int | None = None,
        item_scorer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        catalogue: Catalogue | None = None,
        **context: Any,
    ) -> RecommendedItems:
        r"""
        The `k` best items of each user, or the `k` best sessions.

        The items of one semantic ID follow each other, popular ones first, and share its score. In a session, the most
        popular allowed item of a semantic ID stands for all of them.

        Args:
            k (`int`, defaults to 10): Items, or sessions, per user.
            num_beams (`int` or `Sequence[int]`, *optional*, defaults to the larger of `k` and 50): K, the width of the
                search; or one width for each level, the last of which is K.
            allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Items each user may get; or a
                list of item ids, for all users or one each.
            num_session_items (`int`, *optional*): m; returns sessions of m different items, in order. Left out, single
                items.
            item_scorer (`Callable`, *optional*): Judges all that the search found: item indices (B, K), or sessions
                (B, K, m), -1 for none, and their log-probabilities (B, K). What it returns, (B, K), ranks them and is
                their score.
            catalogue (`Catalogue`, *optional*): Instead of the model's own.
            context: `context_ids` (B, T, L), `context_mask`, `context_features`, `user_features`, or `context_kv`.

        Returns:
            [`RecommendedItems`].

        Raises:
            ValueError: For a model in training mode; the mode is not changed here, since other threads may share the
                model. With `k` above `num_beams`, without a catalogue, for a context or a mask of the wrong shape.
        """
        if self.training:
            raise ValueError("the model is in training mode, with dropout: call `model.eval()` before you search.")
        widths = widths_of(max(k, 50) if num_beams is None else num_beams, self.config.num_levels)
        width, length = widths[-1], num_session_items or 1
        if k < 1 or k > width:
            raise ValueError(f"k={k} with num_beams={num_beams}: at least 1, and at most num_beams.")
        if unknown := sorted(set(context) - {*self.context_input_names, "context_kv"}):
            raise TypeError(
                f"recommend_items does not know {unknown}; a context has {list(self.context_input_names)}."
            )
        batch = check_generate(self.config, None, None, context, length)
        catalogue = self._require_catalogue(catalogue)
        allowed = None if allowed_items is None else allowed_mask(catalogue, allowed_items)
        found = None
        if self.captured_search is not None and "context_kv" not in context:
            found = self.captured_search(catalogue, widths, context, allowed, length)
        if found is None:
            context_kv = context.pop("context_kv", None)
            if context_kv is None:
                context_kv = self.encode_context(**context)
            found = beam_search(self, catalogue, context_kv, widths, allowed, length)
        check_finite(found.scores, f"{type(self).__name__}.recommend_items")
        wanted = k if item_scorer is None else width
        if num_session_items is not None:
            items = catalogue.item_of_each(found.leaves[:, :wanted].flatten(1), allowed).view(batch, wanted, length)
            result = RecommendedItems(items, found.scores[:, :wanted])
        else:
            items, beam = catalogue._ranked_items(found.leaves[:, :, 0], wanted, allowed)
            scores = found.scores.gather(1, beam.clamp(min=0)).masked_fill(items < 0, float("-inf"))
            result = RecommendedItems(items, scores)
        return result if item_scorer is None else _judged(result, item_scorer, k)

    # ---- training

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
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
        return_loss: bool = True,
        **kwargs,
    ) -> SemanticIdCausalLMOutput:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape (R, C)): BOS and codes of one item per row; of a session-wise model,
                of every item of a session. R may be a multiple of the B contexts, the rows of one context being
                adjacent.
            labels (`torch.LongTensor` of shape (R, C), *optional*): As `input_ids`, -100 where no loss is wanted;
                never on BOS.
            shift_labels (`torch.LongTensor` of shape (R, C), *optional*): Instead of `labels`: at each
                place the label of the next.
            target_ids (`torch.LongTensor` of shape (B, n, L), *optional*): Instead of
                `input_ids` and `labels`: n targets of each user that share one context (of a session-wise model, the n
                items of one session), pad tokens where there are fewer.
            target_positions (`torch.LongTensor` of shape (B, n), *optional*): OneRec-V2 only: history items each
                target may see.
            causal_targets (`bool` or `torch.BoolTensor` of shape (B,), *optional*): OneRec-V2 only: `target_ids` are
                the next items of the history, n = T, and target i sees the items 0 to i: as `target_positions` of 1 to
                T say, computed faster. A tensor is a yes, and is not read on a GPU, which would be waited for.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the summed loss is divided by, in place of
                this batch's own number ([`loss_items`]): that of all batches of an optimizer step, as `Trainer` gives
                it.
            return_loss (`bool`, defaults to `True`): Off: no loss, the log-probabilities alone.
            context_ids, context_mask, context_features, user_features, context_kv: See the base model's `forward`.

        Returns:
            [`SemanticIdCausalLMOutput`]; the loss is -log p(s^l | BOS, s^{<l}, context), summed over the codes of a
            row (OneRec eq. 1; Technical Report, L_NTP) or averaged (OneRec-V2, L_Gen). With `target_ids` there are no
            `logits`.
        """
        past_key_values = given_cache(past_key_values, kwargs)
        # not in the signature: `Trainer` takes a name with "label" there for what every batch holds, and a batch of
        # `target_ids` would have no `eval_loss`
        labels, shift_labels = kwargs.pop("labels", None), kwargs.pop("shift_labels", None)
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
            return self._forward_targets(target_ids, num_items_in_batch, return_loss, context, kwargs)
        if asked(kwargs.get("causal_targets")):
            raise ValueError("causal_targets=True without target_ids: it says which items each of those sees.")
        given = input_ids if inputs_embeds is None else inputs_embeds
        if past_key_values is None:
            check_attention_mask(attention_mask, given)
        labels = checked_labels(labels, shift_labels, given)
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
            # `score_normalization="valid"` follows a prefix down the catalogue where no loss is wanted, too
            tokens = labels
            if input_ids is not None:
                rows = F.pad(input_ids, (0, labels.shape[1] - input_ids.shape[1]))
                tokens = torch.where(labels == -100, rows, labels)
            log_probs = self.row_log_probs(hidden, tokens)
            real = labels.unflatten(1, (-1, self.config.num_levels + 1))[..., 1:] != -100
            loss = self._loss(log_probs, real, num_items_in_batch) if return_loss else None
        return SemanticIdCausalLMOutput(
            loss=loss,
            logits=logits,
            target_log_probs=log_probs,
            **{CACHE: outputs.get(CACHE)},
            **recorded(outputs),
        )

    def _forward_targets(self, target_ids, num_items, return_loss, context, kwargs) -> SemanticIdCausalLMOutput:
        """`forward` of targets that share one context."""
        causal = asked(kwargs.get("causal_targets"))
        if causal:  # a row in front, of padding, that sees the static slot alone: as many rows as keys
            target_ids = F.pad(target_ids, (0, 0, 1, 0), value=self.config.pad_token_id)
            if context.get("target_positions") is not None:
                positions = context["target_positions"].view(len(target_ids), -1)
                context["target_positions"] = F.pad(positions, (1, 0)).flatten()
        rows = F.pad(target_ids, (1, 0), value=self.config.bos_token_id)  # (B, n, L + 1)
        rows = rows.flatten(1) if self.num_session_items > 1 else rows.flatten(0, 1)
        outputs = self.model(rows[:, :-1], use_cache=False, **context, **kwargs)
        log_probs = self.row_log_probs(outputs.last_hidden_state, rows).view(target_ids.shape)
        parts = (outputs.last_hidden_state, log_probs, target_ids, num_items)
        loss = self._target_loss(*parts) if return_loss else None
        log_probs = log_probs[:, 1:] if causal else log_probs
        return SemanticIdCausalLMOutput(loss=loss, target_log_probs=log_probs, **recorded(outputs))

    def loss_items(self, real: torch.Tensor) -> torch.Tensor:
        """What the loss is a mean over, a scalar: the codes (OneRec-V2), items or sessions that `real` (B, n, L) says
        are there.
        """
        if self.config.loss_reduction == "mean":
            return real.sum()
        return (real.flatten(1) if self.num_session_items > 1 else real.flatten(0, 1)).any(1).sum()

    def _target_loss(self, hidden_states, log_probs, target_ids, num_items):
        """The loss over the codes of `target_ids` (B, n, L); a system may add to it."""
        return self._loss(log_probs, target_ids != self.config.pad_token_id, num_items)

    def _loss(self, log_probs, real, num_items):
        """`log_probs` and `real` (rows, items, L): the mean over codes, or the sum over a row's codes averaged over
        rows.
        """
        if num_items is None:
            num_items = self.loss_items(real).clamp(min=1)
        return -torch.where(real, log_probs, 0.0).sum() / num_items

    def add_model_tags(self, tags: list[str] | str) -> None:
        """
        As `PreTrainedModel.add_model_tags`. TRL's own trainers tag a model with `"trl"` before their first step, and
        are refused here: their loss, a softmax over the codes of all levels, would silently train another model.
        """
        if "trl" in ([tags] if isinstance(tags, str) else tags):
            raise ValueError(
                f"a trainer of TRL scores {type(self).__name__} over the codes of all levels at once, which is not "
                "the model's probability. Use `OneRecSFTTrainer` instead of SFTTrainer, `IPATrainer` instead of "
                "DPOTrainer and `OneRecGRPOTrainer` instead of GRPOTrainer (`from onerec_hf.trainers import ...`), or "
                "`transformers.Trainer`. A "
                'trainer of yours whose loss is the model\'s own sets `_tag_names` without "trl".'
            )
        super().add_model_tags(tags)

    def resize_token_embeddings(self, *args, **kwargs) -> None:
        """Refused: the vocabulary is the semantic IDs."""
        raise NotImplementedError(
            "the vocabulary of a OneRec model is its semantic IDs (codebook_sizes in the config); a token more would "
            "be no code of any item. New items get semantic IDs from the same codebooks and join the catalogue "
            "instead."
        )


__all__ = ["RecommendedItems", "SemanticIdCausalLMOutput", "SemanticIdForCausalLM", "SemanticIdPreTrainedModel"]
