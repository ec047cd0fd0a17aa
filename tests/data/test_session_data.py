"""Sessions and their rows against literal values and a brute force over the raw log; leaks; every kind of bad
input.
"""

import itertools
import logging

import numpy as np
import pandas as pd
import pytest

from onerec_hf.collators import OneRecCollator, SessionCollator
from onerec_hf.data import (
    SessionConfig,
    leave_last_out,
    load_interactions,
    load_kuairand,
    session_criteria,
    session_index,
    session_splits,
    training_events,
)
from onerec_hf.simulator import ShortVideoWorld

from ..conftest import shared_data

FEEDBACK = ["request_id", "play_time_ms", "is_click", "is_like", "is_follow", "is_forward"]
SIMULATED = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
OFF = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}


def log_of(user, item, time, **feedback):
    return load_interactions(
        {"user_id": user, "item_id": item, "timestamp": time, **feedback}, feedback=list(feedback)
    )


def random_log(seed, users=12, events=500):
    """Requests of neighbouring events, some of which overlap in time; ties, repeats, unknown (-1) feedback."""
    rng = np.random.default_rng(seed)
    log = {"user_id": rng.integers(0, users, events), "item_id": rng.integers(0, 25, events)}
    log["timestamp"] = rng.integers(0, 300, events)
    log["request_id"] = (log["timestamp"] + rng.integers(0, 4, events)) // 40
    log["play_time_ms"] = rng.integers(-1, 20, events) * 1000
    log["is_click"] = (log["play_time_ms"] > 7000).astype(int)
    for name in ("is_like", "is_follow", "is_forward"):
        log[name] = (rng.random(events) < 0.1).astype(int) - (rng.random(events) < 0.1)
    return log


def warnings_of(caplog):
    return " | ".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_sessions_by_request_may_interleave_and_by_gap_may_not():
    x = log_of([1] * 6 + [2], range(7), [0, 1, 2, 3, 10, 11, 11], r=[5, 6, 5, 6, 5, 7, 7])
    assert session_index(x, SessionConfig(request="r")).tolist() == [0, 1, 0, 1, 0, 2, 3]
    assert session_index(x, SessionConfig(request="r", max_events=2)).tolist() == [0, 1, 0, 1, 2, 3, 4]
    assert session_index(x, SessionConfig(max_gap=1)).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert session_index(x, SessionConfig(max_gap=6)).tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert session_index(x, SessionConfig(max_gap=7, max_events=4)).tolist() == [0, 0, 0, 0, 1, 1, 2]
    x = log_of([1, 1], [1, 2], [0, 0], r=["b", "a"])
    assert session_index(x, SessionConfig(request="r")).tolist() == [0, 1]


def test_each_criterion_by_hand():
    # session 0: item 1 twice, 9 + 9 + 2 s, one event with two reactions; session 1: three items, 10 s and one unknown
    feedback = {"play_time_ms": [9000, 9000, 2000, 5000, 5000, -1], "is_click": [1, 1, 0, 1, 1, 1]}
    reactions = {"is_like": [1, 0, 0, 0, 0, -1], "is_follow": [1, 0, 0, 0, 0, 0], "is_forward": [0] * 6}
    x = log_of([1] * 6, [1, 1, 2, 3, 4, 5], range(6), request_id=[0, 0, 0, 1, 1, 1], **feedback, **reactions)

    def meets(**limits):
        config = SessionConfig(request="request_id", **limits)
        return {name: met.tolist() for name, met in session_criteria(x, session_index(x, config), config).items()}

    limits = {"min_watched": 2, "min_watch_time_ms": 20_000, "min_interactions": 2}
    expected = {"min_watched": [False, True], "min_watch_time_ms": [True, False], "min_interactions": [True, False]}
    assert meets(**limits) == expected
    assert meets(**limits | {"min_watched": 1})["min_watched"] == [True, True]
    assert meets(**limits | {"min_watch_time_ms": 20_001})["min_watch_time_ms"] == [False, False]
    assert meets(**limits | {"min_watch_time_ms": 10_000})["min_watch_time_ms"] == [
        True,
        True,
    ]  # -1 is unknown, not -1 ms
    assert meets(**limits, watched={"play_time_ms": 2000})["min_watched"] == [True, True]
    assert meets(**OFF) == {}


def brute_force(log, config, validation_start, test_start):
    """The rows of every split from the definitions, one Python object per event."""
    users = {}
    for values in zip(*(log[name].tolist() for name in log)):
        event = dict(zip(log, values))
        users.setdefault(event["user_id"], []).append(event)
    rows = {"train": [], "validation": [], "test": []}
    for user, events in sorted(users.items()):
        events.sort(key=lambda event: event["timestamp"])

        def reached(event, thresholds):
            return [event[name] >= least for name, least in thresholds.items()]

        for i, event in enumerate(events):
            event["watched"] = config.watched is None or any(reached(event, config.watched))
            event["effective"] = event["watched"] or any(reached(event, config.interactions))
            if config.request:
                event["session"] = event["request_id"]
            elif i == 0 or event["timestamp"] - events[i - 1]["timestamp"] > config.max_gap:
                event["session"] = i
            else:
                event["session"] = events[i - 1]["session"]
        sessions = {}
        for event in events:
            sessions.setdefault(event["session"], []).append(event)
        sessions = list(sessions.values())
        if config.max_events:
            sessions = [s[i : i + config.max_events] for s in sessions for i in range(0, len(s), config.max_events)]
        sessions.sort(key=lambda s: min(events.index(event) for event in s))
        good = [s for s in sessions if quality(s, config, reached)]
        for name, session in assigned(good, validation_start, test_start):
            start = session[0]["timestamp"]
            past = [e for e in events if e["timestamp"] < start and (config.history == "all" or e["effective"])]
            past = past[-config.max_history :]
            if len(past) >= config.min_history:
                rows[name].append((user, start, past, cut(session, config)))
    return rows


def quality(session, config, reached):
    checks = []
    if config.min_watched:
        checks.append(len({e["item_id"] for e in session if e["watched"]}) >= config.min_watched)
    if config.min_watch_time_ms:
        checks.append(sum(max(e["play_time_ms"], 0) for e in session) >= config.min_watch_time_ms)
    if config.min_interactions:
        checks.append(sum(sum(reached(e, config.interactions)) for e in session) >= config.min_interactions)
    return (all if config.require == "all" else any)(checks) if checks else True


def assigned(sessions, validation_start, test_start):
    """(split, session) of the sessions of one user that do not run on into what is held out."""
    for i, session in enumerate(sessions):
        left, start, end = len(sessions) - 1 - i, session[0]["timestamp"], session[-1]["timestamp"]
        if validation_start is not None:
            name = "train" if start < validation_start else "validation" if start < test_start else "test"
            limit = {"train": validation_start, "validation": test_start, "test": np.inf}[name]
            if end < limit:
                yield name, session
            continue
        held_out = 0 if len(sessions) == 1 else 1 if len(sessions) == 2 else 2
        name = "train" if left >= held_out else "test" if left == 0 else "validation"
        later = [s[0]["timestamp"] for s in sessions[i + 1 :]][-held_out:] if held_out else []
        if name == "test" or all(end <= time for time in later):
            yield name, session


def cut(session, config):
    candidates = []
    for item in dict.fromkeys(e["item_id"] for e in session):
        views = [e for e in session if e["item_id"] == item]
        watched = [e for e in views if e["watched"]]
        candidates.append(watched[0] if watched and config.cut == "watched" else views[0])
    candidates.sort(key=session.index)
    if config.cut == "watched":
        candidates.sort(key=lambda e: not e["watched"])
    return sorted(candidates[: config.session_size], key=session.index)


CONFIGS = [
    SessionConfig(request="request_id", min_watched=2, min_watch_time_ms=20_000, session_size=3, max_history=9),
    SessionConfig(request="request_id", require="any", min_watched=3, min_watch_time_ms=45_000, history="all"),
    SessionConfig(request="request_id", **OFF, cut="first", session_size=2, min_history=0, max_events=3),
    SessionConfig(max_gap=4, min_watched=2, min_watch_time_ms=0, watched={"play_time_ms": 12_000, "is_like": 1}),
    SessionConfig(max_gap=6, max_events=4, min_watched=0, min_watch_time_ms=15_000, interactions={"is_like": 1}),
]


@pytest.mark.parametrize(("number", "by_time"), itertools.product(range(len(CONFIGS)), [True, False]))
def test_rows_against_brute_force(number, by_time):
    config, log = CONFIGS[number], random_log(number)
    x = load_interactions(log, feedback=FEEDBACK)
    boundaries = (150, 220) if by_time else (None, None)
    splits = session_splits(x, config, *boundaries)
    expected = brute_force(log, config, *boundaries)
    columns = [name for name in ("timestamp", *FEEDBACK) if name != config.request]
    for name, split in splits.items():
        assert len(split) == len(expected[name]) > 0
        for row, (user, start, past, session) in zip(split, expected[name]):
            assert (x.user_ids[row["user"]], row["session_start"]) == (user, start)
            assert x.item_ids[row["history"]].tolist() == [event["item_id"] for event in past]
            assert x.item_ids[row["targets"]].tolist() == [event["item_id"] for event in session]
            for column in columns:
                assert row[column] == [event[column] for event in past]
                assert row[f"target_{column}"] == [event[column] for event in session]
    assert set(splits["test"].column_names) == {"user", "session_start", "history", "targets"} | {
        prefix + column for column in columns for prefix in ("", "target_")
    }


@pytest.mark.parametrize("by_time", [True, False])
def test_no_row_sees_its_session_or_what_is_held_out(by_time):
    x = load_interactions(random_log(9, events=2000), feedback=FEEDBACK)
    config = SessionConfig(request="request_id", **OFF, history="all")
    splits = session_splits(x, config, *((150, 220) if by_time else (None, None)))
    held_out = {}
    for name in ("test", "validation", "train"):
        for row in splits[name]:
            assert not row["timestamp"] or max(row["timestamp"]) < row["session_start"]
            latest = max(row["target_timestamp"])
            if by_time:
                assert latest < {"train": 150, "validation": 220, "test": 10**9}[name]
            else:
                assert latest <= held_out.get(row["user"], 10**9)
        if not by_time and name != "train":
            held_out |= {row["user"]: row["session_start"] for row in splits[name]}
    known = training_events(x, config, splits, 150 if by_time else None)
    for row in known:
        assert max(row["timestamp"]) < (150 if by_time else held_out.get(row["user"], 10**9))
    effective = config.effective_events(x)
    if by_time:
        assert sum(map(len, known["history"])) == (effective & (x.timestamp < 150)).sum() > 0
    assert known.column_names == leave_last_out(x)["train"].column_names


def test_one_event_per_session_is_leave_last_out():
    rng = np.random.default_rng(0)
    x = load_interactions(
        {"user_id": rng.integers(0, 60, 400), "item_id": rng.integers(0, 20, 400)}, columns={"timestamp": None}
    )
    config = SessionConfig(max_gap=0, max_events=1, watched=None, interactions={}, **OFF)
    rows, protocol = session_splits(x, config), leave_last_out(x)
    for name in ("validation", "test"):
        for column in ("user", "history", "timestamp", "targets"):
            assert rows[name][column][:] == protocol[name][column][:]
    expected = [
        (row["history"][:i], [row["history"][i]]) for row in protocol["train"] for i in range(1, len(row["history"]))
    ]
    assert [(row["history"], row["targets"]) for row in rows["train"]] == expected


def test_counts_are_logged(caplog):
    x = log_of([1] * 4, [1, 2, 3, 4], range(4), r=[0, 0, 1, 2], is_click=[1, 1, 1, 1])
    config = SessionConfig(request="r", interactions={}, **OFF | {"min_watched": 1})
    with pytest.raises(
        ValueError, match=r"no rows in \['train'\]: 3 sessions meet the criteria, 1 of them lack a history"
    ):
        session_splits(x, config)
    assert "3 of 3 sessions meet all of the criteria" in warnings_of(caplog)
    assert "1 sessions have a history of fewer than 1 events" in warnings_of(caplog)
    x = log_of([1] * 4 + [2], [1, 2, 3, 4, 1], [0, 1, 2, 3, 0], r=[0, 1, 0, 2, 3], is_click=[1] * 5)
    session_splits(x, SessionConfig(request="r", interactions={}, min_history=0, **OFF))
    assert "1 sessions run on into" in warnings_of(
        caplog
    )  # request 0 ends after request 1, the validation one, begins


def test_no_session_passes_says_how_many_failed_what():
    x = load_interactions(random_log(0), feedback=FEEDBACK)
    config = SessionConfig(request="request_id", min_watched=1, min_watch_time_ms=1e9, min_interactions=400)
    with pytest.raises(
        ValueError, match=r"0 of (\d+) sessions.*'min_watch_time_ms=1e\+09': \1, 'min_interactions=400': \1"
    ):
        session_splits(x, config)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"request": None}, "give exactly one"),
        ({"max_gap": 3}, "give exactly one"),
        (
            {"request": "session"},
            r"no event column 'session', which SessionConfig.request names; the log has \['is_click'",
        ),
        ({"watched": {"long_view": 1}}, "no event column 'long_view', which SessionConfig.watched names"),
        ({"watched": {"is_click": 0}}, r"thresholds of \['is_click'\] must be above 0"),
        ({"watch_time": "seconds"}, "SessionConfig.watch_time names"),
        ({"interactions": {"is_shared": 1}}, "SessionConfig.interactions names"),
        ({"require": "some"}, r"require='some': allowed are \('all', 'any'\)"),
        ({"session_size": 0}, "session_size=0: it must be a number of at least 1"),
        ({"session_size": [2, 3]}, "session_size=.2, 3.: it must be a number of at least 1"),
        ({"max_events": 0}, "max_events=0"),
        ({"min_watch_time_ms": float("nan")}, "min_watch_time_ms=nan"),
    ],
)
def test_bad_settings(change, match):
    x = load_interactions(random_log(0), feedback=FEEDBACK)
    with pytest.raises(ValueError, match=match):
        session_splits(x, SessionConfig(**{"request": "request_id", "min_watched": 1, **change}))


def test_bad_logs_and_boundaries():
    log = random_log(0)
    config = SessionConfig(request="request_id", **OFF)
    with pytest.raises(ValueError, match=r"\{'request_id': 1\}.*drop_nulls=True"):
        load_interactions(pd.DataFrame(log).assign(request_id=[np.nan, *log["request_id"][1:]]), feedback=FEEDBACK)
    x = load_interactions(log | {"is_click": log["is_click"].astype(float)}, feedback=FEEDBACK)
    x.feedback["is_click"][3] = np.nan
    with pytest.raises(ValueError, match=r"1 of 500 values of 'is_click' are NaN \(SessionConfig.watched\)"):
        session_splits(x, config)
    with pytest.raises(ValueError, match=r"may not be named \['target_score'\]"):
        load_interactions(log | {"target_score": log["is_click"]}, feedback=[*FEEDBACK, "target_score"])
    x = load_interactions(log | {"is_click": ["yes"] * 500}, feedback=FEEDBACK)
    with pytest.raises(ValueError, match=r"'is_click' holds <U3, not numbers; SessionConfig.watched compares"):
        session_splits(x, config)
    x = load_interactions(log, feedback=FEEDBACK)
    for boundaries, match in [
        ((5, None), "lie before"),
        ((5, 5), "lie before"),
        ((None, 5), "both boundaries or none"),
    ]:
        with pytest.raises(ValueError, match=match):
            session_splits(x, config, *boundaries)
    with pytest.raises(ValueError, match=r"no rows in \['test'\].*start from 0 to .*boundaries are 150 and 1000"):
        session_splits(x, config, 150, 1000)
    shuffled = np.random.default_rng(0).permutation(500)
    rows = load_interactions({name: values[shuffled] for name, values in log.items()}, feedback=FEEDBACK)
    assert len(session_splits(rows, config)["test"]) == len(session_splits(x, config)["test"])  # sorted when loaded


def test_sessions_and_requests_become_batches():
    tokens = np.stack([np.arange(10, 20), np.arange(30, 40)], axis=1)
    rows = [{"user": 0, "history": [0, 1, 2], "targets": [5, 6, 7]}, {"user": 1, "history": [3], "targets": [8]}]
    batch = SessionCollator(tokens, max_history=2)(rows)
    assert set(batch) == {"context_ids", "context_mask", "target_ids"}
    assert batch["context_ids"].tolist() == [[[11, 31], [12, 32]], [[13, 33], [0, 0]]]
    assert batch["context_mask"].tolist() == [[True, True], [True, False]]
    assert batch["target_ids"].tolist() == [[[15, 35], [16, 36], [17, 37]], [[18, 38], [0, 0], [0, 0]]]
    with pytest.raises(ValueError, match=r"no column 'targets', only \['history', 'user'\].*session_splits"):
        SessionCollator(tokens)([{"user": 0, "history": [1, 2]}])
    # OneRec-V2: k impressions of one request share one context, all of which each of them sees
    shared = OneRecCollator(tokens, max_history=2)(rows)
    assert shared["target_ids"].tolist() == batch["target_ids"].tolist()
    assert shared["target_positions"].tolist() == [[2, 2, 2], [1, 0, 0]]


def test_simulated_log_becomes_sessions():
    world = ShortVideoWorld(num_users=80, num_items=200, request_size=10, mean_events=80)
    log = world.logs()
    x = load_interactions(log, columns=SIMULATED, feedback=FEEDBACK)
    splits = session_splits(x, SessionConfig(request="request_id", require="any"))
    requests = log.groupby("request_id")
    reactions = requests[["is_like", "is_follow", "is_forward"]].sum().sum(axis=1)
    good = (requests.is_click.sum() >= 5) | (requests.play_time_ms.sum() >= 60_000) | (reactions >= 1)
    starts = set(requests.time_ms.first()[good])
    found = [row["session_start"] for split in splits.values() for row in split]
    assert set(found) <= starts and len(found) > 0.7 * good.sum()  # the rest lacks a history
    impressions = session_splits(x, SessionConfig(request="request_id", **OFF, cut="first", session_size=10))
    row = impressions["test"][5]
    shown = log[(log.user_id == x.user_ids[row["user"]]) & (log.time_ms >= row["session_start"])]
    assert row["target_timestamp"] == shown.time_ms.tolist()
    assert x.item_ids[row["targets"]].tolist() == shown.video_id.tolist()
    assert row["target_play_time_ms"] == shown.play_time_ms.tolist()


@pytest.mark.shared_data
def test_kuairand_becomes_sessions():
    folder = shared_data("kuairand_pure_2022")
    x = load_kuairand(folder)
    day = 86_400_000
    config = SessionConfig(max_gap=day, max_events=10, min_interactions=0)
    log = pd.read_parquet(folder / "interactions.parquet").sort_values(["user_id", "time_ms"], kind="stable")
    opens = (log.user_id.diff() != 0) | (log.time_ms.diff() > day)
    place = log.groupby(opens.cumsum()).cumcount()
    session = (opens | (place % 10 == 0)).cumsum() - 1
    assert (session_index(x, config) == session.to_numpy()).all()
    watched = (
        log[log.is_click == 1].groupby(session).video_id.nunique().reindex(range(session.max() + 1), fill_value=0)
    )
    good = (watched >= 5) & (log.play_time_ms.groupby(session).sum() >= 60_000)
    splits = session_splits(x, config, *(1_651_334_400_000 + np.array([3, 5]) * day + day // 3))
    starts = set(zip(log.user_id.groupby(session).first()[good], log.time_ms.groupby(session).first()[good]))
    found = [(x.user_ids[row["user"]], row["session_start"]) for split in splits.values() for row in split]
    assert len(set(found)) == len(found) and set(found) <= starts
    assert all(len(targets) == 5 for split in splits.values() for targets in split["targets"])
