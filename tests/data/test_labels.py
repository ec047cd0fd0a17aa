"""Targets from logs, with every rule on a table small enough to read."""

import math

import numpy as np
import pytest

from onerec_hf.data import event_labels, load_kuairand, session_labels

from ..conftest import shared_data

NAN = math.nan
LOG = {
    "play_time_ms": np.array([0, 6_999, 7_000, 18_000, 5_000, 60_000, -1, 9_000]),
    "duration_ms": np.array([60_000, 60_000, 60_000, 60_000, 5_000, 30_000, -1, 0]),
    "is_like": np.array([0, 1, 0, 0, 0, 1, -1, 0], dtype=np.int8),
    "is_share": np.array([0.0, 1.0, NAN, 0, 0, 0, 0, 0]),
}


def test_labels_of_events():
    found = event_labels(LOG, ["vtr", "lvtr", "ltr", "swt", "is_share"], watch_cap_ms=20_000)
    assert found.dtype == np.float32 and found.shape == (8, 5)
    expected = [
        [0, 0, 1, 1, 1, 1, NAN, NAN],  # a view of all of a short video counts; an unknown duration does not
        [0, 0, 0, 1, 1, 1, NAN, NAN],
        [0, 1, 0, 0, 0, 1, NAN, 0],
        [0, 0.34995, 0.35, 0.9, 0.25, 1, NAN, 0.45],
        [0, 1, NAN, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_allclose(found.T, expected, rtol=1e-6)
    assert event_labels(LOG, ["vtr"], view_ms=0)[:6].tolist() == [[1]] * 6


def test_labels_of_sessions():
    log = {name: values.reshape(2, 4) for name, values in LOG.items()}
    log["is_like"] = np.array([[0, 1, -1, 0], [-1, -1, -1, -1]])
    log["play_time_ms"] = np.array([[1_000, 2_000, -1, 4_000], [90_000, 90_000, -1, -1]])
    mean = session_labels(log, ["swt", "ltr"], session_cap_ms=100_000)
    np.testing.assert_allclose(mean, [[0.07, 1 / 3], [1, NAN]], rtol=1e-6)
    some = session_labels(log, ["ltr", "vtr"], reduce="any")
    np.testing.assert_allclose(some, [[1, 0], [NAN, 1]])
    nothing = session_labels({"play_time_ms": np.full((1, 3), -1)}, ["swt"], session_cap_ms=10)
    assert np.isnan(nothing).all()


def test_what_cannot_be_a_target_is_named():
    with pytest.raises(ValueError, match="no column 'is_follow'; it has"):
        event_labels(LOG, ["wtr"])
    with pytest.raises(ValueError, match="'play_time_ms' has values other than 0 and 1"):
        event_labels(LOG, ["play_time_ms"])
    with pytest.raises(ValueError, match="watch_cap_ms=None"):
        event_labels(LOG, ["swt"])
    with pytest.raises(ValueError, match="session_cap_ms=0"):
        session_labels({"play_time_ms": np.ones((1, 2))}, ["swt"], session_cap_ms=0)
    with pytest.raises(ValueError, match="reduce='max'"):
        session_labels(LOG, ["ltr"], reduce="max")
    with pytest.raises(ValueError, match="column 'is_like' holds <U3, not numbers"):
        event_labels({"is_like": np.array(["yes", "no"])}, ["ltr"])


def test_the_view_rule_is_kuairands_own():
    feedback = load_kuairand(shared_data("kuairand_pure_2022")).feedback
    rule = event_labels(feedback, ["lvtr"])[:, 0]
    known = ~np.isnan(rule)
    assert (rule[known] == feedback["long_view"][known]).mean() > 0.98
