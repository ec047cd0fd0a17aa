"""Pairs of items that belong together by behaviour (OneRec Technical Report, arXiv:2506.13695, section 2.1.1).

The similarity between items is Swing (Yang et al. 2020, arXiv:2010.05525). N items, U users, P pairs, k neighbours.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from transformers.utils import logging


def swing_neighbors(
    histories: Iterable[Sequence[int]],
    num_items: int,
    k: int = 20,
    *,
    alpha: float = 1.0,
    max_users: int = 500,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """The k items most similar to each item by Swing: users who share two items and little else tie these two
    together.

    `s(i, j) = sum over users u != v with both items of w_u w_v / (alpha + |I_u and I_v|)`, `w_u = 1 / sqrt(|I_u|)`;
    I_u is the set of items of user u.

    Args:
        histories: sequences of item indices; training events only.
        num_items: N.
        k: neighbours per item.
        alpha: smoothing. The Technical Report gives no value.
        max_users: of an item with more users, so many are drawn: its cost grows with their square.
        seed: of that draw.

    Returns:
        `items` (int64, (N, k)), most similar first, lower indices first on ties, -1 where fewer items have a positive
        similarity; and `scores` (float64, (N, k)), 0 there.

    Raises:
        ValueError: an item index outside 0..N-1.
    """
    rows = [np.unique(np.asarray(history, dtype=np.int64)) for history in histories]
    flat, lengths = np.concatenate(rows or [np.zeros(0, np.int64)]), np.array([len(row) for row in rows])
    if len(flat) and not (0 <= flat.min() and flat.max() < num_items):
        raise ValueError(f"item indices must lie in 0..{num_items - 1}, got {flat.min()}..{flat.max()}")
    by_item = np.argsort(flat, kind="stable")
    users = np.repeat(np.arange(len(rows)), lengths)[by_item]
    ends = np.cumsum(np.bincount(flat, minlength=num_items))
    rng = np.random.default_rng(seed)
    items, scores = np.full((num_items, k), -1), np.zeros((num_items, k))
    for item in logging.tqdm(range(num_items), desc="Swing", unit="item"):
        own = users[ends[item - 1] if item else 0 : ends[item]]
        if len(own) < 2:
            continue
        if len(own) > max_users:
            own = np.sort(rng.choice(own, max_users, replace=False))
        others, place = np.unique(np.concatenate([rows[user] for user in own]), return_inverse=True)
        has = np.zeros((len(own), len(others)), dtype=np.float32)  # which of these items each of these users has
        has[np.repeat(np.arange(len(own)), lengths[own]), place] = 1.0
        weights = 1 / np.sqrt(lengths[own])
        swings = np.outer(weights, weights) / (alpha + has @ has.T)
        np.fill_diagonal(swings, 0.0)
        similarity = (has * (swings @ has)).sum(0)  # sum over u, v of swings[u, v] has[u, j] has[v, j]
        similarity[others == item] = 0.0
        best = np.argsort(-similarity, kind="stable")[:k]
        best = best[similarity[best] > 0]
        items[item, : len(best)], scores[item, : len(best)] = others[best], similarity[best]
    return items, scores


def item_to_item_pairs(neighbors: np.ndarray) -> np.ndarray:
    """Every item with each of its neighbours, (P, 2); `neighbors` (N, k) as [`swing_neighbors`] returns them."""
    item, slot = np.nonzero(neighbors >= 0)
    return np.stack([item, neighbors[item, slot]], axis=1)


def user_to_item_pairs(
    histories: Iterable[Sequence[int]], neighbors: np.ndarray, scores: np.ndarray, max_history: int = 50
) -> np.ndarray:
    """Every event with the most similar item among the user's latest events before it (co-click pairs).

    Args:
        histories: sequences of item indices in time order; training events only.
        neighbors, scores ((N, k)): as [`swing_neighbors`] returns them.
        max_history: how many events before it are looked at (QARM: 50).

    Returns:
        `np.ndarray` int64 of shape (P, 2), target first; the later one of equally similar items. No pair where none of
        them is a neighbour of the target, and none of an item with itself.
    """
    similar = [dict(zip(row.tolist(), score.tolist())) for row, score in zip(neighbors, scores)]
    pairs = []
    for history in histories:
        history = list(history)
        for end, target in enumerate(history):
            known = similar[target]
            recent = [item for item in history[max(0, end - max_history) : end] if item in known]
            if recent:
                pairs.append((target, max(reversed(recent), key=known.__getitem__)))
    return np.array(pairs, dtype=np.int64).reshape(-1, 2)


def behaviour_pairs(
    histories: Iterable[Sequence[int]], num_items: int, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Swing pairs and co-click pairs of the same histories; [`ItemAlignment.fit`] takes them one behind the other.

    Args:
        histories: sequences of item indices in time order; training events only.
        num_items: N.
        seed: of the users that [`swing_neighbors`] draws for items with many of them; its other settings, and those of
            [`user_to_item_pairs`], are their defaults.

    Returns:
        [`item_to_item_pairs`] and [`user_to_item_pairs`], each `np.ndarray` int64 of shape (P, 2) with its own P.

    Raises:
        ValueError: an item index outside 0..N-1.
    """
    histories = list(histories)
    neighbors, scores = swing_neighbors(histories, num_items, seed=seed)
    return item_to_item_pairs(neighbors), user_to_item_pairs(histories, neighbors, scores)
