"""AUC, GAUC and calibration against pair counting and hand-made tables."""

import math

import numpy as np
import pytest

from onerec_hf.evaluation import auc, calibration, gauc


def pairs(labels, scores):
    """AUC by counting pairs."""
    won = [(p > n) + 0.5 * (p == n) for p in scores[labels == 1] for n in scores[labels == 0]]
    return sum(won) / len(won) if won else math.nan


def test_auc_and_gauc_count_pairs():
    rng = np.random.default_rng(0)
    users = rng.integers(8, size=200) * 10
    labels = (rng.random(200) < 0.3) & (users != 70)  # one user has no positive
    scores = rng.integers(6, size=200) / 5 + 0.1 * labels  # many ties
    labels = labels.astype(np.int8)
    assert auc(labels, scores) == pytest.approx(pairs(labels, scores))
    total, weight = 0.0, 0
    for user in np.unique(users):
        one = users == user
        value = pairs(labels[one], scores[one])
        if not math.isnan(value):
            total, weight = total + one.sum() * value, weight + one.sum()
    assert 0 < weight < 200
    assert gauc(labels, scores, users) == pytest.approx(total / weight)


def test_ends_of_the_scale():
    assert auc(np.array([0, 0, 1]), np.array([1, 2, 3])) == 1
    assert auc(np.array([1, 1, 0]), np.array([1, 2, 3])) == 0
    assert auc(np.array([1, 0, 1]), np.zeros(3)) == 0.5
    assert math.isnan(auc(np.ones(3), np.arange(3)))
    assert math.isnan(gauc(np.array([0, 1]), np.array([0, 1]), np.array([4, 5])))


def test_calibration_by_hand():
    probabilities = np.array([0.1, 0.1, 0.5, 0.9])
    labels = np.array([0, 1, 1, 1])
    found = calibration(labels, probabilities, num_bins=2)
    assert found["ratio"] == pytest.approx(1.6 / 3)
    assert found["error"] == pytest.approx((abs(1 - 0.2) + abs(2 - 1.4)) / 4)
    assert calibration(np.array([0.0, 1.0]), np.array([0.5, 0.5]), num_bins=1) == {"ratio": 1.0, "error": 0.0}


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="hold NaN"):
        auc(np.array([0, math.nan]), np.array([0, 1]))
    with pytest.raises(ValueError, match="0 or 1"):
        gauc(np.array([0, 0.5]), np.array([0, 1]), np.array([0, 0]))
    with pytest.raises(ValueError, match="two non-empty vectors"):
        calibration(np.array([]), np.array([]))
