"""Training, validation and test rows of sessions (OneRec, arXiv:2502.18965, section 3.2): a history, and the session
after it.

A history holds events before its session's first one alone: none at the same instant, none after.
"""

import datasets
import numpy as np
import pyarrow as pa
from transformers.utils import logging

from .interactions import Interactions
from .sessions import SessionConfig, high_quality, report_gap, report_quality, session_index
from .splits import SPLITS, Splitter, arrow_dataset, ranges, split_whole, user_rows
from .time_units import time_unit

logger = logging.get_logger(__name__)


def session_splits(
    interactions: Interactions,
    config: SessionConfig,
    validation_start: float | None = None,
    test_start: float | None = None,
) -> datasets.DatasetDict:
    """
    One row per high-quality session.

    By time, if the boundaries are given: a session belongs to the period in which it starts. Otherwise by user: the
    last session is test, the one before it validation (for users with three or more), the rest training. Training and
    validation sessions that run on into what is held out after them are left out, and counted in a warning.

    Args:
        validation_start, test_start: In the unit of `interactions.timestamp`; both or none.

    Returns:
        `datasets.DatasetDict` with `train`, `validation`, `test`, sorted by user and time:

        - `user` (int32): user index; `session_start`: time of the session's first event.
        - `history` (`List(int32)`): at most `config.max_history` item indices, oldest first.
        - `timestamp` and one column per `feedback` but the request id: parallel to `history`.
        - `targets` (`List(int32)`): at most `config.session_size` items of the session, in order.
        - `target_timestamp`, `target_<feedback>`: parallel to `targets`. Of an item that is repeated in a session the
          first event counts; with `cut="watched"` the first one watched.

    Raises:
        ValueError: columns of `config` that are absent or hold NaN, no session that meets the criteria, a split
            without rows, or boundaries that are not in order.
    """
    return split_whole(SessionSplit(config, validation_start, test_start), interactions)


class SessionSplit(Splitter):
    """
    [`session_splits`] of a log in shards.

    Args:
        config ([`SessionConfig`]): How sessions are found, judged and made into rows.
        validation_start, test_start (`float`, *optional*): As [`session_splits`]'s.

    Raises:
        ValueError: One boundary without the other, or boundaries that are not in order.
    """

    def __init__(self, config: SessionConfig, validation_start: float | None = None, test_start: float | None = None):
        super().__init__()
        if validation_start is None and test_start is not None:
            raise ValueError("test_start without validation_start: give both boundaries or none.")
        if validation_start is not None and (test_start is None or not validation_start < test_start):
            raise ValueError(f"validation_start ({validation_start}) must lie before test_start ({test_start}).")
        self.config, self.boundaries = config, (validation_start, test_start)

    def rows(self, interactions: Interactions) -> datasets.DatasetDict:
        """
        One row per high-quality session of the shard's users, with the columns of [`session_splits`].

        Raises:
            ValueError: Columns of the config that are absent or hold NaN.
        """
        config = self.config
        self.counts[f"times in {time_unit(interactions.timestamp)}"] += len(interactions) > 0
        session = session_index(interactions, config)
        kept = high_quality(interactions, session, config, self.counts)
        order = np.argsort(session, kind="stable")  # events by session, then time
        size = np.bincount(session)
        end = np.cumsum(size)
        first, last = order[end - size], order[end - 1]  # events, (S,)
        split, runs_on = _split_of(interactions, first, last, kept, *self.boundaries)
        self.counts["runs on"] += runs_on
        history = _Histories(interactions, config, first)
        short = history.stop - history.begin < config.min_history
        self.counts.update({"short rows": int((short & (split >= 0)).sum()), "short": int((kept & short).sum())})
        targets, target_end = _targets(interactions, config, session, order)
        rows = {}
        for i, name in enumerate(SPLITS):
            chosen = np.flatnonzero((split == i) & ~short)
            rows[name] = _session_rows(interactions, config, chosen, first, history, targets, target_end)
        self.counts.update({f"{name} rows": len(each) for name, each in rows.items()})
        start = interactions.timestamp[first[kept]]
        self.times += [start.min().item(), start.max().item()] if len(start) else []
        return datasets.DatasetDict(rows)

    def training_events(self, interactions: Interactions, splits: datasets.DatasetDict) -> datasets.Dataset:
        """[`training_events`] of the shard, with the config and the boundaries of this splitter."""
        return training_events(interactions, self.config, splits, self.boundaries[0])

    def finish(self) -> None:
        """
        Warns of sessions that failed the criteria, run on into what is held out, or have too short a history, and of a
        `max_gap` that seems to be in another unit than the times.

        Raises:
            ValueError: No session meets the criteria, or a split has no row.
        """
        counts, config = self.counts, self.config
        report_gap(counts, config)
        report_quality(counts, config)
        if counts["runs on"]:
            logger.warning(
                f"{counts['runs on']} sessions run on into the period or session that is held out after them and are "
                "left out"
            )
        if counts["short rows"]:
            logger.warning(
                f"{counts['short rows']} sessions have a history of fewer than {config.min_history} events and make "
                "no row"
            )
        if empty := [name for name in SPLITS if not counts[f"{name} rows"]]:
            raise ValueError(
                f"no rows in {empty}: {counts['kept']} sessions meet the criteria, {counts['short']} of them lack a "
                f"history of {config.min_history}; they start from {min(self.times)} to {max(self.times)}, the "
                f"boundaries are {self.boundaries[0]} and {self.boundaries[1]}."
            )


def training_events(
    interactions: Interactions,
    config: SessionConfig,
    splits: datasets.DatasetDict,
    validation_start: float | None = None,
) -> datasets.Dataset:
    """
    What may be learned about items without seeing what is held out: one row per user, with the effective events before
    `validation_start`, or, for splits by user, before the user's first session of `validation` and `test`.

    Args:
        interactions ([`Interactions`]): The log, or a shard of it.
        config ([`SessionConfig`]): Says which events are effective: watched or interacted with.
        splits (`datasets.DatasetDict`): What [`session_splits`] made of the same log; its `validation` and `test` are
            read where there is no `validation_start`.
        validation_start (`float`, *optional*): That of the splits, in the unit of `interactions.timestamp`; None for
            splits by user.

    Returns:
        `datasets.Dataset` with the columns of the training split of [`leave_last_out`]. A user without such events has
        no row.

    Raises:
        ValueError: Columns of `config.watched` or `config.interactions` that are absent or hold NaN.
    """
    before = np.full(interactions.num_users, np.inf if validation_start is None else validation_start)
    if validation_start is None:
        for name in ("validation", "test"):
            held_out = splits[name].with_format("arrow")[:]  # numpy's format has no type for no rows
            np.minimum.at(before, held_out["user"].to_numpy(), held_out["session_start"].to_numpy())
    rows = config.effective_events(interactions) & (interactions.timestamp < before[interactions.user_index])
    known = interactions.where(rows)
    first, end = known.user_offsets[:-1], known.user_offsets[1:]
    users = np.flatnonzero(end > first)
    return user_rows(known, users, first[users], end[users])


def _split_of(interactions, first, last, kept, validation_start, test_start) -> tuple[np.ndarray, int]:
    """Row of `SPLITS` of each session, -1 for none, (S,), and how many run on into what is held out."""
    user, start, end = interactions.user_index[first], interactions.timestamp[first], interactions.timestamp[last]
    if validation_start is not None:
        boundaries = np.array([validation_start, test_start])
        split = np.searchsorted(boundaries, start, side="right")
        runs_on = split != np.searchsorted(boundaries, end, side="right")
        split[~kept] = -1
    else:
        split = np.full(len(first), -1)
        rows = np.flatnonzero(kept)
        count = np.bincount(user[rows], minlength=interactions.num_users)[user[rows]]
        left = (
            count - 1 - (np.arange(len(rows)) - np.searchsorted(user[rows], user[rows]))
        )  # 0 for a user's last session
        split[rows] = np.where(left == 0, 2, np.where((left == 1) & (count >= 3), 1, 0))
        split[rows[count == 1]] = 0  # as `leave_last_out`: a user needs a training row first
        held_out = np.full((2, interactions.num_users), np.inf)  # start of validation and test, then of test
        np.minimum.at(held_out[0], user[split >= 1], start[split >= 1])
        np.minimum.at(held_out[1], user[split == 2], start[split == 2])
        runs_on = end > np.where(split == 0, held_out[0][user], np.where(split == 1, held_out[1][user], np.inf))
    count = int((runs_on & (split >= 0)).sum())
    split[runs_on] = -1
    return split, count


class _Histories:
    """The history of every session: rows `begin` to `stop - 1` of `events`, the events that make histories."""

    def __init__(self, interactions: Interactions, config: SessionConfig, first: np.ndarray):
        user, time = interactions.user_index, interactions.timestamp
        if config.history == "all":
            effective = np.ones(len(interactions), dtype=bool)
        else:
            effective = config.effective_events(interactions)
        same = np.zeros(len(interactions), dtype=bool)  # same user and time as the event before
        same[1:] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
        instant = np.maximum.accumulate(np.where(same, 0, np.arange(len(interactions))))  # first event of that instant
        earlier = np.concatenate([[0], np.cumsum(effective)])  # effective events in rows before
        self.events = np.flatnonzero(effective)
        self.stop = earlier[instant[first]]
        self.begin = np.maximum(earlier[interactions.user_offsets[user[first]]], self.stop - config.max_history)


def _targets(interactions, config, session, order) -> tuple[np.ndarray, np.ndarray]:
    """Target events of all sessions, by session and time, and where each session's end among them, (S,)."""
    session, item = session[order], interactions.item_index[order]
    if config.cut == "watched":
        later = ~config.watched_events(interactions)[order]
    else:
        later = np.zeros(len(order), dtype=bool)
    place = np.arange(len(order))
    by_item = np.lexsort((place, later, item, session))
    repeat = np.zeros(len(order), dtype=bool)
    repeat[1:] = (np.diff(session[by_item]) == 0) & (np.diff(item[by_item]) == 0)
    distinct = np.sort(by_item[~repeat])
    by_rank = distinct[np.lexsort((distinct, later[distinct], session[distinct]))]
    starts = np.searchsorted(session[by_rank], session[by_rank])  # where the session begins
    chosen = np.sort(by_rank[np.arange(len(by_rank)) - starts < config.session_size])
    return order[chosen], np.cumsum(np.bincount(session[chosen], minlength=session.max(initial=-1) + 1))


def _session_rows(interactions, config, chosen, first, history, targets, target_end) -> datasets.Dataset:
    """Rows of the sessions `chosen`."""
    rows, offsets = ranges(history.begin[chosen], history.stop[chosen])
    past = history.events[rows]
    target_begin = np.concatenate([[0], target_end[:-1]])
    rows, target_offsets = ranges(target_begin[chosen], target_end[chosen])
    now = targets[rows]
    columns = {
        "user": pa.array(interactions.user_index[first[chosen]], pa.int32()),
        "session_start": pa.array(interactions.timestamp[first[chosen]]),
    }
    values = {"timestamp": interactions.timestamp, **interactions.feedback}
    values.pop(config.request, None)
    for name, events, ends, prefix in (("history", past, offsets, ""), ("targets", now, target_offsets, "target_")):
        items = pa.array(interactions.item_index[events].astype(np.int32))
        columns[name] = pa.ListArray.from_arrays(ends, items)
        columns |= {prefix + key: pa.ListArray.from_arrays(ends, pa.array(v[events])) for key, v in values.items()}
    return arrow_dataset(columns)
