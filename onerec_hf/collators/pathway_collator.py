"""Rows of a split -> the four feature pathways of the OneRec Technical Report (arXiv:2506.13695, section 2.2.1).

Static: features of the user. Short-term: the latest interactions. Positive-feedback: the latest ones with high
engagement. Lifelong: the whole history, compressed offline (`lifelong.py`). Every pathway has the same features.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from ..data.features import EventFeature, event_column, reaches
from .onerec_collator import SessionCollator

PATHWAYS = ("short_term", "positive", "lifelong")


class PathwayCollator(SessionCollator):
    r"""
    Makes batches for OneRecV1 from the rows of [`session_splits`] with `history="all"`.

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item.
        positive (`dict[str, float]`, *optional*): Event columns and thresholds; an event with one of them reached is
            positive feedback (`{"is_like": 1, "long_view": 1}`). The paper says "high-engagement" and no more.
        short_term_length, positive_length, lifelong_length (`int`, default to 20, 256, 2000): Items of each pathway,
            as in the model's config; older ones are dropped, 0 leaves the pathway out.
        lifelong (`"lifelong"` or `"history"`, defaults to `"lifelong"`): The list column of the lifelong pathway:
            [`compress_lifelong`]'s (its event columns are `lifelong_play_time_ms`, ...), or the history as it is, for
            logs in which no user has more than `lifelong_length` events.
        event_features, item_features, user_features, user_categories, pad_token_id: As [`OneRecCollator`]. A `"gap"`
            is the time since the user's previous event in the column the pathway is cut from, positive or not.

    Batches hold `context_ids` (B, T, L), `context_mask` (B, T) and, where configured, `context_features` (B, T, F), in
    which the pathways stand side by side, each padded to its length and oldest first; `user_features` (B, F_u), the
    static pathway; and `target_ids` (B, n, L).
    """

    def __init__(
        self,
        item_token_ids: np.ndarray,
        *,
        positive: Mapping[str, float] | None = None,
        short_term_length: int = 20,
        positive_length: int = 256,
        lifelong_length: int = 2000,
        lifelong: Literal["lifelong", "history"] = "lifelong",
        event_features: Mapping[str, EventFeature] | None = None,
        item_features: Mapping[str, np.ndarray] | None = None,
        user_features: Mapping[str, np.ndarray] | None = None,
        user_categories: Mapping[str, Mapping[str, int]] | None = None,
        pad_token_id: int = 0,
    ):
        super().__init__(
            item_token_ids,
            event_features=event_features,
            item_features=item_features,
            user_features=user_features,
            user_categories=user_categories,
            pad_token_id=pad_token_id,
        )
        if lifelong not in ("lifelong", "history"):
            raise ValueError(f"lifelong={lifelong!r}: allowed are 'lifelong' (compressed) and 'history' (as it is).")
        self.positive, self.lifelong = dict(positive or {}), lifelong
        self.lengths = dict(zip(PATHWAYS, (short_term_length, positive_length, lifelong_length)))
        self.settings = {"positive": self.positive, "lifelong": lifelong, "pad_token_id": pad_token_id}
        self.settings |= {f"{name}_length": length for name, length in self.lengths.items()}
        if min(self.lengths.values()) < 0 or not any(self.lengths.values()):
            raise ValueError(f"the pathways have lengths {self.lengths}: none is negative, and one is above 0.")
        if self.lengths["positive"] and not self.positive:
            raise ValueError(
                f"positive_length={positive_length} but no `positive`: name event columns and thresholds, as "
                '{"is_like": 1}, or set positive_length=0 for logs without feedback.'
            )
        self.max_history = max(self.lengths.values())

    def context(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The tensors of all pathways, as `generate` takes them."""
        pathways: dict[str, list] = {name: [] for name, length in self.lengths.items() if length}
        for row in rows:
            for name, events in pathways.items():
                items, codes = self._pathway(row, name)
                events.append((items[-self.lengths[name] :], codes[-self.lengths[name] :]))
        parts = [self.pad_events(events, self.lengths[name]) for name, events in pathways.items()]
        return {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]} | self.users(rows)

    def _pathway(self, row: dict, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Items and categories of one pathway of a row."""
        if name == "lifelong" and self.lifelong == "lifelong":
            return self.events(row, "lifelong", "lifelong_")
        items, codes = self.events(row)
        if name == "positive" and len(items):
            liked = reaches({column: event_column(row, column) for column in self.positive}, self.positive)
            return items[liked], codes[liked]
        return items, codes
