"""Popularity: the same list for everybody, the items that occur most in the training histories (PopRec)."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from .ranking import rank_items


class Popularity:
    """Scores an item by its number of training occurrences.

    Args:
        num_items (`int`): N, the size of the catalogue.
    """

    def __init__(self, num_items: int):
        self.num_items = num_items
        self.counts: torch.Tensor | None = None  # (N,) int64

    def fit(self, histories: Iterable[Sequence[int]]) -> "Popularity":
        """Counts; `histories` is one list of item indices per user, e.g. `dataset["train"]["history"]`."""
        items = torch.tensor([item for history in histories for item in history], dtype=torch.long)
        self.counts = torch.bincount(items, minlength=self.num_items)
        if len(self.counts) > self.num_items:
            raise ValueError(f"histories hold item index {len(self.counts) - 1}, but num_items is {self.num_items}.")
        return self

    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k most popular items for each row of `examples["history"]`, `(B, k)`; ties and -1: see `rank_items`."""
        if self.counts is None:
            raise ValueError("Popularity has no counts yet: call fit(histories) first.")
        histories = examples["history"]
        scores = self.counts.float().expand(len(histories), -1)
        return rank_items(scores, k, exclude=histories if exclude_seen else None, generator=generator)
