"""What every system does with the items of a context before its own layers: codes and features, the static slot, ages.

OneRec Technical Report, section 2.2.1 (arXiv:2506.13695); OneRec-V2, section 2.2.2 (arXiv:2508.20900). Legend: B users, T context
items, L levels, n targets (or candidates) of a user, H heads.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .input_checks import check_range


class FixedEmbedding(nn.Module):
    """A given table (V, width), saved with the model and not trained: a buffer."""

    weight: Tensor

    def __init__(self, size: int, width: int):
        super().__init__()
        self.register_buffer("weight", torch.zeros(size, width))

    def forward(self, values: Tensor) -> Tensor:
        return F.embedding(values, self.weight)


class FeatureEmbedding(nn.Module):
    """Embeddings of categorical features, (..., F) -> a list of (..., width), in the order of the config; `fixed`: given ones."""

    def __init__(self, features: dict[str, int], config: Any, kind: str, fixed: Sequence[str] = ()):
        super().__init__()
        self.names, self.sizes, self.kind = list(features), list(features.values()), kind
        widths = [config.feature_embed_dims.get(name, config.context_embed_dim) for name in features]
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
                f"{self.kind} holds {given} features, the config names {len(self.names)} ({self.names}): give a tensor whose last "
                "dimension has one column per name, in this order."
            )
        if values is None:
            return []
        if values.shape[:-1] != torch.Size(shape):
            raise ValueError(
                f"{self.kind} has shape {tuple(values.shape)}: expected {(*shape, given)}, one row for each of what it describes."
            )
        for i, (name, size) in enumerate(zip(self.names, self.sizes)):
            hint = "Value 0 stands for unknown; the config says how many values there are."
            check_range(f"{self.kind}, column {i} ({name!r}),", values[..., i], size, hint)
        return [table(values[..., i]) for i, table in enumerate(self.tables)]

    def fill(self, name: str, vectors: Tensor) -> None:
        """Table of a fixed feature: row i of `vectors` (N, width) goes to value i + 1, zeros to value 0 ("unknown")."""
        table = self.tables[self.names.index(name)].get_buffer("weight")
        if vectors.shape != (table.shape[0] - 1, table.shape[1]):
            raise ValueError(
                f"vectors of {name!r} have shape {tuple(vectors.shape)}, the config says {table.shape[0] - 1} rows (its values "
                f"without 0) of width {table.shape[1]}."
            )
        table.copy_(F.pad(vectors, (0, 0, 1, 0)))


class ContextEmbedding(nn.Module):
    """
    The tables that a context is read from; each system puts its own maps on top.

    A subclass sets `static_slot`, the learned vector in front of the items, and `user_proj`, which adds the user features to it: a
    user without a history has this slot alone.
    """

    static_slot: nn.Embedding
    user_proj: nn.Module | None

    def __init__(self, config: Any, code_width: int, fixed_features: Sequence[str] = ()):
        super().__init__()
        self.config = config
        self.embed_codes = nn.Embedding(config.vocab_size, code_width, config.pad_token_id)
        self.embed_features = FeatureEmbedding(config.context_features, config, "context_features", fixed_features)
        self.embed_user = FeatureEmbedding(config.user_features, config, "user_features")
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


def item_ages(mask: Tensor) -> Tensor:
    """Age of every item of a history (B, T), oldest first: 1 for the most recent one; wherever the padding stands."""
    order = mask.long().cumsum(1)
    return (order[:, -1:] + 1 - order).clamp(min=1)


def age_buckets(age: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """
    Bucket of the age of a context item: exact up to half of the buckets, then logarithmic, as T5 does (arXiv:1910.10683).

    Args:
        age (`torch.LongTensor` of any shape): 1 for the item right before the target; 0 for the static slot.

    Returns:
        `torch.LongTensor` of the same shape, values 0 to `num_buckets - 1`.
    """
    exact = num_buckets // 2
    ratio = torch.log(age.clamp(min=exact).float() / exact) / torch.log(torch.tensor(max_distance / exact))
    large = exact + (ratio * (num_buckets - exact)).long()
    return torch.where(age < exact, age.clamp(min=0), large.clamp(max=num_buckets - 1))


def visible_ages(
    mask: Tensor, target_positions: Tensor | None, num_targets: int, name: str = "rows"
) -> tuple[Tensor, Tensor]:
    """
    What each target sees of a context whose first position is the static slot.

    Args:
        mask (`torch.BoolTensor` of shape (B, 1 + T)): True for real positions.
        target_positions (`torch.LongTensor` of B * n numbers, *optional*): History items each target may see; default all, for
            every target alike.
        num_targets (`int`): n, read where `target_positions` is given.

    Returns:
        Ages, `torch.LongTensor` of shape (B, n or 1, 1 + T): 1 for the most recent item a target sees, 0 for the static slot; and
        which positions it sees, `torch.BoolTensor` of the same shape.
    """
    order = mask.long().cumsum(1) - 1  # 0 is the static slot, 1.. the items in time order
    if target_positions is None:
        seen = order[:, -1:]
    else:
        if target_positions.numel() != len(mask) * num_targets:
            raise ValueError(
                f"target_positions has shape {tuple(target_positions.shape)}: expected one number for each of the "
                f"{len(mask) * num_targets} {name}."
            )
        check_range("target_positions", target_positions, mask.shape[1], "It counts the history items a target sees.")
        seen = target_positions.reshape(len(mask), num_targets)
    age = seen.unsqueeze(2) + 1 - order.unsqueeze(1)
    static = order.unsqueeze(1) == 0
    return age.masked_fill(static, 0), mask.unsqueeze(1) & ((age > 0) | static)


class AgeBias(nn.Embedding):
    """A learned number per head and bucket of ages, added to the attention scores: ages (...) -> (..., H). Starts at 0."""

    def __init__(self, config: Any):
        super().__init__(config.position_bias_buckets, config.num_attention_heads)
        self.max_distance = config.position_bias_max_distance

    def forward(self, age: Tensor) -> Tensor:
        return super().forward(age_buckets(age, self.num_embeddings, self.max_distance))


__all__ = ["AgeBias", "ContextEmbedding", "FeatureEmbedding", "age_buckets", "item_ages", "visible_ages"]
