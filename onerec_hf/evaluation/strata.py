"""Recall by how often the target occurs in training and by the length of the history: what a recommender does for rare
items, for items it never saw, and for users it hardly knows.

Shapes: **U** users, **K** slots of a list, **N** items.
"""

from collections.abc import Sequence

import numpy as np


def frequency_strata(
    counts: np.ndarray, targets: Sequence[Sequence[int]], num_strata: int = 4
) -> list[tuple[int, int]]:
    """Ranges of training occurrences that hold about the same number of targets each, and 0 (cold items) by itself.

    Args:
        counts (`np.ndarray` of shape `(N,)`): training occurrences of every item.
        targets (list of U lists): item indices.
        num_strata (`int`, defaults to 4): ranges above 0; fewer come back where counts tie.

    Returns:
        Inclusive ranges `(low, high)`, ascending, that cover every count of a target once.
    """
    return _ranges(counts[[item for row in targets for item in row]], num_strata)


def history_strata(lengths: Sequence[int], num_strata: int = 4) -> list[tuple[int, int]]:
    """Ranges of the length of a history that hold about the same number of users each; empty ones by themselves.

    Args:
        lengths (U integers): items of each user's history.
        num_strata (`int`, defaults to 4): ranges above 0; fewer come back where lengths tie.

    Returns:
        Inclusive ranges `(low, high)`, ascending, that cover every length once.
    """
    return _ranges(np.asarray(lengths), num_strata)


def _ranges(values: np.ndarray, num_ranges: int) -> list[tuple[int, int]]:
    strata = [(0, 0)] if (values == 0).any() else []
    positive = values[values > 0]
    if len(positive):
        quantiles = np.arange(1, num_ranges + 1) / num_ranges
        low = 1
        for high in np.unique(np.quantile(positive, quantiles, method="inverted_cdf")).astype(int).tolist():
            strata.append((low, high))
            low = high + 1
    return strata


def recall_by_frequency(
    predictions: np.ndarray,
    targets: Sequence[Sequence[int]],
    counts: np.ndarray,
    strata: Sequence[tuple[int, int]],
    k: int = 10,
) -> list[tuple[float, int]]:
    """Share of the targets of each stratum that are among the first k slots of their user's list.

    Args:
        predictions (`np.ndarray` of shape `(U, K)`): item indices, -1 for an empty slot.
        targets, counts, strata: see `frequency_strata`.

    Returns:
        `(recall, number of targets)` per stratum; NaN for a stratum without a target.
    """
    if not 1 <= k <= predictions.shape[1] or len(predictions) != len(targets):
        raise ValueError(
            f"need 1 <= k <= {predictions.shape[1]} (slots) and one row of predictions per user, got k = {k} and "
            f"{len(predictions)} rows for {len(targets)} users."
        )
    user = np.repeat(np.arange(len(targets)), [len(row) for row in targets])
    item = np.array([item for row in targets for item in row])
    hits = (predictions[user, :k] == item[:, None]).any(1)
    result = []
    for low, high in strata:
        inside = (counts[item] >= low) & (counts[item] <= high)
        result.append((float(hits[inside].mean()) if inside.any() else float("nan"), int(inside.sum())))
    return result


def recall_by_history(
    recalls: np.ndarray, lengths: Sequence[int], strata: Sequence[tuple[int, int]]
) -> list[tuple[float, int]]:
    """Mean recall of the users of each stratum.

    Args:
        recalls (`np.ndarray` of shape `(U,)`): as `evaluate` gives them, `per_user["recall@10"]`.
        lengths, strata: see `history_strata`.

    Returns:
        `(recall, number of users)` per stratum; NaN for a stratum without a user.
    """
    sizes, result = np.asarray(lengths), []
    if len(recalls) != len(sizes):
        raise ValueError(f"need one recall and one length per user, got {len(recalls)} and {len(sizes)}.")
    for low, high in strata:
        inside = (sizes >= low) & (sizes <= high)
        result.append((float(recalls[inside].mean()) if inside.any() else float("nan"), int(inside.sum())))
    return result
