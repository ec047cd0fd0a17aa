"""`model.recommend_items` with the call that evaluation and the baselines share."""

from typing import Any

import numpy as np
import torch

from .collators import OneRecCollator
from .models import RecommendedItems


class ItemRanker:
    r"""
    A generative model with the call that `evaluate` and every baseline share: rows of item indices in, item indices
    out.

    Args:
        model: A OneRec model with a catalogue.
        collator (`OneRecCollator`): As in training; its `context` makes the model's inputs.
        num_beams (`int`, defaults to 50): Beam width; at least the number of items asked for.
    """

    def __init__(self, model: Any, collator: OneRecCollator, num_beams: int = 50):
        if model.catalogue is None:
            raise ValueError("the model has no catalogue: set `model.catalogue`, or load it from a folder with one.")
        self.model, self.collator, self.num_beams = model, collator, num_beams

    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool = False) -> np.ndarray:
        """
        The `k` best items of each user.

        Args:
            examples: Columns of a split (`user`, `history`, ...), B rows.
            k: Items per user, at most `num_beams`.
            exclude_seen: Keep the items of the history out of the search.

        Returns:
            `np.ndarray` of shape (B, k), int64: item indices, best first, -1 where fewer items exist.
        """
        rows = [dict(zip(examples, values)) for values in zip(*examples.values())]
        allowed = None
        if exclude_seen:
            allowed = torch.ones(len(rows), self.model.catalogue.num_items, dtype=torch.bool)
            for i, row in enumerate(rows):
                allowed[i, np.asarray(row["history"], dtype=np.int64)] = False
        return self.search(rows, k, allowed).items.cpu().numpy()

    def search(
        self,
        rows: list[dict],
        k: int,
        allowed_items: torch.Tensor | None = None,
        num_beams: int | None = None,
        num_session_items: int | None = None,
    ) -> RecommendedItems:
        """`model.recommend_items` for rows as the collator takes them."""
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collator.context(rows).items()}
        return self.model.recommend_items(
            k,
            num_beams=num_beams or self.num_beams,
            allowed_items=allowed_items,
            num_session_items=num_session_items,
            **batch,
        )


__all__ = ["ItemRanker"]
