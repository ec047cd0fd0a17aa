"""`onerec grpo --exposures` trains on nothing that the data folder holds out, however its splits were made."""

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers.utils import logging

from onerec_hf import Catalogue
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import (
    SessionConfig,
    global_time_split,
    leave_last_out,
    load_interactions,
    session_splits,
)
from onerec_hf.scripts import grpo, grpo_held_out
from onerec_hf.scripts.grpo_held_out import HeldOut

ITEMS, USERS, DAYS = 8, 25, 40
EXPOSURES = SessionConfig(
    max_gap=0, max_events=1, interactions={}, min_watched=0, min_watch_time_ms=0, min_interactions=0
)
CODES = np.array([[i // 3, i % 3] for i in range(ITEMS)])


def impressions(seed: int, ties: bool = False) -> pd.DataFrame:
    """Users of 1 to 25 impressions, half of them watched; some leave long before the end of the log."""
    rng, rows = np.random.default_rng(seed), []
    for user in range(USERS):
        end = DAYS if user % 3 else int(rng.integers(2, DAYS))
        count = int(rng.integers(1, 26))
        times = np.sort(rng.choice(end * 10, count, replace=ties) if count <= end * 10 else np.arange(end * 10))
        for time in times:
            rows.append((user, int(rng.integers(ITEMS)), 1000 + int(time), int(rng.random() < 0.6)))
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "is_click"])
    return log.assign(
        play_time_ms=rng.integers(1, 9000, len(log)), duration_ms=9000, is_hate=rng.integers(0, 2, len(log))
    )


def folder_of(log: pd.DataFrame):
    """The watched events of a log, with its users and items, as `onerec prepare --watched` splits them."""
    events = load_interactions(log, feedback=["is_click"])
    return events.where(events.feedback["is_click"] > 0)


def first_held_out(log: pd.DataFrame, kind: str, boundary: float) -> dict[int, float]:
    """In plain Python: when the first watched event is that is no training event, by user."""
    found = {}
    for user, rows in log[log.is_click > 0].groupby("user_id"):
        times = rows.timestamp.tolist()
        if kind == "time":
            later = [time for time in times if time >= boundary]
        else:
            later = times[-2:] if len(times) >= 3 else times[1:]
        if later:
            found[user] = later[0]
    return found


def arrays(log: pd.DataFrame, events) -> tuple:
    """User, item, time, watched, as `allowed` takes them."""
    user = np.searchsorted(events.user_ids, log.user_id)
    return user, np.searchsorted(events.item_ids, log.item_id), log.timestamp.to_numpy(), log.is_click.to_numpy() > 0


def splits_of(events, kind: str, boundaries: tuple[float, float]):
    if kind == "last":
        return leave_last_out(events)
    if kind == "time":
        return global_time_split(events, *boundaries, min_history=1)
    return session_splits(events, EXPOSURES, *((None, None) if kind == "sessions" else boundaries))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", ["last", "time", "sessions", "sessions by time"])
def test_nothing_from_the_first_held_out_event_on_is_trained(kind, ties):
    boundaries = (1250, 1330)
    for seed in range(15):
        log = impressions(seed, ties)
        events = folder_of(log)
        splits, by_user = splits_of(events, kind, boundaries), kind in ("last", "sessions")
        held_out = HeldOut(splits, events.num_users, events.num_items, "data")
        user, item, time, watched = arrays(log, events)
        kept = held_out.allowed(user, item, time, watched)
        if kind == "sessions":  # those without an event before them make no row, and hold nothing out
            first = {}
            for name in ("validation", "test"):
                for row in splits[name]:
                    first[row["user"]] = min(first.get(row["user"], np.inf), row["session_start"])
            first = {events.user_ids[index]: start for index, start in first.items()}
        else:
            first = first_held_out(log, "last" if by_user else "time", boundaries[0])
        expected = log.timestamp < log.user_id.map(first).fillna(np.inf)
        assert not (kept & ~expected.to_numpy()).any(), (kind, seed)
        for row in log[kept & (log.is_click > 0)].itertuples():
            assert row.timestamp < first.get(row.user_id, np.inf)
        if by_user:  # no more than that is left out, but in front of a held-out item that was shown before as well
            assert kept.sum() > 0.97 * expected.sum()
        else:
            before = log.timestamp < boundaries[0]
            assert kept[before].mean() > (0.95 if kind == "time" else 0.999)
            right = held_out.allowed(user[before], item[before], time[before], watched[before], end=boundaries[0])
            assert right.all()  # as without the check
            late = held_out.allowed(user, item, time, watched, end=boundaries[1])
            assert not (late & ~expected.to_numpy()).any()


@pytest.mark.parametrize("kind", ["last", "time", "sessions", "sessions by time"])
def test_newer_exposures_without_the_log(kind):
    """With a start after all that is held out they are trained on; without one, or in another unit, they are not."""
    for seed in range(5):
        log = impressions(seed)
        events = folder_of(log)
        held_out = HeldOut(splits_of(events, kind, (1250, 1330)), events.num_users, events.num_items, "data")
        user, item, time, watched = arrays(log.assign(timestamp=log.timestamp + 1000), events)
        kept = held_out.allowed(user, item, time, watched, start=1900.0)
        if kind.startswith("sessions"):
            assert kept.all()
        else:  # the first time that a user watches an item which is held out of his, it may be that event
            pairs = [int(pair) for pair in user[~kept] * ITEMS + item[~kept]]
            assert watched[~kept].all() and len(pairs) == len(set(pairs)) and set(pairs) <= set(held_out.pairs)
        for start in (None, 1100.0):
            with pytest.raises(
                ValueError, match=r"are all newer than the rows of data, which end at 1\d\d\d: .*--start"
            ):
                held_out.allowed(user, item, time, watched, start=start)
        with pytest.raises(ValueError, match="cannot be compared"):
            held_out.allowed(user, item, time * 1_000_000, watched, start=1e9)


@pytest.mark.parametrize("most", [10**6, 60])
@pytest.mark.parametrize("kind", ["last", "time", "sessions", "sessions by time"])
def test_training_events_are_found_as_in_plain_python(kind, most, monkeypatch):
    monkeypatch.setattr(grpo_held_out, "_COMPARED_EVENTS", most)
    for seed in range(5):
        log, rng = impressions(seed, ties=True), np.random.default_rng(seed)
        events = folder_of(log)
        splits = splits_of(events, kind, (1250, 1330))
        held_out = HeldOut(splits, events.num_users, events.num_items, "data")
        user, item, time, _ = arrays(log[rng.random(len(log)) < 0.8], events)
        item = np.where(rng.random(len(item)) < 0.3, rng.integers(-1, ITEMS, len(item)), item)
        time = time.astype(float) if seed % 2 else time
        columns = ("targets", "target_timestamp") if "sessions" in kind else ("history", "timestamp")
        train = [(row["user"], *pair) for row in splits["train"] for pair in zip(*(row[name] for name in columns))]
        train = [event for event in train if event[0] in user[user < 20]]
        train = train[:: 1 + len(train) // most]
        exposures = set(zip(user.tolist(), item.tolist(), time.tolist()))
        times = {event[::2] for event in exposures}
        found = sum(event in exposures for event in train)
        other = sum(event not in exposures and event[::2] in times for event in train)
        assert held_out._compare(np.unique(user[user < 20]), user, item, time) == (found, other) and found and other
        assert held_out._compare(np.array([events.num_users]), user, item, time) == (0, 0)


@pytest.fixture
def data(tmp_path):
    """Twenty events per user; the last one is of an item that no one was shown before."""
    rng = np.random.default_rng(0)
    log = pd.DataFrame({"user_id": np.repeat(np.arange(20), 20)})
    log["timestamp"] = 1_600_000_000 + np.tile(np.arange(20) * 100, 20) + log.user_id
    log["item_id"] = rng.integers(0, 6, len(log))
    log.loc[log.index % 20 == 19, "item_id"] = 6 + log.user_id % 2
    log = log.assign(is_click=1, is_hate=0, play_time_ms=rng.integers(1, 9000, len(log)), duration_ms=9000)
    log["request_id"] = np.arange(len(log))
    log.to_parquet(tmp_path / "log.parquet")
    events = load_interactions(log[["user_id", "item_id", "timestamp", "is_click"]], feedback=["is_click"])
    datasets.Dataset.from_dict({"user_id": events.user_ids}).to_parquet(str(tmp_path / "users.parquet"))
    return tmp_path, log, leave_last_out(events)


def load(data, log=None, splits="own", **settings):
    folder, own, known = data
    (own if log is None else log).to_parquet(folder / "log.parquet")
    args = grpo.RLArguments("", str(folder), exposures=str(folder / "log.parquet"), **settings)
    args.watched = {"is_click": 1}
    catalogue = Catalogue(CODES, [3, 3], item_ids=np.arange(ITEMS))
    return grpo.load_exposures(args, catalogue, OneRecCollator(CODES + 4, 5), known if splits == "own" else splits)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    for name in ("grpo", "grpo_held_out"):
        monkeypatch.setattr(logging.get_logger(f"onerec_hf.scripts.{name}"), "warning", found.append)
    return found


def test_held_out_exposures_are_left_out_and_counted(data, warnings):
    rows = load(data)
    assert [warning for warning in warnings if "40 of 400 exposures are left out" in warning]
    assert len(rows) == 360 and not {6, 7} & set(np.concatenate(rows["targets"][:]))
    assert len(load(data, splits=None)) == 400  # the splits say it, nothing else does


def test_an_end_that_is_not_among_the_exposures(data, warnings):
    rows = load(data, end=1_700_000_000_000.0)
    assert len(rows) == 360 and "leaves out no exposure: those of" in warnings[0]
    with pytest.raises(ValueError, match=r"end=1600000 leaves no exposure: those of .* reach from 1600000000 to"):
        load(data, end=1_600_000.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda log: log.assign(timestamp=log.timestamp * 1000),
        lambda log: log.assign(timestamp=log.timestamp // 60),
        lambda log: log.assign(timestamp=log.groupby("user_id").cumcount()),
        lambda log: log.assign(timestamp=log.timestamp - 100),  # every event where the one after it is
    ],
    ids=["milliseconds", "minutes", "order", "shifted"],
)
def test_times_that_cannot_be_compared_are_refused(data, change):
    with pytest.raises(ValueError, match=r"times of the exposures, .* cannot be compared with those of"):
        load(data, change(data[1]))


def test_other_users_and_rows_without_times_are_refused(data, warnings):
    with pytest.raises(ValueError, match="no user of the exposures is in"):
        load(data, data[1].assign(user_id=data[1].user_id + 1000))
    timeless = data[2].remove_columns("timestamp")
    with pytest.raises(ValueError, match=r"rows of \['train', 'validation', 'test'\] of .* have no times: .*--end"):
        load(data, splits=timeless)
    assert len(load(data, splits=timeless, end=1_600_001_000.0)) == 200
    assert "that end=1600001000 is right is not checked" in warnings[-1]


def test_only_held_out_exposures_are_refused(data):
    with pytest.raises(ValueError, match=r"no exposure of .* is at or after start"):
        load(data, start=1_600_001_850.0)
    log = data[1].groupby("user_id").nth([0, 18, 19])
    assert len(load(data, log)) == 20


def test_newer_exposures_than_all_that_is_held_out(data, warnings):
    """A policy's own, after the log."""
    newer = data[1].assign(timestamp=data[1].timestamp + 10_000, request_id=data[1].request_id + 1000)
    assert len(load(data, newer, start=1_600_005_000.0)) == 360  # two items of each user were held out
    warnings.clear()
    with pytest.raises(ValueError, match=r"are all newer than the rows of .* give --start, a time after everything"):
        load(data, newer)
    log = pd.concat([data[1], newer])
    assert len(load(data, log, start=1_600_005_000.0)) == 400
    assert "start=1600005000 is after everything that" in warnings[0]
    with pytest.raises(ValueError, match=r"no exposure of .* is at or after start"):
        load(data, log, start=1_600_001_910.0)  # the last held-out event is at 1919
