"""The recommender that writes the simulated logs, and the loop in which it does.

Two stages, as in industry: some seventy candidates (by the user's mood, interests and passing interests, by
popularity, and relatives of the last long-viewed video), then a noisy ranking by affinity and popularity. A part of
the impressions goes to popular and to random videos whatever the user's taste. It is decent, not optimal:
`tests/simulator/test_simulator.py` bounds it on both sides. Its constants were chosen by hand for the published
popularity skew and for histories that tell the next video.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from .feedback import FEEDBACK
from .population import DAY_MS, Items
from .titles import CATEGORIES

_USERS_PER_CHUNK = 1024  # bounds memory; part of the seed, so changing it changes logs
_NUM_CANDIDATES = 48
_NUM_RELATED = 10
_SHARE_POPULAR, _SHARE_RANDOM = 0.12, 0.08
_MOOD_SHARE, _INTEREST_SHARE, _PASSING_SHARE = 0.5, 0.3, 0.1  # of the candidates; the rest by popularity alone
_RELATED_BONUS = 1.5
_RELATED_POPULARITY = 0.25  # squared latent distance that a unit of log exposure is worth
_POPULARITY_BIAS = 0.22  # of the ranking, per unit of log exposure
_RANKING_NOISE = 0.5  # scale of the Gumbel noise on affinities
_NEW_SESSION_SHARE = 0.35
# Share of the sessions that start in each hour: a night low, a plateau from noon, a peak before midnight
_HOURS = np.array(
    [4, 2.4, 1.6, 1, 0.8, 0.9, 1.6, 2.5, 3.3, 3.9, 4.5, 5.1, 5.8, 5.7, 5.2, 5.1, 5.5, 6, 5.7, 5.3, 5.6, 5.7, 6.4, 6.2]
)


class LoggingPolicy:
    """
    Chooses the videos of requests.

    Args:
        world (`ShortVideoWorld`): whose users and items it serves; it sees their true affinity, through noise.
    """

    def __init__(self, world: Any):
        self.world = world
        items: Items = world._items
        self.by_category = np.argsort(items.category, kind="stable")  # (N,)
        starts = np.searchsorted(items.category[self.by_category], np.arange(len(CATEGORIES) + 1))
        self.by_upload = np.argsort(items.upload_day, kind="stable")
        self.log_exposure = np.log(items.exposure)
        days = np.arange(world.num_days)
        self.num_uploaded = np.searchsorted(items.upload_day[self.by_upload], days, side="right")  # (days,)
        # One running sum over (day, category, item): a draw from any day and category is one binary search.
        weight = items.exposure[self.by_category] * (items.upload_day[self.by_category] <= days[:, None])  # (days, N)
        self.running = np.cumsum(weight.ravel())
        padded = np.concatenate([[0.0], self.running])
        row = world.num_items * days[:, None]
        self.day_bounds = padded[row + np.array([0, world.num_items])]  # (days, 2)
        bounds = padded[row + starts]  # (days, categories + 1)
        self.category_bounds = np.stack([bounds[:, :-1], bounds[:, 1:]], axis=-1)  # (days, categories, 2)
        self.related = _related_items(items, self.by_category, starts)

    def _draw(self, bounds: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Items by exposure weight within ranges of the running sum, bounds (..., 2) -> (...)."""
        at = bounds[..., 0] + rng.random(bounds.shape[:-1]) * (bounds[..., 1] - bounds[..., 0])
        position = np.minimum(np.searchsorted(self.running, at, side="right"), len(self.running) - 1)
        return self.by_category[position % self.world.num_items]

    def choose(
        self,
        user: np.ndarray,
        time: np.ndarray,
        size: int,
        rng: Any,
        last_item: np.ndarray | None = None,
        seen: Callable | None = None,
    ) -> np.ndarray:
        """
        Choose the videos of one request for each of B users.

        Args:
            user, time (`np.ndarray` of shape `(B,)`): user rows; request times in ms.
            size (`int`): videos of a request.
            rng (`np.random.Generator`): of candidates and ranking.
            last_item (`np.ndarray` of shape `(B,)`, *optional*): last long-viewed video, -1 for none.
            seen (callable, *optional*): `(B, C)` items -> bool mask of videos shown to the user before; they come
                last.

        Returns:
            `np.ndarray` of shape `(B, size)`: uploaded videos, different ones, in random order.
        """
        day = np.clip((time - self.world.start_time_ms) // DAY_MS, 0, self.world.num_days - 1)
        last_item = np.full(len(user), -1) if last_item is None else last_item
        anything = np.broadcast_to(self.day_bounds[day][:, None], (len(user), max(size, _NUM_RELATED), 2))
        related = np.where(
            last_item[:, None] >= 0, self.related[last_item], self._draw(anything, rng)[:, :_NUM_RELATED]
        )
        popular = self._draw(anything, rng)[:, :size]
        uploaded = rng.random((len(user), size)) * self.num_uploaded[day][:, None]
        exploring = self.by_upload[uploaded.astype(np.int64)]
        candidates = np.concatenate([popular, exploring, related, self._candidates(user, time, day, rng)], axis=1)
        score = self.world._affinity(user[:, None], candidates, time[:, None])
        score += _POPULARITY_BIAS * self.log_exposure[candidates]
        score += _RANKING_NOISE * rng.gumbel(size=candidates.shape)
        score[:, 2 * size : 2 * size + _NUM_RELATED] += np.where(last_item[:, None] >= 0, _RELATED_BONUS, 0.0)
        share = np.repeat([_SHARE_POPULAR, _SHARE_RANDOM], size)
        score[:, : 2 * size] += 1e3 * (rng.random((len(user), 2 * size)) < share)  # shown whatever the affinity
        if seen is not None:
            score -= 1e6 * seen(candidates)
        score -= 1e7 * _repeated(candidates, score)
        score -= 1e8 * (self.world._items.upload_day[candidates] > day[:, None])
        chosen = np.argpartition(-score, size - 1, axis=1)[:, :size]
        chosen = rng.permuted(chosen, axis=1)
        return np.take_along_axis(candidates, chosen, axis=1)

    def _candidates(self, user: np.ndarray, time: np.ndarray, day: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Personal candidates (B, C): a category by the user's tastes, then a video of it by exposure."""
        if self.world.num_items <= _NUM_CANDIDATES:
            return np.tile(np.arange(self.world.num_items), (len(user), 1))
        shape = (len(user), _NUM_CANDIDATES)
        interests, passing = self.world._users.interests[user], self.world._users.passing[user]
        mood = self.world._mood(user, time)
        choices = np.concatenate([mood[:, None], interests, passing], axis=1)  # (B, 6)
        shares = np.array([_MOOD_SHARE, *(_INTEREST_SHARE * np.array([0.5, 0.3, 0.2])), *[_PASSING_SHARE / 2] * 2])
        source = np.searchsorted(np.cumsum(shares), rng.random(shape), side="right")  # 6: any category
        category = np.take_along_axis(choices, np.minimum(source, 5), axis=1)
        bounds = np.where(
            (source == 6)[..., None], self.day_bounds[day][:, None], self.category_bounds[day[:, None], category]
        )
        return self._draw(bounds, rng)


def _repeated(candidates: np.ndarray, score: np.ndarray) -> np.ndarray:
    """True where a row holds the same candidate again with a better score, shape (B, C)."""
    order = np.lexsort((-score, candidates), axis=1)
    ordered = np.take_along_axis(candidates, order, axis=1)
    repeated = np.zeros(candidates.shape, dtype=bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return repeated


def _related_items(items: Items, by_category: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The nearest videos of the same category, (N, 10); the video itself fills up small categories."""
    related = np.repeat(np.arange(len(items.category))[:, None], _NUM_RELATED, axis=1)
    for first, end in pairwise(starts):
        members = by_category[first:end]
        width = min(_NUM_RELATED, len(members) - 1)
        for block in np.array_split(members, len(members) // 1024 + 1):
            if width < 1 or not len(block):
                continue
            distance = -2 * items.latent[block] @ items.latent[members].T + (items.latent[members] ** 2).sum(1)
            distance -= _RELATED_POPULARITY * np.log(items.exposure[members])
            distance[block[:, None] == members] = np.inf
            related[block, :width] = members[np.argpartition(distance, width - 1, axis=1)[:, :width]]
    return related


def simulate_logs(world: Any, policy: LoggingPolicy, seed: np.ndarray) -> pd.DataFrame:
    """All impressions of a log, see `ShortVideoWorld.logs`; users in chunks, so memory grows with the log alone."""
    chunks = []
    for first in range(0, world.num_users, _USERS_PER_CHUNK):
        users = np.arange(first, min(first + _USERS_PER_CHUNK, world.num_users))
        rng = np.random.default_rng([world.seed, 4, int(seed), first])
        chunks.append(simulate_users(world, policy, users, seed, rng))
    columns = {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}
    order = np.lexsort((columns["user_id"], columns["time_ms"]))
    columns = {name: column[order] for name, column in columns.items()}
    columns["request_id"] = pd.factorize(columns["request_id"])[0].astype(np.int64)  # by first appearance
    columns["duration_ms"] = world._items.duration_ms[columns["video_id"]]
    head = ["user_id", "video_id", "time_ms", "request_id", "play_time_ms", "duration_ms"]
    return pd.DataFrame({name: columns[name] for name in [*head, *FEEDBACK[1:]]})


def simulate_users(
    world: Any, policy: LoggingPolicy, users: np.ndarray, seed: np.ndarray, rng: Any
) -> dict[str, np.ndarray]:
    """Impressions of some users; one Python step per request and position, vectorised over users."""
    size = world.request_size
    num_events = world._users.num_events[users]
    num_requests = -(-num_events // size)
    new_session, starts = _sessions(world, num_requests, rng)
    clock = np.zeros(len(users), dtype=np.int64)
    last_item = np.full(len(users), -1)
    seen = np.zeros((len(users), world.num_items), dtype=bool)
    steps = []
    for request in range(num_requests.max()):
        rows = np.flatnonzero(num_requests > request)
        after = clock[rows] + rng.integers(1_000, 20_000, size=len(rows))
        clock[rows] = np.where(new_session[rows, request], np.maximum(starts[rows, request], after), after)

        def seen_by(candidates, rows=rows):
            return seen[rows[:, None], candidates]

        chosen = policy.choose(users[rows], clock[rows], size, rng, last_item[rows], seen_by)
        for position in range(size):
            shown = num_events[rows] > request * size + position
            rows, chosen = rows[shown], chosen[shown]
            item, time = chosen[:, position], clock[rows]
            step = world.sample_feedback(users[rows], item, time, seed)
            steps.append({"user_id": users[rows], "video_id": item, "time_ms": time, **step})
            steps[-1]["request_id"] = users[rows] * (1 << 32) + request
            seen[rows, item] = True
            last_item[rows] = np.where(step["long_view"], item, last_item[rows])
            clock[rows] += step["play_time_ms"] + 700  # 0.7 s to swipe on
    return {name: np.concatenate([step[name] for step in steps]) for name in steps[0]}


def _sessions(world, num_requests: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Which requests open a session, (B, R) bool, and when that session is due, (B, R) ms."""
    shape = (len(num_requests), num_requests.max())
    request = np.arange(shape[1])
    new_session = (rng.random(shape) < _NEW_SESSION_SHARE) & (request < num_requests[:, None])
    new_session[:, 0] = True
    hour = rng.choice(24, size=shape, p=_HOURS / _HOURS.sum())
    due = rng.integers(world.num_days, size=shape) * DAY_MS + hour * (DAY_MS // 24)
    due = due + rng.integers(DAY_MS // 24, size=shape)
    due[request >= new_session.sum(axis=1)[:, None]] = np.iinfo(np.int64).max  # as many dates as sessions
    session = np.cumsum(new_session, axis=1) - 1
    return new_session, world.start_time_ms + np.take_along_axis(np.sort(due, axis=1), session, axis=1)
