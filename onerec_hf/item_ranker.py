"""`model.recommend_items` with the call that evaluation and the baselines share."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .collators import OneRecCollator
from .collators.histories import allowed_items
from .models import RecommendedItems
from .models.catalogue import Catalogue
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
        """
        `model.recommend_items` for rows as the collator takes them, without the re-ranker.

        Args:
            rows: B rows with `history` (item indices, oldest first) and what else the collator reads.
            k: Items, or sessions, per user.
            allowed_items (`torch.BoolTensor` of shape (B, N) or (1, N), *optional*): Items each user may get.
            num_beams: Width of the search, or one for each level, `k` or more in the end; default the ranker's, made
                as wide as `k`.
            num_session_items: m, for sessions of m different items; default single items.
            item_scorer: Ranks what was found: called with item indices (B, K) (sessions: (B, K, m)), -1 for none, and
                their log-probabilities (B, K); returns numbers (B, K).

        Returns:
            [`RecommendedItems`]: `items` (B, k), of sessions (B, k, m), -1 for none, and `scores` (B, k), in nats or
            `item_scorer`'s.

        Raises:
            KeyError: Rows without a column that the collator reads. ValueError: A model in training mode, `k` below 1
                or above a given `num_beams`, an `item_scorer` that returns another shape or NaN.
        """
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collator.context(rows).items()}
        return self.model.recommend_items(
            k,
            num_beams=num_beams or at_least(self.num_beams, k),
            allowed_items=allowed_items,
            num_session_items=num_session_items,
            item_scorer=item_scorer,
            **batch,
        )


def judge_ids(
    item_scorer: Any,
    catalogue: Catalogue,
    rows: Sequence[Mapping[str, Any]],
    events: Iterable[str],
    users: Mapping[str, Sequence],
    num_candidates: int | None = None,
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """
    What judges item ids, as `recommend_items` takes it, which knows indices.

    Args:
        item_scorer: A reward model, which also gets the `events` and `users` that it reads, or a function `(histories,
            items)` of lists of ids that returns a number for each item.
        rows: One per user, with `history` (indices) and event columns.
        events, users: The columns of `rows`, and user features with one value per user, that there are.
        num_candidates: How many of a user's items or sessions are judged, the first; the others get `-inf`.
    """
    ids = catalogue.item_ids

    def judge(items: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
        sessions, found = items.dim() == 3, torch.full(log_probs.shape, -torch.inf)
        real = log_probs.cpu() > -torch.inf
        real[:, real.shape[1] if num_candidates is None else num_candidates :] = False
        places = real.nonzero().tolist() if sessions else [[i] for i in real.any(1).nonzero().flatten().tolist()]
        asked = (
            [ids[items[tuple(place)].cpu().numpy()].tolist() for place in places]
            if sessions
            else [ids[items[i][real[i]].cpu().numpy()].tolist() for (i,) in places]
        )
        own = [rows[place[0]] for place in places]
        histories = [ids[np.asarray(row["history"], dtype=np.int64)].tolist() for row in own]
        if hasattr(item_scorer, "score"):
            reads = item_scorer.collator
            columns = {name: [row[name] for row in own] for name in events if name in reads.event_features}
            features = {name: [values[place[0]] for place in places] for name, values in users.items()}
            features = {name: values for name, values in features.items() if name in reads.user_feature_sizes}
            judged = item_scorer.score(histories, asked, events=columns, users=features)
        else:
            judged = item_scorer(histories, asked)
        wanted = [1 if sessions else len(one) for one in asked]
        given = [1 if np.ndim(one) == 0 else len(one) for one in judged]
        if given != wanted or any((np.ndim(one) == 0) != sessions for one in judged):
            what = "one number for each session" if sessions else "one number for each item of each user"
            raise ValueError(f"item_scorer returned {given[:5]} numbers, asked about {wanted[:5]}: {what} is needed.")
        for place, one in zip(places, judged):
            found[tuple(place) if sessions else (place[0], real[place[0]])] = torch.as_tensor(one, dtype=torch.float)
        return found.to(log_probs.device)

    return judge


__all__ = ["ItemRanker", "judge_ids"]
