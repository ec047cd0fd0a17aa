"""Recall by how often the target occurs in training: what a recommender does for rare items, and for items it never
saw.

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
    occurrences = np.sort(counts[[item for row in targets for item in row]])
    strata = [(0, 0)] if len(occurrences) and occurrences[0] == 0 else []
    seen = occurrences[occurrences > 0]
    if len(seen):
        quantiles = np.arange(1, num_strata + 1) / num_strata
        low = 1
        for high in np.unique(np.quantile(seen, quantiles, method="inverted_cdf")).astype(int).tolist():
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
