"""`model.recommend_items` with the call that evaluation and the baselines share."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .collators import OneRecCollator
from .collators.histories import allowed_items
from .models import RecommendedItems
from .models.input_checks import at_least
from .reranker import Reranker


class ItemRanker:
    r"""
    A generative model with the call that `evaluate` and every baseline share: rows of item indices in, item indices
    out.

    Args:
        model: A OneRec model with a catalogue.
        collator (`OneRecCollator`): As in training; its `context` makes the model's inputs.
        num_beams (`int` or `Sequence[int]`, defaults to 50): Beam width, or one for each level; in the end at least
            the number of items asked for.
        reranker ([`Reranker`], *optional*): Orders what the search and its scorers propose.
    """

    def __init__(
        self,
        model: Any,
        collator: OneRecCollator,
        num_beams: int | Sequence[int] = 50,
        reranker: Reranker | None = None,
    ):
        if model.catalogue is None:
            raise ValueError("the model has no catalogue: set `model.catalogue`, or load it from a folder with one.")
        self.model, self.collator, self.num_beams, self.reranker = model, collator, num_beams, reranker

    @property
    def width(self) -> int:
        """How many items a search finds."""
        widths = at_least(self.num_beams, 1)
        return widths[-1] if isinstance(widths, list) else widths

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
        if self.reranker is None:
            return self.search(rows, k, self._allowed(rows, exclude_seen)).items.cpu().numpy()
        kind = "masked" if exclude_seen else "kept"
        found = self.reranker.rank(*self.candidates(rows, self.reranker, exclude_seen), k, kind)
        return found.items.cpu().numpy()

    def candidates(
        self, rows: list[dict], reranker: Reranker, exclude_seen: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `reranker` may choose from for the rows: item indices (B, C) and features (B, C, F)."""
        allowed = self._allowed(rows, exclude_seen)
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collator.context(rows).items()}
        context_kv = self.model.encode_context(**batch)
        found = self.model.recommend_items(
            self.width, num_beams=self.num_beams, allowed_items=allowed, context_kv=context_kv
        )
        head = self.model.score_items(context_kv=context_kv) if reranker.item_head else None
        return reranker.candidates(found, [row["history"] for row in rows], self.model.catalogue, allowed, head)

    def _allowed(self, rows: list[dict], exclude_seen: bool) -> torch.Tensor | None:
        return allowed_items(self.model.catalogue, [row["history"] for row in rows], exclude_seen, None, None)

    def search(
        self,
        rows: list[dict],
        k: int,
        allowed_items: torch.Tensor | None = None,
        num_beams: int | Sequence[int] | None = None,
        num_session_items: int | None = None,
        item_scorer: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> RecommendedItems:
        """`model.recommend_items` for rows as the collator takes them."""
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collator.context(rows).items()}
        return self.model.recommend_items(
            k,
            num_beams=num_beams or at_least(self.num_beams, k),
            allowed_items=allowed_items,
            num_session_items=num_session_items,
            item_scorer=item_scorer,
            **batch,
        )


__all__ = ["ItemRanker"]
