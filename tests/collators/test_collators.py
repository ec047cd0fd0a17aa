"""Collator and features against literal tensors."""

import numpy as np
import pytest

from onerec_hf.collators import OneRecCollator
from onerec_hf.data import EventFeature, category_codes, category_map

# five items, two levels; item i has tokens (10 + i, 20 + i)
TOKENS = np.stack([np.arange(10, 15), np.arange(20, 25)], axis=1)


def test_training_rows():
    batch = OneRecCollator(TOKENS, max_history=3)(
        [{"user": 0, "history": [4, 0, 1, 2, 3]}, {"user": 1, "history": [2, 1]}]
    )
    assert batch["context_ids"].tolist() == [[[10, 20], [11, 21], [12, 22]], [[12, 22], [0, 0], [0, 0]]]
    assert batch["context_mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["target_ids"].tolist() == [[[11, 21], [12, 22], [13, 23]], [[11, 21], [0, 0], [0, 0]]]
    assert batch["target_positions"].tolist() == [[1, 2, 3], [1, 0, 0]]
    assert set(batch) == {"context_ids", "context_mask", "target_ids", "target_positions", "causal_targets"}
    assert batch["causal_targets"].tolist() == [True, True]


def test_evaluation_rows_keep_the_whole_history_and_every_target():
    rows = [{"user": 0, "history": [0, 1, 2, 3], "targets": [4]}, {"user": 1, "history": [], "targets": [1, 2]}]
    batch = OneRecCollator(TOKENS, max_history=3)(rows)
    assert batch["context_ids"].tolist() == [[[11, 21], [12, 22], [13, 23]], [[0, 0]] * 3]
    assert batch["context_mask"].tolist() == [[True] * 3, [False] * 3]
    assert batch["target_ids"].tolist() == [[[14, 24], [0, 0]], [[11, 21], [12, 22]]]
    assert batch["target_positions"].tolist() == [[3, 0], [0, 0]]


def test_a_user_with_one_event_gives_no_target():
    batch = OneRecCollator(TOKENS)([{"user": 0, "history": [3]}])
    assert batch["context_mask"].tolist() == [[False]] and batch["target_ids"].tolist() == [[[0, 0]]]


def test_features_run_parallel_to_the_items():
    collator = OneRecCollator(
        TOKENS,
        max_history=2,
        event_features={"is_like": ("category", 3), "timestamp": ("gap", 8)},
        item_features={"author": np.array([1, 2, 1, 3, 0])},
        user_features={"city": np.array([5, 7])},
    )
    assert collator.context_feature_sizes == {"author": 4, "is_like": 3, "timestamp": 8}
    assert list(collator.context_feature_sizes) == ["author", "is_like", "timestamp"]  # columns are sorted by name
    assert collator.user_feature_sizes == {"city": 8}
    rows = [{"user": 1, "history": [0, 1, 3, 4], "is_like": [0, 1, 0, -1], "timestamp": [0, 3, 3, 1000]}]
    batch = collator(rows)
    # context: items 1 and 3; gaps 3 -> 1 + floor(log2 4) = 3, 0 -> 1 + floor(log2 1) = 1
    assert batch["context_features"].tolist() == [[[2, 2, 3], [3, 1, 1]]]
    assert batch["user_features"].tolist() == [[7]]
    # generation sees the last two events; the gap before item 3 is still known: 0, and 997 -> 1 + floor(log2 998) =
    # 10, clipped
    assert collator.context(rows)["context_features"].tolist() == [[[3, 1, 1], [0, 0, 7]]]


def test_event_features():
    assert EventFeature("category", 3).encode([0, 1, 5, -1, np.nan]).tolist() == [1, 2, 2, 0, 0]
    assert EventFeature("log", 5).encode([0, 1, 2, 3, 7, 1e9, -1, np.nan]).tolist() == [1, 2, 2, 3, 4, 4, 0, 0]
    assert EventFeature("gap", 9).encode([5, 5, 8]).tolist() == [0, 1, 3]
    with pytest.raises(ValueError, match="allowed are 'category', 'log', 'gap' and 'hour'"):
        EventFeature("bucket", 9).encode([1])


def test_category_codes_rank_by_frequency():
    known = category_map(["b", "a", "b", None, ""])
    assert known == {"b": 1, "a": 2}
    assert category_codes(["b", "a", "b", None, "", "new"], known).tolist() == [1, 2, 1, 0, 0, 0]
    assert category_codes([["x", "y"], [], ["z"], ["x"]], category_map([["x"], ["x"], ["z"]])).tolist() == [1, 0, 2, 1]
    assert category_map(["a", "b", "b", "c"], max_size=2) == {"b": 1}
    assert category_map([3.0, np.nan, 3, np.int64(4)]) == {"3": 1, "4": 2}  # whole numbers of a column with a gap


def test_errors_name_the_column():
    collator = OneRecCollator(TOKENS, event_features={"is_like": ("category", 3)})
    with pytest.raises(KeyError, match="no column 'is_like'"):
        collator([{"user": 0, "history": [0, 1]}])
    with pytest.raises(ValueError, match="'is_like' has 1 values, the history 2"):
        collator([{"user": 0, "history": [0, 1], "is_like": [1]}])
    with pytest.raises(ValueError, match=r"'author' has shape \(2,\), there are 5 items"):
        OneRecCollator(TOKENS, item_features={"author": np.array([1, 2])})
    with pytest.raises(ValueError, match="max_history=0"):
        OneRecCollator(TOKENS, max_history=0)


def test_infinite_and_huge_feedback_has_a_bucket():
    """2^63 does not fit an integer; the cast made -2^63 of it."""
    values = [float("inf"), 1e300, 2.0**63, 3.0, 0.0, -1.0, float("-inf"), float("nan")]
    assert EventFeature("category", 5).encode(values).tolist() == [4, 4, 4, 4, 1, 0, 0, 0]
    assert EventFeature("log", 24).encode(values).tolist() == [23, 23, 23, 3, 1, 0, 0, 0]
    hour = 3_600_000
    assert EventFeature("hour", 25).encode([float("inf"), 23 * hour, 25 * hour, float("nan")]).tolist() == [
        0,
        24,
        2,
        0,
    ]
    assert EventFeature("gap", 8).encode([0.0, 3.0, float("inf"), 5.0]).tolist() == [0, 3, 0, 0]
    with pytest.raises(ValueError, match="of kind 'category' takes numbers"):
        EventFeature("category", 5).encode(["a", "b"])
