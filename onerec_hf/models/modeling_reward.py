"""Reward models: the session-wise one of OneRec (arXiv:2502.18965, eq. 5 to 7) and the P-Score of the Technical Report
(arXiv:2506.13695, reward system).

Legend: B users, R = B * n rows (rows of one user adjacent), m candidates of a row, T behaviours, L levels, D width, X
objectives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .configuration_onerec import NUM_SPECIAL_TOKENS
from .configuration_reward import OneRecPScoreConfig, OneRecSessionRewardConfig, RewardConfig
from .input_checks import check_codes, check_range, checked_context
from .modeling_attention import (
    AgeBias,
    ContextAttention,
    ContextKV,
    EncoderAttention,
    KeyValueProjection,
    visible_ages,
)
from .modeling_layers import ContextEmbedding, FeatureEmbedding, OneRecPreTrainedModel


@dataclass
class RewardModelOutput(ModelOutput):
    """
    Args:
        loss (`torch.FloatTensor` of shape (1,)): Binary cross-entropy, summed over objectives, mean over known labels,
            in nats.
        logits (`torch.FloatTensor` of shape (R, X), P-Score: (R, m, X)): Log-odds of every objective.
        rewards (`torch.FloatTensor` of shape (R,), P-Score: (R, m)): The one number that ranks sessions or items.
        loss_sums (`torch.FloatTensor` of shape (X,)): The losses of every objective, summed over its known labels and
            not weighted.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    rewards: torch.Tensor | None = None
    loss_sums: torch.Tensor | None = None


def _check_item_mask(item_mask: torch.Tensor, item_ids: torch.Tensor) -> None:
    if item_mask.shape != item_ids.shape[:2]:
        raise ValueError(
            f"item_mask has shape {tuple(item_mask.shape)}: expected {tuple(item_ids.shape[:2])}, one column per item "
            "of item_ids, True for real items."
        )


class TargetAwareItems(ContextEmbedding):
    """
    e_i = v_i (.) u: every candidate together with what the user's behaviours say about it, by target attention
    (OneRec, eq. 5).

    In front of the behaviours stands the static slot, so a user without history has something to attend to. A
    candidate v_i, its attention over the behaviours a_i, their product and the user go through one non-linear map; the
    paper only names the operation.
    """

    def __init__(self, config: RewardConfig):
        dim, width = config.context_embed_dim, config.hidden_size
        super().__init__(config, dim)
        self.embed_item = FeatureEmbedding(config.item_features, config, "item_features")
        self.context_proj = nn.Linear(self.item_width, width)
        self.item_proj = nn.Linear(config.num_levels * dim + self.embed_item.width + len(config.item_numbers), width)
        self.user_proj = nn.Linear(self.embed_user.width, width, bias=False) if config.user_features else None
        self.static_slot = nn.Embedding(1, width)
        self.context_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.item_norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.key_values = KeyValueProjection(config, config.num_context_key_value_heads)
        self.attention = ContextAttention(config)
        self.position_bias = AgeBias(config)
        self.combine = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(config.dropout)

    def encode_context(
        self,
        context_ids: torch.Tensor,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
    ) -> tuple[ContextKV, torch.Tensor]:
        """Keys and values of the behaviours, and the user vector (B, D); once per user, for any number of
        candidates.
        """
        mask = checked_context(self.config, context_ids, context_mask)
        items = self.context_proj(self.dropout(self.item_vectors(context_ids, context_features)))
        user = self.static_vector(context_ids, user_features, self.dropout)  # (B, 1, D)
        states = self.context_norm(torch.cat([user, F.silu(items)], dim=1))  # (B, 1 + T, D)
        key, value = self.key_values(states)
        return ContextKV(key_states=(key,), value_states=(value,), mask=F.pad(mask, (1, 0), value=True)), user[:, 0]

    def forward(
        self,
        item_ids: torch.Tensor,
        item_features: torch.Tensor | None,
        item_numbers: torch.Tensor | None,
        context_kv: ContextKV,
        user: torch.Tensor | None,
        target_positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Candidates (R, m, L) -> e (R, m, D), v (R, m, D) and the user of every row (R, D)."""
        if item_ids.dim() != 3 or item_ids.shape[2] != self.config.num_levels:
            raise ValueError(
                f"item_ids has shape {tuple(item_ids.shape)}: expected (rows, candidates, {self.config.num_levels}), "
                "one token per level. Semantic IDs of another tokenizer do not fit this reward model."
            )
        if len(item_ids) % len(user):
            raise ValueError(f"{len(item_ids)} rows of item_ids cannot share {len(user)} contexts evenly.")
        check_range("item_ids", item_ids, self.config.vocab_size, "Padding is 0.")
        check_codes(self.config, "item_ids", item_ids, range(NUM_SPECIAL_TOKENS))
        names = self.config.item_numbers
        if (0 if item_numbers is None else item_numbers.shape[-1]) != len(names):
            raise ValueError(
                f"item_numbers must be a float tensor with one column for each of {names}, as the config names them."
            )
        if item_numbers is not None and item_numbers.shape[:-1] != item_ids.shape[:-1]:
            raise ValueError(
                f"item_numbers has shape {tuple(item_numbers.shape)}: expected {(*item_ids.shape[:-1], len(names))}."
            )
        parts = [
            self.dropout(
                torch.cat(
                    [self.embed_codes(item_ids).flatten(2), *self.embed_item(item_features, item_ids.shape[:2])], -1
                )
            )
        ]
        if names:
            parts.append(item_numbers.to(parts[0].dtype))
        items = self.item_norm(F.silu(self.item_proj(torch.cat(parts, dim=-1))))  # (R, m, D)
        mask = self._mask(context_kv.mask, len(item_ids) // len(user) * item_ids.shape[1], target_positions)
        attended, _ = self.attention(items, context_kv.key_states[0], context_kv.value_states[0], mask.to(items.dtype))
        user = user.repeat_interleave(len(item_ids) // len(user), dim=0)
        parts = [items, attended, items * attended, user.unsqueeze(1).expand_as(items)]
        return F.silu(self.combine(self.dropout(torch.cat(parts, dim=-1)))), items, user

    def _mask(self, mask, queries: int, target_positions):
        """Additive (B, H, n * m or 1, 1 + T): padding, behaviours after the candidate, and the bias over ages."""
        age, visible = visible_ages(mask, target_positions, queries, "candidates")
        bias = self.position_bias(age).masked_fill(~visible.unsqueeze(3), torch.finfo(torch.float32).min / 2)
        return bias.permute(0, 3, 1, 2)


class Tower(nn.Module):
    """One objective: a hidden layer (..., tower_size) and its log-odds (...)."""

    def __init__(self, config: RewardConfig):
        super().__init__()
        self.hidden = nn.Linear(config.hidden_size, config.tower_size)
        self.score = nn.Linear(config.tower_size, 1)

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.silu(self.hidden(states))
        return hidden, self.score(hidden).squeeze(-1)


class RewardPreTrainedModel(OneRecPreTrainedModel):
    config: RewardConfig
    base_model_prefix = "items"
    _no_split_modules = ["TargetAwareItems"]
    items: TargetAwareItems

    def get_input_embeddings(self) -> nn.Module:
        """Embeddings of the codes of behaviours and candidates."""
        return self.items.embed_codes

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AgeBias):
            init.zeros_(module.weight)

    def loss_sums(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """BCE(y^xtr, sigmoid(logits^xtr)) of each objective (X,), summed over the rows (N, X) whose label is known."""
        known = ~labels.isnan()
        losses = F.binary_cross_entropy_with_logits(
            logits.float(), labels.float().masked_fill(~known, 0.0), reduction="none"
        )
        return (losses * known).sum(0)

    def weighted_loss(
        self, sums: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """sum over objectives of w^xtr times the mean of its losses, whose sums (X,) are given, over `num_items` (X,),
        by default the known labels (N, X).
        """
        counts = (~labels.isnan()).sum(0) if num_items is None else num_items
        return (sums / counts.clamp(min=1)) @ torch.tensor(self.config.target_weights, device=sums.device)

    def _checked_labels(self, labels, shape) -> torch.Tensor:
        if tuple(labels.shape) != tuple(shape):
            raise ValueError(
                f"labels has shape {tuple(labels.shape)}: expected {tuple(shape)}, one column for each of "
                f"{self.config.targets}."
            )
        if bool(((labels < 0) | (labels > 1)).any()):
            raise ValueError("labels must lie in [0, 1], or be NaN where they are unknown; see onerec_hf.data.labels.")
        return labels.flatten(0, -2)


class OneRecSessionRewardModel(RewardPreTrainedModel):
    """
    R(u, S) of OneRec (eq. 5 to 7): target-aware items, self-attention among the items of the session, their sum, one
    tower per objective. As printed, the self-attention has no residual and no norm.
    """

    config: OneRecSessionRewardConfig

    def __init__(self, config: OneRecSessionRewardConfig):
        super().__init__(config)
        self.items = TargetAwareItems(config)
        self.session_attention = EncoderAttention(config, 0)
        self.towers = nn.ModuleList([Tower(config) for _ in config.targets])
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        item_ids: torch.Tensor,
        item_features: torch.Tensor | None = None,
        item_numbers: torch.Tensor | None = None,
        item_mask: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> RewardModelOutput:
        r"""
        Args:
            item_ids (`torch.LongTensor` of shape (R, m, L)): Token ids of the items of R sessions. R may be a multiple
                of the B contexts; the sessions of one user are adjacent.
            item_features (`torch.LongTensor` of shape (R, m, F_i), *optional*): As `config.item_features`.
            item_numbers (`torch.FloatTensor` of shape (R, m, F_n), *optional*): As `config.item_numbers`.
            item_mask (`torch.BoolTensor` of shape (R, m), *optional*): False for padding of shorter sessions.
            context_ids (`torch.LongTensor` of shape (B, T, L)): Token ids of the behaviours, oldest first.
            context_mask (`torch.BoolTensor` of shape (B, T), *optional*): True for real behaviours.
            context_features (`torch.LongTensor` of shape (B, T, F), *optional*): As `config.context_features`.
            user_features (`torch.LongTensor` of shape (B, F_u), *optional*): As `config.user_features`.
            labels (`torch.FloatTensor` of shape (R, X), *optional*): In [0, 1], NaN where unknown.
            num_items_in_batch (`torch.Tensor` of shape (X,), *optional*): What the losses of each objective are
                divided by, instead of its known labels here: those of all batches of an optimizer step.

        Returns:
            [`RewardModelOutput`]; `rewards` is the sum of `config.reward_weights` times the towers' probabilities.
        """
        context_kv, user = self.items.encode_context(context_ids, context_mask, context_features, user_features)
        items, _, _ = self.items(item_ids, item_features, item_numbers, context_kv, user)  # (R, m, D)
        if item_mask is None:
            item_mask = torch.ones(item_ids.shape[:2], dtype=torch.bool, device=item_ids.device)
        _check_item_mask(item_mask, item_ids)
        if not bool(item_mask.any(1).all()):
            raise ValueError("item_mask has a session without items: leave it out.")
        mixed, _ = self.session_attention(items, item_mask[:, None, None])
        session = (mixed * item_mask.unsqueeze(2)).sum(1)  # eq. 6: Sum(h_f)
        logits = torch.stack([tower(session)[1] for tower in self.towers], dim=-1)  # (R, X)
        loss = sums = None
        if labels is not None:
            labels = self._checked_labels(labels, logits.shape)
            sums = self.loss_sums(logits, labels)
            loss = self.weighted_loss(sums, labels, num_items_in_batch)
        weights = torch.tensor(self.config.reward_weights, device=logits.device)
        return RewardModelOutput(loss=loss, logits=logits, rewards=logits.float().sigmoid() @ weights, loss_sums=sums)


class OneRecPScoreModel(RewardPreTrainedModel):
    """
    The Technical Report's P-Score: one tower per objective with an auxiliary loss each, and one fused score, made of
    the towers' hidden states, the user and the item, that is trained on all objectives at once.

    The report's backbone is SIM (search over a very long history, then target attention); here all behaviours that are
    given are attended to.
    """

    config: OneRecPScoreConfig

    def __init__(self, config: OneRecPScoreConfig):
        super().__init__(config)
        self.items = TargetAwareItems(config)
        self.towers = nn.ModuleList([Tower(config) for _ in config.targets])
        self.fuse_hidden = nn.Linear(
            len(config.targets) * config.tower_size + 2 * config.hidden_size, config.hidden_size
        )
        self.fuse_score = nn.Linear(config.hidden_size, 1)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        item_ids: torch.Tensor,
        item_features: torch.Tensor | None = None,
        item_numbers: torch.Tensor | None = None,
        item_mask: torch.Tensor | None = None,
        context_ids: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        context_features: torch.Tensor | None = None,
        user_features: torch.Tensor | None = None,
        target_positions: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> RewardModelOutput:
        r"""
        Args:
            item_ids (`torch.LongTensor` of shape (R, m, L)): Token ids of m candidates per row, each judged alone.
            item_mask (`torch.BoolTensor` of shape (R, m), *optional*): False for padding: no part in the loss, reward
                0.
            target_positions (`torch.LongTensor` of shape (R, m), *optional*): How many behaviours each candidate
                may see; default all. So one context serves all of a user's logged exposures in one pass.
            labels (`torch.FloatTensor` of shape (R, m, X), *optional*): In [0, 1], NaN where unknown.
            item_features, item_numbers, context_ids, context_mask, context_features, user_features,
                num_items_in_batch: As [`OneRecSessionRewardModel`].

        Returns:
            [`RewardModelOutput`]; `rewards` is the P-Score, in (0, 1). The loss is the towers' auxiliary loss plus
            `config.fused_weight` times L_P = sum of w^xtr BCE(y^xtr, p), the same p in every term.
        """
        context_kv, user = self.items.encode_context(context_ids, context_mask, context_features, user_features)
        states, items, user = self.items(item_ids, item_features, item_numbers, context_kv, user, target_positions)
        hidden, log_odds = zip(*(tower(states) for tower in self.towers))
        logits = torch.stack(log_odds, dim=-1)  # (R, m, X)
        parts = [*hidden, user.unsqueeze(1).expand_as(items), items]
        fused = self.fuse_score(F.silu(self.fuse_hidden(torch.cat(parts, dim=-1)))).squeeze(-1)  # (R, m)
        rewards = fused.float().sigmoid()
        if item_mask is not None:
            _check_item_mask(item_mask, item_ids)
            rewards = rewards * item_mask
        loss = sums = None
        if labels is not None:
            if item_mask is not None:
                labels = labels.masked_fill(~item_mask.unsqueeze(-1), torch.nan)
            labels = self._checked_labels(labels, logits.shape)
            repeated = fused.flatten().unsqueeze(1).expand(-1, logits.shape[2])
            sums = self.loss_sums(logits.flatten(0, 1), labels)
            sums = sums + self.config.fused_weight * self.loss_sums(repeated, labels)
            loss = self.weighted_loss(sums, labels, num_items_in_batch)
        return RewardModelOutput(loss=loss, logits=logits, rewards=rewards, loss_sums=sums)


__all__ = [
    "OneRecPScoreModel",
    "OneRecSessionRewardModel",
    "RewardModelOutput",
    "RewardPreTrainedModel",
]
