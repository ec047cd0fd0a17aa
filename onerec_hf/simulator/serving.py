"""A recommender serves the users of a simulated world for some days; its exposures become the next day's logs.

The online tests of the OneRec Technical Report (arXiv:2506.13695) and OneRec-V2 (arXiv:2508.20900) in small. How long
a session lasts and who comes back are assumptions of this file, calibrated on nothing: a user leaves after a video
with a fixed probability, a smaller one after a long view, and comes more often, if `return_slope` says so, after a
visit with more long views than usual. All chance is a function of (seed, user, day, position, video), so policies with
one seed meet the same users.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from .feedback import FEEDBACK, hash_keys, hash_uniform
from .population import DAY_MS
from .world import ShortVideoWorld

LEAVE_AFTER_SKIP, LEAVE_AFTER_LONG_VIEW = 0.25, 0.08
SLOT_MS = 20_000  # nominal time between the videos of a session, the same for every recommender: common random numbers
SWIPE_MS = 700
_LEAVE_STREAM, _START_STREAM, _VISIT_STREAM = 97, 98, 99
EVENT_COLUMNS = ("video_id", "time_ms", "duration_ms", *FEEDBACK)


def simulate_visits(
    world: ShortVideoWorld,
    recommend: Callable,
    history: pd.DataFrame,
    *,
    num_days: int = 7,
    visit_probability: float = 0.7,
    return_slope: float = 0.0,
    max_views: int = 30,
    seed: int = 0,
) -> pd.DataFrame:
    """
    Serve every user of `history` for some days after the world's log.

    Once a day the recommender makes a list for each user from what they watched until the day before (long views); it
    leaves out what they have seen. The user opens the app with `visit_probability`, sees the list from the top and
    leaves at some point, at the latest at its end.

    Args:
        world: With its truth; the recommender never sees it.
        recommend (`Callable`): `recommend(rows, seen, max_views)`; row = `user_id` and, per column of `EVENT_COLUMNS`,
            the list of the user's long views so far, oldest first; `seen`, one array of video ids per row. Returns
            video ids (B, max_views), or that and log-probabilities (B, max_views, L).
        history: A log of impressions as `world.logs()` gives it.
        num_days, visit_probability, max_views, seed: Of the test.
        return_slope (`float`, defaults to 0): Log-odds that are added to `visit_probability` per unit by which the
            share of long views of the user's last visit exceeds that of all users in `history`; 0: who comes does not
            depend on what was shown.

    Returns:
        `pandas.DataFrame` as `world.logs()`, and columns `day` (0 is the first of the test), `position` in the day's
        list and, where the recommender gives them, `log_prob_1` to `log_prob_L`. `request_id` is one list.
    """
    visitors = Visitors(
        world,
        history,
        visit_probability=visit_probability,
        return_slope=return_slope,
        max_views=max_views,
        seed=seed,
    )
    days = []
    for day in range(num_days):
        users, rows, seen = visitors.come(day)
        found = recommend(rows, seen, max_views)
        videos, log_probs = found if isinstance(found, tuple) else (found, None)
        shown = visitors.watch(day, users, np.asarray(videos))
        if log_probs is not None:
            for level in range(log_probs.shape[2]):
                shown[f"log_prob_{level + 1}"] = log_probs[shown["row"], shown["position"], level]
        shown = shown.drop(columns="row").assign(day=day, request_id=shown.user_id * num_days + day)
        visitors.remember(shown)
        days.append(shown)
    return pd.concat(days, ignore_index=True)


class Visitors:
    """
    The users of [`simulate_visits`], a day at a time.

    Args:
        world, history, visit_probability, return_slope, max_views, seed: As there.
        first_day: Of the world, the one that `day` 0 is; default the first one after its log.
    """

    def __init__(
        self,
        world: ShortVideoWorld,
        history: pd.DataFrame,
        *,
        first_day: int | None = None,
        visit_probability: float = 0.7,
        return_slope: float = 0.0,
        max_views: int = 30,
        seed: int = 0,
    ):
        self.world, self.seed, self.max_views = world, seed, max_views
        self.first_day = world.num_days if first_day is None else first_day
        self.visit_probability, self.return_slope = visit_probability, return_slope
        self.users = np.unique(history.user_id.to_numpy())
        self.events: dict[int, dict[str, list]] = {
            u: {name: [] for name in EVENT_COLUMNS} for u in self.users.tolist()
        }
        self.seen: dict[int, set] = {user: set() for user in self.users.tolist()}
        _append(self.events, self.seen, history)
        self.usual = float(history.long_view.mean())
        self.liked = np.full(len(self.users), self.usual)  # share of long views of each user's last visit

    def _state(self, day: int, users: np.ndarray) -> tuple[np.ndarray, int]:
        midnight = self.world.start_time_ms + (self.first_day + day) * DAY_MS
        return hash_keys(self.world.seed, self.seed, users, midnight), midnight

    def come(self, day: int) -> tuple[np.ndarray, list[dict], list[np.ndarray]]:
        """Who opens the app on a day, (B,) user ids; per user the row of what they watched, and the videos they have
        seen.
        """
        state, _ = self._state(day, self.users)
        odds = self.visit_probability * np.exp(self.return_slope * (self.liked - self.usual))
        comes = odds / (odds + 1 - self.visit_probability)
        here = self.users[hash_uniform(state, _VISIT_STREAM) < comes]
        rows = [{"user_id": user, **self.events[user]} for user in here.tolist()]
        return here, rows, [np.fromiter(self.seen[user], dtype=np.int64) for user in here.tolist()]

    def watch(self, day: int, users: np.ndarray, videos: np.ndarray) -> pd.DataFrame:
        """What users (B,) make of their lists (B, max_views) on a day: a row per impression; `row` is the place of the
        user among `users`.
        """
        state, midnight = self._state(day, users)
        span = DAY_MS - self.max_views * SLOT_MS
        start = midnight + (hash_uniform(state, _START_STREAM) * span).astype(np.int64)
        return _watch(self.world, users, videos, start, self.seed)

    def remember(self, shown: pd.DataFrame) -> None:
        """The impressions of a day are what users know from then on."""
        _append(self.events, self.seen, shown)
        share = shown.groupby("user_id").long_view.mean()
        self.liked[np.searchsorted(self.users, share.index)] = share


def _watch(world, users: np.ndarray, videos: np.ndarray, start: np.ndarray, seed: int) -> pd.DataFrame:
    """The views of one day: every user goes down their list until they leave."""
    rows, steps = np.arange(len(users)), []
    for position in range(videos.shape[1]):
        rows = rows[videos[rows, position] >= 0]
        if not len(rows):
            break
        user, video, time = users[rows], videos[rows, position], start[rows] + position * SLOT_MS
        step = world.sample_feedback(user, video, time, seed)
        steps.append(pd.DataFrame({"user_id": user, "video_id": video, "time_ms": time, **step}))
        steps[-1] = steps[-1].assign(
            position=position, row=rows, duration_ms=world.items.duration_ms.to_numpy()[video]
        )
        leave = np.where(step["long_view"], LEAVE_AFTER_LONG_VIEW, LEAVE_AFTER_SKIP)
        rows = rows[hash_uniform(hash_keys(world.seed, seed, user, time), _LEAVE_STREAM) >= leave]
    return pd.concat(steps, ignore_index=True).sort_values(["user_id", "time_ms"], ignore_index=True)


def _append(events: dict, seen: dict, log: pd.DataFrame) -> None:
    """The long views of a log join the users' events, all its videos what they have seen."""
    for user, own in log.groupby("user_id")["video_id"]:
        seen[user].update(own.tolist())
    for user, own in log[log.long_view == 1].sort_values("time_ms").groupby("user_id"):
        for name in EVENT_COLUMNS:
            events[user][name] = events[user][name] + own[name].tolist()


def user_totals(
    log: pd.DataFrame,
    users: Sequence[int],
    embeddings: np.ndarray,
    cold_videos: np.ndarray,
    clusters: np.ndarray,
) -> dict[str, np.ndarray]:
    """
    What each user did in a test, (U,) per metric; users who never came count as 0.

    Args:
        log: From [`simulate_visits`].
        embeddings (`np.ndarray` of shape (N, D)): For `diversity`, the mean over days of 1 - mean cosine of two videos
            of a day.
        cold_videos (`np.ndarray` of shape (N,), bool): Which videos count as cold.
        clusters (`np.ndarray` of shape (N,), int): For `cluster_density`, the mean over days of the share of pairs of
            a day's videos that lie in one cluster. OneRec-V2 reports a metric of this name without its definition.

    Returns:
        `app_stay_time` (s, swipes included), `watch_time` (s), `views`, `likes`, `follows`, `comments`, `forwards`,
        `dislikes`, `long_views`, `cold_start_views`, `lifetime` (days with a visit), `diversity`, `cluster_density`.
    """
    columns = {"app_stay_time": (log.play_time_ms + SWIPE_MS) / 1000, "watch_time": log.play_time_ms / 1000}
    columns |= {"views": np.ones(len(log)), "likes": log.is_like, "follows": log.is_follow, "comments": log.is_comment}
    columns |= {"forwards": log.is_forward, "dislikes": log.is_hate, "long_views": log.long_view}
    columns |= {"cold_start_views": cold_videos[log.video_id], "lifetime": ~log.duplicated(["user_id", "day"])}
    place = {user: i for i, user in enumerate(users)}
    rows = log.user_id.map(place).to_numpy()
    totals = {name: np.bincount(rows, np.asarray(values, float), len(users)) for name, values in columns.items()}
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    spread: dict[str, list[list[float]]] = {name: [[] for _ in users] for name in ("diversity", "cluster_density")}
    for (user, _), own in log.groupby(["user_id", "day"])["video_id"]:
        if (n := len(own)) > 1:  # sum over pairs of x . y = (|sum x|^2 - n) / 2, and so for the counts of a cluster
            spread["diversity"][place[user]].append(1 - ((unit[own].sum(0) ** 2).sum() - n) / (n * (n - 1)))
            together = (np.bincount(clusters[own]) ** 2).sum() - n
            spread["cluster_density"][place[user]].append(together / (n * (n - 1)))
    means = {name: np.array([np.mean(x) if x else 0.0 for x in values]) for name, values in spread.items()}
    return totals | means
