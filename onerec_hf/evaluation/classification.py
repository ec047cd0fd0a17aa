"""How well predicted probabilities of feedback order and match what happened: AUC, GAUC, calibration.

GAUC is the one of the public KuaiRand tables: each user's AUC weighted by the user's events, over users with both
classes.
"""

from collections.abc import Sequence

import numpy as np


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """
    Probability that a positive is scored above a negative, ties counting half; NaN without both classes.

    Args:
        labels (`np.ndarray` of shape `(M,)`): 0 or 1.
        scores (`np.ndarray` of shape `(M,)`): larger is more likely.

    Raises:
        ValueError: no events, shapes that differ, NaN, or labels other than 0 and 1.
    """
    labels, scores = _checked(labels, scores)
    return float(_auc_by_group(labels, scores, np.zeros(len(labels), dtype=np.int64))[0][0])


def gauc(labels: np.ndarray, scores: np.ndarray, users: np.ndarray) -> float:
    """
    Mean of the users' AUCs, weighted by their events; users with one class are left out; NaN when none has both.

    Args:
        labels (`np.ndarray` of shape `(M,)`): 0 or 1.
        scores (`np.ndarray` of shape `(M,)`): larger is more likely; compared within a user alone.
        users (`np.ndarray` of shape `(M,)`): the user of every event, integers.

    Raises:
        ValueError: no events, shapes that differ, NaN, or labels other than 0 and 1.
    """
    labels, scores = _checked(labels, scores)
    values, counts = _auc_by_group(labels, scores, np.unique(users, return_inverse=True)[1])
    known = ~np.isnan(values)
    return float(np.average(values[known], weights=counts[known])) if known.any() else float("nan")


def calibration(labels: np.ndarray, probabilities: np.ndarray, num_bins: int = 10) -> dict[str, float]:
    """
    Whether probabilities are rates.

    Args:
        labels (`np.ndarray` of shape `(M,)`): in [0, 1].
        probabilities (`np.ndarray` of shape `(M,)`): in [0, 1].
        num_bins (`int`): bins of (nearly) equally many events, by probability.

    Returns:
        `ratio`: mean probability / mean label (1 is right, above is too optimistic; NaN without positives); `error`:
            the mean over bins of |mean probability - mean label|, weighted by events (expected calibration error,
            arXiv:1706.04599).
    """
    labels, probabilities = _checked(labels, probabilities, binary=False)
    order = np.argsort(probabilities, kind="stable")
    error = sum(
        abs(labels[part].sum() - probabilities[part].sum()) for part in np.array_split(order, num_bins) if len(part)
    )
    mean = labels.mean()
    return {
        "ratio": float(probabilities.mean() / mean) if mean > 0 else float("nan"),
        "error": float(error / len(labels)),
    }


def feedback_report(
    labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray, targets: Sequence[str]
) -> dict[str, float]:
    """
    All of the above for every kind of feedback; unknown labels are left out, and a kind whose labels are no 0 or 1 (a
    share of a time) is cut at its mean for AUC and GAUC.

    Args:
        labels, probabilities (`np.ndarray` of shape `(M, X)`): labels in [0, 1], NaN (or negative) where unknown.
        users (`np.ndarray` of shape `(M,)`): integers.
        targets (`Sequence[str]`): the X names.

    Returns:
        `dict[str, float]`: `{target}_auc`, `_gauc`, `_calibration` (mean probability / mean label),
        `_calibration_error`.
    """
    report: dict[str, float] = {}
    for x, target in enumerate(targets):
        known = labels[:, x] >= 0
        label, probability, user = labels[known, x], probabilities[known, x], users[known]
        match = calibration(label, probability)
        binary = label if np.isin(label, (0, 1)).all() else label > label.mean()
        report |= {f"{target}_auc": auc(binary, probability), f"{target}_gauc": gauc(binary, probability, user)}
        report |= {f"{target}_calibration": match["ratio"], f"{target}_calibration_error": match["error"]}
    return report


def _checked(labels, scores, binary: bool = True) -> tuple[np.ndarray, np.ndarray]:
    labels, scores = np.asarray(labels, dtype=np.float64), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape or not len(labels):
        raise ValueError(f"labels and scores must be two non-empty vectors, got {labels.shape} and {scores.shape}.")
    if np.isnan(labels).any() or np.isnan(scores).any():
        raise ValueError("labels or scores hold NaN: leave unknown labels out before evaluating.")
    if binary and not np.isin(labels, (0, 1)).all():
        raise ValueError("labels must be 0 or 1 for an AUC; cut a time or a share at a threshold first.")
    return labels, scores


def _auc_by_group(labels: np.ndarray, scores: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUC (NaN without both classes) and number of events of every group; `group` holds 0..G-1."""
    order = np.lexsort((scores, group))
    labels, scores, group = labels[order], scores[order], group[order]
    counts = np.bincount(group)
    first = np.cumsum(counts) - counts
    # rank inside the group, 1-based, the mean rank where scores are equal
    new = np.ones(len(group), dtype=bool)
    new[1:] = (group[1:] != group[:-1]) | (scores[1:] != scores[:-1])
    start = np.flatnonzero(new)
    length = np.diff(np.append(start, len(group)))
    rank = np.repeat(start + (length + 1) / 2, length) - first[group]
    positives = np.bincount(group, labels)
    pairs = positives * (counts - positives)
    above = np.bincount(group, rank * labels) - positives * (positives + 1) / 2
    return np.divide(above, pairs, out=np.full(len(counts), np.nan), where=pairs > 0), counts
