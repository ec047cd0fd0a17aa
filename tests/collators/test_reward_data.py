"""What a reward model reads: past rates, buckets, and batches of logged exposures, against tables small enough to
read.
"""

import math

import numpy as np
import pytest
import torch

from onerec_hf.collators import RewardCollator
from onerec_hf.data import EventFeature, Interactions, SessionConfig, past_rates, quantile_codes, session_splits

NAN = math.nan
TOKENS = np.array([[4, 12, 20], [5, 13, 21], [6, 14, 22], [7, 15, 23]])


def test_quantile_codes_hold_equally_many_rows():
    assert quantile_codes(np.array([5.0, 1, 3, NAN, 2]), 2).tolist() == [2, 1, 2, 0, 1]
    values = np.random.default_rng(0).normal(size=1000)
    codes = quantile_codes(values, 10)
    assert np.bincount(codes).tolist() == [0] + [100] * 10
    assert (np.diff(codes[np.argsort(values)]) >= 0).all()
    assert len(set(quantile_codes(np.array([7.0, 7, 7, 7]), 4).tolist())) == 1  # equal values stay together
    assert quantile_codes(np.array([NAN, NAN]), 4).tolist() == [0, 0]
    infinite = np.array([np.inf, 1.0, 2.0, 3.0, -np.inf, NAN, np.inf, np.inf])
    assert quantile_codes(infinite, 3).tolist() == [3, 1, 2, 3, 1, 0, 3, 3]  # thirds of 1, 2, 3


def test_past_rates_equal_plain_python_and_never_look_ahead():
    rng = np.random.default_rng(0)
    time, index = rng.integers(0, 100, size=300), rng.integers(0, 5, size=300)
    labels = np.where(rng.random(300) < 0.1, NAN, rng.random(300) < 0.2)
    boundaries = [0, 30, 60, 60.5, 200]
    rates, counts = past_rates(time, index, labels, 6, boundaries, smoothing=3.0)
    assert rates.shape == counts.shape == (6, 6)
    logit = lambda p: math.log(p / (1 - p))  # noqa: E731
    for period in range(6):
        before = [(i, y) for t, i, y in zip(time, index, labels) if period and t < boundaries[period - 1] and y == y]
        mean = (sum(y for _, y in before) + 1) / (len(before) + 2)
        for item in range(6):
            own = [y for i, y in before if i == item]
            expected = logit((sum(own) + 3 * mean) / (len(own) + 3)) - logit(mean)
            assert rates[period, item] == pytest.approx(expected, abs=1e-5)
            assert counts[period, item] == pytest.approx(math.log(1 + len(own)), abs=1e-5)
    assert (rates[:2] == 0).all() and (abs(rates[:, 5]) < 1e-12).all()  # nothing before 0; an item that never occurs
    assert (counts[5] > counts[1])[:5].all()
    future = np.where(time >= 60, 1 - labels, labels)
    assert (past_rates(time, index, future, 6, boundaries, smoothing=3.0)[0][:4] == rates[:4]).all()
    with pytest.raises(ValueError, match="smoothing=0"):
        past_rates(time, index, labels, 6, boundaries, smoothing=0)
    for unknown in (-1, 6):  # it would be counted as another one's
        with pytest.raises(ValueError, match=r"index must lie in 0\.\.5"):
            past_rates(time, np.where(np.arange(len(index)) == 3, unknown, index), labels, 6, boundaries)


def log():
    """User 0 sees items 0, 1, 2 at 10, 20 and 35, and two more at 40; user 1 sees item 3 at 40."""
    return Interactions(
        user_index=np.array([0, 0, 0, 0, 0, 1]),
        item_index=np.array([0, 1, 2, 3, 0, 3]),
        timestamp=np.array([10, 20, 35, 40, 40, 40]),
        user_ids=np.arange(2),
        item_ids=np.arange(4),
        feedback={
            "is_like": np.array([0, 1, 0, 1, 0, -1]),
            "play_time_ms": np.array([500, 1500, 2500, 500, 9000, 250]),
            "tab": np.array([0, 1, 2, 3, 1, 0]),
        },
    )


def rows(**settings):
    quality = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "min_history": 0, "cut": "first"}
    config = SessionConfig(max_gap=0, history="all", watched=None, **quality, **settings)
    splits = session_splits(log(), config, 15, 38)
    return [row for name in ("train", "validation", "test") for row in splits[name].with_format("numpy")]


def collator(**settings):
    defaults = {"targets": ["ltr", "swt"], "session_wise": False, "label_settings": {"watch_cap_ms": 1000}}
    features = {
        "event_features": {"is_like": EventFeature("category", 3)},
        "candidate_features": {"author": np.array([1, 1, 2, 2])},
        "request_features": {"tab": EventFeature("category", 5)},
    }
    return RewardCollator(TOKENS, 5, **(defaults | features | settings))


def test_batches_of_exposures():
    """Two exposures of one instant are one row here; neither is in the other's history."""
    batch = collator()(rows()[-2:])  # user 0 at 40, user 1 at 40
    assert batch["item_ids"][0].tolist() == TOKENS[[3, 0]].tolist()
    assert batch["item_ids"][1].tolist() == [TOKENS[3].tolist(), [0, 0, 0]]
    assert batch["item_mask"].tolist() == [[True, True], [True, False]]
    assert batch["context_ids"][0].tolist() == TOKENS[[0, 1, 2]].tolist()
    assert batch["context_mask"].tolist() == [[True] * 3, [False] * 3]
    assert batch["context_features"][0, :, 0].tolist() == [1, 2, 1]
    assert collator().item_feature_sizes == {"author": 3, "tab": 5}
    assert batch["item_features"].tolist() == [[[2, 4], [1, 2]], [[2, 1], [0, 0]]]
    expected = torch.tensor([[[1, 0.5], [0, 1]], [[NAN, 0.25], [NAN, NAN]]])
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True)
    assert "item_numbers" not in batch


def test_labels_of_sessions():
    batch = collator(session_wise=True, label_settings={"session_cap_ms": 19_000})(rows()[-2:])
    expected = torch.tensor([[0.5, 0.5], [NAN, 250 / 19_000]])
    torch.testing.assert_close(batch["labels"], expected, equal_nan=True)


def test_a_row_knows_what_was_known_before_its_period():
    """Boundaries 15 and 38: the exposure at 35 sees the history before 15, those at 40 what is before 38."""
    numbers = {"rate": np.arange(12, dtype=np.float32).reshape(3, 4)}
    users = {"clicks": 100 + np.arange(6, dtype=np.float32).reshape(3, 2)}
    made = collator(boundaries=[15, 38], item_numbers=numbers, user_numbers=users)
    all_rows = rows()
    assert [row["session_start"] for row in all_rows] == [10, 20, 35, 40, 40]
    batch = made(all_rows)
    assert batch["context_mask"].sum(1).tolist() == [0, 1, 1, 3, 0]
    assert batch["context_ids"][2, 0].tolist() == TOKENS[0].tolist()
    assert made.item_number_names == ["clicks", "rate"]
    assert batch["item_numbers"][..., 1].tolist() == [[0, 0], [5, 0], [6, 0], [11, 8], [11, 0]]
    assert batch["item_numbers"][..., 0].tolist() == [[100, 0], [102, 0], [102, 0], [104, 104], [105, 0]]
    live = collator()(all_rows)
    assert live["context_mask"].sum(1).tolist() == [0, 1, 2, 3, 0]


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"'rate' has shape \(2, 4\), expected \(3, 4\)"):
        collator(boundaries=[15, 38], item_numbers={"rate": np.zeros((2, 4))})
    with pytest.raises(ValueError, match=r"\['tab'\] are named twice"):
        collator(candidate_features={"tab": np.zeros(4, dtype=int)})
    with pytest.raises(ValueError, match="of kind 'gap'"):
        collator(request_features={"timestamp": EventFeature("gap", 5)})
    with pytest.raises(ValueError, match="the log has no column 'is_follow'"):
        collator(targets=["wtr"])(rows())


def test_hour_of_the_day():
    hours = EventFeature("hour", 25).encode(np.array([0, 3_599_999, 3_600_000, 86_400_000, 1_651_766_400_000, -1]))
    assert hours.tolist() == [1, 1, 2, 1, 17, 0]  # the last time is midnight in Beijing, 16:00 UTC
