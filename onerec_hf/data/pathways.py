"""Rows of a split -> the four feature pathways of the OneRec Technical Report (arXiv:2506.13695, section 2.2.1).

Static: features of the user. Short-term: the latest interactions. Positive-feedback: the latest ones with high engagement.
Lifelong: the whole history, compressed offline (`lifelong.py`). Every pathway has the same features.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch

from .collators import SessionCollator, event_column
from .features import EventFeature, reaches

PATHWAYS = ("short_term", "positive", "lifelong")


class PathwayCollator(SessionCollator):
    r"""
    Makes batches for OneRecV1 from the rows of [`session_splits`] with `history="all"`.

    Args:
        item_token_ids (`np.ndarray` of shape (N, L)): Token ids of every item.
        positive (`dict[str, float]`): Event columns and thresholds; an event with one of them reached is positive feedback
            (`{"is_like": 1, "long_view": 1}`). The paper says "high-engagement" and no more.
        short_term_length, positive_length, lifelong_length (`int`, default to 20, 256, 2000): Items of each pathway at most; older
            ones are dropped.
        lifelong (`"lifelong"` or `"history"`, defaults to `"lifelong"`): The list column of the lifelong pathway:
            [`compress_lifelong`]'s (its event columns are `lifelong_play_time_ms`, ...), or the history as it is, for logs in which
            no user has more than `lifelong_length` events.
        event_features, item_features, user_features, pad_token_id: As [`OneRecCollator`]. A `"gap"` is the time since the user's
            previous event in the column the pathway is cut from, positive or not.

    Batches hold, for each pathway p of `short_term`, `positive`, `lifelong`: `{p}_ids` (B, T_p, L), `{p}_mask` (B, T_p) and, where
    configured, `{p}_features` (B, T_p, F) in the order of `context_feature_sizes`, oldest first, T_p the longest of the batch and
    at least 1; `user_features` (B, F_u), the static pathway; and `target_ids` (B, n, L).
    """

    def __init__(
        self,
        item_token_ids: np.ndarray,
        *,
        positive: Mapping[str, float],
        short_term_length: int = 20,
        positive_length: int = 256,
        lifelong_length: int = 2000,
        lifelong: Literal["lifelong", "history"] = "lifelong",
        event_features: Mapping[str, EventFeature] | None = None,
        item_features: Mapping[str, np.ndarray] | None = None,
        user_features: Mapping[str, np.ndarray] | None = None,
        pad_token_id: int = 0,
    ):
        super().__init__(
            item_token_ids,
            event_features=event_features,
            item_features=item_features,
            user_features=user_features,
            pad_token_id=pad_token_id,
        )
        if lifelong not in ("lifelong", "history"):
            raise ValueError(f"lifelong={lifelong!r}: allowed are 'lifelong' (compressed) and 'history' (as it is).")
        self.positive, self.lifelong = dict(positive), lifelong
        self.lengths = dict(zip(PATHWAYS, (short_term_length, positive_length, lifelong_length)))
        if min(self.lengths.values()) < 1:
            raise ValueError(f"the pathways have lengths {self.lengths}: each holds at least one item.")

    def context(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """The tensors of all pathways, as `generate` takes them."""
        pathways = {name: [] for name in PATHWAYS}
        for row in rows:
            items, codes = self.events(row)
            feedback = {name: event_column(row, name) for name in self.positive}
            liked = reaches(feedback, self.positive) if len(items) else np.zeros(0, dtype=bool)
            pathways["short_term"].append((items, codes))
            pathways["positive"].append((items[liked], codes[liked]))
            if self.lifelong == "history":
                pathways["lifelong"].append((items, codes))
            else:
                pathways["lifelong"].append(self.events(row, "lifelong", "lifelong_"))
        batch = self.users(rows)
        for name, events in pathways.items():
            length = self.lengths[name]
            batch |= self.pad_events([(items[-length:], codes[-length:]) for items, codes in events], name)
        return batch
