"""Which exposures `onerec grpo` may train on: those before what the data folder holds out for validation and test.

Legend: M exposures, U users and N items of the data folder.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
from transformers.utils import logging

from ..data import time_unit

logger = logging.get_logger(__name__)

_COMPARED_USERS = 1000  # whose training events are looked for in the exposures: enough to see another unit of time
_COMPARED_EVENTS = 300_000  # of them, about; of more, every n-th


class HeldOut:
    r"""
    When the events are that a data folder holds out, by user.

    Rows of sessions say it. A row of a user's history says it of what later rows of that user have in front of their
    targets; the time of the targets themselves is in no row, and is looked up in the exposures.

    Args:
        splits (`Mapping[str, datasets.Dataset]`): `train`, `validation` and `test`, in memory or on disk.
        num_users, num_items (`int`): U and N.
        path: Name of the data folder, for messages.

    Raises:
        ValueError: The rows have no times.
    """

    def __init__(self, splits: Mapping[str, datasets.Dataset], num_users: int, num_items: int, path: Any):
        self.num_items, self.path, self.train = num_items, path, splits["train"]
        self.sessions, lacking = _without_times(splits)
        if lacking:
            raise ValueError(
                f"the rows of {lacking} of {path} have no times: no one can say which exposures are held out. "
                "Prepare the data again with timestamps, or give --end, the time from which on they are held out."
            )
        self.last = np.full(num_users, -np.inf)  # time of each user's last training event
        count = np.zeros(num_users, dtype=np.int64)
        for user, _, time in _events(self.train, self.sessions):
            np.maximum.at(self.last, user, time)
            count += np.bincount(user, minlength=num_users)
        self.first = np.full(num_users, np.inf)  # of the first held-out event; infinite where no row has its time
        there, pairs, self.newest, several = np.zeros(num_users, dtype=bool), [], -np.inf, self.sessions
        for rows in (splits["validation"], splits["test"]):
            table = rows.with_format("arrow")[:]
            there[table["user"].to_numpy()] = True
            for user, _, time in _events(rows, self.sessions):
                late = np.ones(len(time), dtype=bool) if self.sessions else time > self.last[user]
                np.minimum.at(self.first, user[late], time[late])
                # more events until then than in training: one at the same instant is held out
                tied = (np.bincount(user[~late], minlength=num_users) > count) & np.isfinite(self.last)
                self.first[tied] = np.minimum(self.first, self.last)[tied]
                self.newest = max(self.newest, _latest(time))
            if self.sessions:  # a session may open with an event that is no target
                np.minimum.at(self.first, table["user"].to_numpy(), table["session_start"].to_numpy())
            else:
                items, lengths = _lists(table, "targets")
                several |= bool((lengths > 1).any())
                pairs.append(np.repeat(table["user"].to_numpy(), lengths).astype(np.int64) * num_items + items)
        self.pairs = np.unique(np.concatenate(pairs)) if pairs else np.zeros(0, dtype=np.int64)
        self.unknown = there & np.isinf(self.first)
        self.trained_until = _latest(self.last)
        self.newest = max(self.newest, self.trained_until)
        # one time for all users: what lies before it is training, and no user has a training event after it
        self.by_time = several and bool(self.trained_until < self.first.min(initial=np.inf))

    def allowed(
        self,
        user: np.ndarray,
        item: np.ndarray,
        time: np.ndarray,
        watched: np.ndarray,
        start: float | None = None,
        end: float | None = None,
    ) -> np.ndarray:
        """
        The exposures that may be trained on: those before the first held-out event of their user, and in a split by
        time before that of all users.

        An `end` between the training events and the held-out ones is such a time, and is taken as it is. A `start`
        after everything that is held out says that the exposures are newer than the data: they stay, with a warning.

        Args:
            user, item (`np.ndarray` of shape (M,)): Indices in the data folder, -1 for those that it lacks.
            time (`np.ndarray` of shape (M,)): In the unit of the data folder's times.
            watched (`np.ndarray` of shape (M,)): Whether an exposure makes history.
            start, end (`float`, *optional*): Those of the training on exposures.

        Returns:
            `np.ndarray` of shape (M,), bool.

        Raises:
            ValueError: Times that cannot be compared with those of the data folder.
        """
        watched_first = self._watched_first(user, item, time, watched)
        if not (same := self.check_times(user, item, time, start)) or (
            start is not None and start > max(self.newest, _latest(time[watched_first]))
        ):
            logger.warning(
                f"start={start:.15g} is after everything that {self.path} holds out for validation and test: newer "
                "exposures are trained on, and scores on its test split say nothing of what comes after them."
            )
            kept = np.ones(len(time), dtype=bool)
            if not same and not self.sessions:  # the times of the last targets are in no row: these may be they
                kept[watched_first] = False
            return kept
        after = np.where(self.unknown, self.trained_until if self.by_time else self.last, np.inf)
        known = user >= 0
        number = np.where(known, user, 0)
        # in a split by time the first event that makes history, and else any: who left early has no other sign
        sought = known & self.unknown[number] & (watched if self.by_time else True)
        sought &= (time > after[number]) if self.by_time else (time >= after[number])
        rows, first = self._is_pair(user, item, sought), self.first.copy()
        np.minimum.at(first, number[rows], time[rows])
        earliest = first.min(initial=np.inf)
        if end is not None and self.trained_until < end <= earliest:
            return np.ones(len(time), dtype=bool)
        after[np.isfinite(first) & ~self.by_time] = np.inf  # found: what lies before it may stay
        late = known & ((time >= first[number]) | (time > after[number]))
        return ~(late | (time >= earliest)) if self.by_time else ~late

    def check_times(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, start: float | None = None) -> bool:
        """
        Looks for training events of the data folder in the exposures, which hold every impression of the log.

        Returns:
            `bool`: Whether they are there. False where they are not and need not be: `start` is after all times in the
            data folder, and in their unit.

        Raises:
            ValueError: None of them is there at its time, or mostly other items are.
        """
        shared = np.unique(user[user >= 0])[:_COMPARED_USERS]
        if not len(shared):
            raise ValueError(
                f"no user of the exposures is in {self.path}: which exposures are held out cannot be said. Give the "
                "user ids that `onerec prepare` was given, or data prepared from this log."
            )
        found, other = self._compare(shared, user, item, time)
        if found > other:
            return True
        comparable = time_unit(time) == time_unit(self.last)
        if comparable and start is not None and start > self.newest:
            return False
        if comparable and time.min() > self.newest:
            raise ValueError(
                f"the exposures, {time.min()} to {time.max()}, are all newer than the rows of {self.path}, which end "
                f"at {self.newest:.15g}: held-out events could be among them. To train on newer exposures alone, give "
                "--start, a time after everything that is held out; else give every impression of the log that the "
                "data was prepared from."
            )
        raise ValueError(
            f"the times of the exposures, {time.min()} to {time.max()}, cannot be compared with those of "
            f"{self.path}, whose training ends at {self.trained_until:.15g}: {found} of its training events "
            f"are among the exposures at their time, {other} times another item is. Held-out events could be "
            "trained on. Give every impression of the log that the data was prepared from, with the same "
            "timestamps in the same unit."
        )

    def _compare(self, shared: np.ndarray, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> tuple[int, int]:
        """Training events of some users that are among the exposures, and those of whose users and times other
        exposures are.
        """
        gathered: tuple[list, list, list] = ([], [], [])
        for columns in _events(self.train, self.sessions):
            kept = np.isin(columns[0], shared)
            for values, column in zip(gathered, columns):
                values.append(column[kept])
        if not (count := sum(map(len, gathered[0]))):
            return 0, 0
        step = 1 + count // _COMPARED_EVENTS
        owner, event, at = (np.concatenate(values)[::step] for values in gathered)
        # a number for each pair of user and time, then one for each of such a pair and an item, which may be -1
        when, number = np.unique(at, return_inverse=True)
        place = np.minimum(np.searchsorted(when, time), len(when) - 1)
        rows = np.flatnonzero(np.isin(user, shared) & (when[place] == time))
        pairs, number = np.unique(np.searchsorted(shared, owner) * len(when) + number, return_inverse=True)
        pair = np.searchsorted(shared, user[rows]) * len(when) + place[rows]
        place = np.minimum(np.searchsorted(pairs, pair), len(pairs) - 1)
        rows, place = rows[pairs[place] == pair], place[pairs[place] == pair]
        same = np.isin(number * (self.num_items + 1) + event + 1, place * (self.num_items + 1) + item[rows] + 1)
        return int(same.sum()), int((np.isin(number, place) & ~same).sum())

    def _is_pair(self, user: np.ndarray, item: np.ndarray, among: np.ndarray) -> np.ndarray:
        """Exposures of a held-out item to its user."""
        return among & (item >= 0) & np.isin(user.astype(np.int64) * self.num_items + item, self.pairs)

    def _watched_first(self, user: np.ndarray, item: np.ndarray, time: np.ndarray, watched: np.ndarray) -> np.ndarray:
        """Rows of the exposures that may be the held-out events: of a held-out item that was watched several times,
        the first time after the training counts.
        """
        rows = np.flatnonzero(self._is_pair(user, item, watched & (user >= 0)))
        rows = rows[time[rows] >= self.last[user[rows]]]
        _, first = np.unique(user[rows].astype(np.int64) * self.num_items + item[rows], return_index=True)
        return rows[first]  # of a user, exposures come in order of time


def has_times(splits: Mapping[str, datasets.Dataset]) -> bool:
    """Whether the rows of the splits say when their events were."""
    return not _without_times(splits)[1]


def _without_times(splits: Mapping[str, datasets.Dataset]) -> tuple[bool, list[str]]:
    """Whether the rows are sessions, and the names of the splits whose rows have no times."""
    sessions = all("session_start" in rows.column_names for rows in splits.values())
    column = "target_timestamp" if sessions else "timestamp"
    return sessions, [name for name, rows in splits.items() if column not in rows.column_names]


def _latest(time: np.ndarray) -> float:
    return float(time.max()) if len(time) else -np.inf


def _lists(table: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A list column of an Arrow table, all rows one after another, and the length of each."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy(), column.value_lengths().to_numpy()


def _events(rows: datasets.Dataset, sessions: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """User, item and time of the events of rows: of their histories, or of the sessions after them."""
    item, time = ("targets", "target_timestamp") if sessions else ("history", "timestamp")
    for table in rows.select_columns(["user", item, time]).with_format("arrow").iter(batch_size=100_000):
        items, lengths = _lists(table, item)
        times, _ = _lists(table, time)
        yield np.repeat(table["user"].to_numpy(), lengths), items, times


__all__ = ["HeldOut", "has_times"]
