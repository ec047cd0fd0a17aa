"""Ranking metrics at item level: recall, hit, NDCG (Järvelin and Kekäläinen 2002), coverage, intra-list diversity,
novelty.

Shapes: **U** users, **K** slots of a list, **N** items. A slot holds an item index in `0..N-1`, best first, or -1:
nothing valid was recommended there. A slot of -1 is never a hit, and the slots after it keep their rank.
"""

from collections.abc import Sequence

import numpy as np


def match_targets(
    predictions: np.ndarray, targets: Sequence[Sequence[int]], num_items: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which slots hold a target. A user's targets are a set: an item that occurs twice counts once.

    Args:
        predictions (`np.ndarray` of shape `(U, K)`): item indices, -1 for an empty slot.
        targets (list of U lists): item indices in `0..num_items-1`, at least one per user.
        num_items (`int`): N.

    Returns:
        `hits` (bool, `(U, K)`) and `num_targets` (int64, `(U,)`).
    """
    counts = np.fromiter((len(t) for t in targets), dtype=np.int64, count=len(targets))
    if len(counts) != len(predictions) or (counts == 0).any():
        empty = int((counts == 0).sum())
        raise ValueError(
            f"targets must hold one non-empty list per row of predictions, got {len(counts)} lists ({empty} of them "
            f"empty) for {len(predictions)} rows; drop users without a target before evaluating."
        )
    items = np.fromiter((i for t in targets for i in t), dtype=np.int64, count=int(counts.sum()))
    if items.min() < 0 or items.max() >= num_items:
        raise ValueError(f"targets must be item indices in 0..{num_items - 1}, got {items.min()}..{items.max()}.")
    keys = np.unique(np.repeat(np.arange(len(counts)), counts) * num_items + items)  # one key per (user, item)
    slots = np.arange(len(predictions))[:, None] * num_items + predictions
    return np.isin(slots, keys) & (predictions >= 0), np.bincount(keys // num_items, minlength=len(counts))


def recall_at_k(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """Share of a user's targets among the first k slots, `(U,)` in [0, 1]; with one target it equals `hit_at_k`."""
    return _first(hits, k).sum(1) / num_targets


def hit_at_k(hits: np.ndarray, k: int) -> np.ndarray:
    """1.0 where at least one target is among the first k slots, else 0.0, `(U,)`."""
    return np.asarray(_first(hits, k).any(1), dtype=np.float64)


def ndcg_at_k(hits: np.ndarray, num_targets: np.ndarray, k: int) -> np.ndarray:
    """DCG@k / ideal DCG@k, `(U,)` in [0, 1]: a target at rank r (from 1) gains 1 / log2(r + 1); the ideal list has
    min(k, number of targets) targets on top. With one target this is 1 / log2(rank + 1)."""
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.minimum(num_targets, k) - 1]
    return _first(hits, k) @ discounts / ideal


def coverage_at_k(predictions: np.ndarray, k: int, num_items: int) -> float:
    """Share of the N items that are in the first k slots of at least one user."""
    items = np.unique(_first(predictions, k))
    return float((items >= 0).sum() / num_items)


def diversity_at_k(predictions: np.ndarray, k: int, item_embeddings: np.ndarray) -> np.ndarray:
    """Intra-list diversity (Ziegler et al. 2005), `(U,)`: mean cosine distance (1 - cosine, in [0, 2]) over the pairs
    of items among the first k slots; NaN for a user with fewer than two. A zero embedding has cosine 0 to all others.

    Args:
        item_embeddings (`np.ndarray` of shape `(N, D)`): one row per item index.
    """
    first = _first(predictions, k)
    norms = np.linalg.norm(item_embeddings, axis=1, keepdims=True)
    unit = item_embeddings / np.where(norms > 0, norms, 1.0)
    diversity = np.full(len(first), np.nan)
    for user, row in enumerate(first):  # one user at a time: (U, K, D) at once may not fit in memory
        vectors = unit[row[row >= 0]]
        pairs = len(vectors) * (len(vectors) - 1)
        if pairs:  # the sum over all ordered pairs is |sum of vectors|^2 - sum of |vector|^2
            total = vectors.sum(0)
            diversity[user] = 1.0 - (total @ total - (vectors * vectors).sum()) / pairs
    return diversity


def novelty_at_k(predictions: np.ndarray, k: int, counts: np.ndarray) -> np.ndarray:
    """Novelty (Zhou et al. 2010, PNAS 107), `(U,)` in bits: mean self-information -log2 p(item) of the first k slots.

    An item's p is its share of the training events, with one added to every count, so that an item never seen has a
    finite value. NaN for a user without an item.

    Args:
        counts (`np.ndarray` of shape `(N,)`): training occurrences of every item.
    """
    first = _first(predictions, k)
    bits = -np.log2((counts + 1) / (counts + 1).sum())
    filled = first >= 0
    number = filled.sum(1)
    return np.where(number > 0, np.where(filled, bits[first], 0).sum(1) / np.maximum(number, 1), np.nan)


def _first(array: np.ndarray, k: int) -> np.ndarray:
    if not 1 <= k <= array.shape[1]:
        raise ValueError(f"k must be in 1..{array.shape[1]} (the slots of the lists), got {k}.")
    return array[:, :k]
