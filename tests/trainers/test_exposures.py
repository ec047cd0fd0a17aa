"""Logged exposures as rows of reinforcement learning, against plain Python over the raw events."""

import datasets
import numpy as np
import pytest

from onerec_hf import Catalogue
from onerec_hf.data import Interactions, SessionConfig, session_index
from onerec_hf.trainers import feedback_exposures, rejection_sample

# request, item, play ms, duration ms, long_view, hate; user 0 then user 1
EVENTS = [
    (0, 0, 0, 9000, 10000, 1, 0),
    (0, 0, 1, 2000, 10000, 0, 0),
    (0, 1, 2, 5000, 10000, 1, 0),
    (0, 1, 9, 8000, 10000, 1, 0),  # item 9 has no semantic ID
    (0, 1, 0, 500, 90000, 0, 0),
    (0, 2, 3, 9500, 11000, 1, 0),
    (0, 2, 1, 100, 10000, 0, 1),
    (1, 3, 2, 4000, 10000, 1, 0),
    (1, 4, 1, 6000, 10000, 1, 0),
]


def interactions():
    user, request, item, play, length, view, hate = np.array(EVENTS).T
    feedback = {"request_id": request, "play_time_ms": play, "duration_ms": length, "long_view": view, "is_hate": hate}
    time = np.array([1, 2, 10, 11, 12, 20, 21, 3, 30])
    ids, index = np.unique(item, return_inverse=True)
    return Interactions(user, index.astype(np.int64), time, np.array([100, 101]), ids * 10, feedback)


@pytest.fixture
def catalogue():
    # the order of the catalogue's items is not that of the log
    return Catalogue([[0, 0], [0, 1], [1, 0], [1, 1]], [2, 2], item_ids=[30, 20, 10, 0])


def test_requests_histories_and_advantages(catalogue):
    rows = feedback_exposures(interactions(), catalogue, positive={"long_view": 1})
    place = {0: 3, 1: 2, 2: 1, 3: 0}
    assert [row["user"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["targets"] for row in rows] == [[place[i] for i in ids] for ids in ([0, 1], [2, 0], [3, 1], [2], [1])]
    # before the request, watched, with a semantic ID
    assert [row["history"] for row in rows] == [[], [place[0]], [place[0], place[2]], [], [place[2]]]
    assert rows[2]["timestamp"] == [1, 10] and rows[2]["play_time_ms"] == [9000, 5000]
    assert [row["play_time"] for row in rows] == [11000, 13500, 9600, 4000, 6000]
    # q of the events in order: none, none | 1/2 (of 9000, 2000), 1/2, none | 1 (of 4), 0 (dislike) | none | 1
    # threshold: 75% of [.5, .5, 1, 0, 1] = 1, nothing is above it
    assert [row["advantage"] for row in rows] == [[0, 0], [0, 0], [0, -1], [0], [0]]
    inclusive = feedback_exposures(interactions(), catalogue, positive={"long_view": 1}, ties="inclusive")
    assert [row["advantage"] for row in inclusive] == [[0, 0], [0, 0], [1, -1], [0], [1]]


def test_only_later_requests_make_rows_and_the_past_still_judges(catalogue):
    rows = feedback_exposures(
        interactions(), catalogue, positive={"long_view": 1}, start=20, ties="inclusive", max_history=1
    )
    assert [row["history"] for row in rows] == [[1], [1]]
    assert [row["advantage"] for row in rows] == [[1, -1], [1]]


def test_logged_probabilities_and_user_numbers_go_with_their_events(catalogue):
    log_probs = np.arange(18, dtype=np.float64).reshape(9, 2)
    rows = feedback_exposures(
        interactions(), catalogue, positive={"long_view": 1}, log_probs=log_probs, user_ids=[7, 101, 100], request=None
    )
    assert [row["user"] for row in rows] == [2] * 6 + [1] * 2
    assert [row["log_probs"] for row in rows] == [[list(log_probs[i])] for i in (0, 1, 2, 4, 5, 6, 7, 8)]
    assert rows[1]["history"] == [3]  # each exposure is a request of its own, the one before is past


@pytest.mark.parametrize(
    "request_id",
    [
        [1, 1, 2, 1, 2, 3, 3, 1, 3],
        np.array([1, 1, 2, 1, 2, 3, 3, 1, 3], dtype=np.uint64) + np.uint64(2**63),  # equal as float64
        np.array(list("aabab") + list("ccac")),
    ],
    ids=["int64", "uint64", "text"],
)
def test_a_request_is_what_one_user_got_for_one_id(catalogue, request_id):
    """Whatever kind the ids are, and however the rows of requests lie among each other."""
    x = interactions()
    x.feedback["request_id"] = np.asarray(request_id)
    rows = feedback_exposures(x, catalogue, positive={"long_view": 1})
    place = {0: 3, 1: 2, 2: 1, 3: 0}
    assert [row["targets"] for row in rows] == [[place[i] for i in t] for t in ([0, 1], [2, 0], [3, 1], [2], [1])]
    assert [row["history"] for row in rows] == [[], [3], [3, 1], [], [1]]  # before the request's first exposure
    assert [row["play_time"] for row in rows] == [19000, 5500, 9600, 4000, 6000]
    assert "request_id" not in rows.column_names
    sessions = session_index(x, SessionConfig(request="request_id"))
    assert sessions.tolist() == [0, 0, 1, 0, 1, 2, 2, 3, 4]


@pytest.mark.parametrize("seed", range(3))
def test_rows_hold_events_of_their_user_before_their_request(seed):
    rng = np.random.default_rng(seed)
    user = np.sort(rng.integers(0, 12, 200))
    feedback = {name: rng.integers(0, 2, 200) for name in ("long_view", "is_hate")}
    feedback |= {name: rng.integers(1, 9, 200) * 1000 for name in ("play_time_ms", "duration_ms")}
    feedback["request_id"] = rng.integers(0, 5, 200)
    x = Interactions(
        user, np.arange(200), np.arange(200), np.arange(12), np.arange(200), feedback
    )  # item i is event i
    x = x.where((rng.random(200) < 0.7) & ~np.isin(user, [0, 4, 11]))
    rows = feedback_exposures(
        x, Catalogue([[i // 20, i % 20] for i in range(200)], [10, 20]), positive={"long_view": 1}
    )
    for row in rows:
        request = (user == row["user"]) & (feedback["request_id"] == feedback["request_id"][row["targets"][0]])
        assert row["targets"] == [i for i in np.flatnonzero(request) if i in x.item_index]
        before = (user == row["user"]) & (np.arange(200) < row["targets"][0]) & (feedback["long_view"] == 1)
        assert row["history"] == [i for i in np.flatnonzero(before) if i in x.item_index]


def test_errors_name_what_is_missing(catalogue):
    with pytest.raises(ValueError, match=r"no columns \['is_like'\]"):
        feedback_exposures(interactions(), catalogue, positive={"is_like": 1})
    with pytest.raises(ValueError, match=r"log_probs is \(2, 2\)"):
        feedback_exposures(interactions(), catalogue, positive={"long_view": 1}, log_probs=np.zeros((2, 2)))
    with pytest.raises(ValueError, match="start=99"):
        feedback_exposures(interactions(), catalogue, positive={"long_view": 1}, start=99)


def test_rejection_sampling_drops_the_worst_half():
    rows = datasets.Dataset.from_dict({"play_time": [5.0, 1.0, 9.0, 3.0, 7.0], "n": range(5)})
    assert rejection_sample(rows)["n"][:] == [0, 2, 4]
    assert rejection_sample(rows, drop=0.25)["n"][:] == [0, 2, 3, 4]
    with pytest.raises(ValueError, match="drop=1"):
        rejection_sample(rows, drop=1)
