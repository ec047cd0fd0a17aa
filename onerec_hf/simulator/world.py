"""The simulated short-video world: its videos, its users, and the true expectation of every feedback.

Statistics it imitates: KuaiRand-Pure (Gao et al., KuaiRand, CIKM 2022), events of 2022-04-25 to 2022-05-08.

Numbers measured in this world say whether code works and whether a method moves what it should move. They are never
results on real data, and must not be reported beside them.
"""

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from .feedback import FeedbackModel, hash_keys, hash_uniform
from .logging_policy import LoggingPolicy, simulate_logs, simulate_users
from .population import DAY_MS, NUM_INTERESTS, SLOT_MS, build_geometry, build_items, build_users

# Weights in the affinity, beside taste . latent: the mood's category, what all users like, what this user likes of
# anything
_MOOD, _QUALITY, _PATIENCE = 1.0, 0.35, 0.6
# The intercepts are solved on a log of so many events, so many views of it, and at most so many users
_PILOT_EVENTS, _PILOT_VIEWS, _MAX_PILOT_USERS = 30_000, 10_000, 2_000


class ShortVideoWorld:
    """
    A seeded world of users and short videos that writes logs and knows the truth behind them.

    What a view brings depends on (user, video, time) alone, through an affinity: the inner product of the user's taste
    at that time and the video's latent vector, a bonus for the category the user is in the mood for (moods last six
    hours and walk through the user's three interests in a fixed order), the video's quality and the user's patience.
    Tastes circle slowly through two passing interests. The logging policy (`logging_policy.py`) adds the sequential
    structure: it ranks by affinity, follows the mood, and offers relatives of the last long-viewed video.

    Calibrated on KuaiRand-Pure (two weeks of standard-policy events): quantiles of duration, play time and their
    ratio; rates of click, long view (also by duration), like (also given long view or not), follow, forward, hate and
    comment;
    roughly, the share of events of the top tenth of the videos (60%; here 50 to 70%, less in worlds of some hundred
    videos); and, with `mean_events=9`, events per user. Not calibrated: how well feedback can be predicted, how users
    and videos correlate, repeats (next to none here), time between requests, reactions by duration, catalogue
    structure, and the hours of the day beyond their rough shape. Intercepts are solved in each world, so the rates
    hold for its logging policy at any size; a policy that picks better videos gets more feedback, which is the point.

    Args:
        num_users (`int`, *optional*, defaults to 2000): U, at least 1.
        num_items (`int`, *optional*, defaults to 2000): N, at least twice `request_size`.
        num_days (`int`, *optional*, defaults to 14): length of a log in days, at least 1.
        mean_events (`float`, *optional*, defaults to 50): mean impressions of a user in a log, at least 1.
            KuaiRand-Pure has 9; the default is larger so that a small log teaches something.
        request_size (`int`, *optional*, defaults to 5): impressions of a request (the last one of a user may be
            shorter).
        embedding_dim (`int`, *optional*, defaults to 64): D, width of `content_embeddings`.
        start_time_ms (`int`, *optional*, defaults to 1704067200000): first instant of a log, in ms since 1970 UTC.
        seed (`int`, *optional*, defaults to 0): of the world; each log and each feedback draw has a seed of its own.

    Attributes:
        items (`pandas.DataFrame`): row i is video i: video_id, title, category, author_id, duration_ms (5,000 to
            600,000), upload_day (0 is the first day of the log, negative before it), tags (list of two strings).
        users (`pandas.DataFrame`): row u is user u: user_id, declared_interest (a category; right in about 80%),
            activity (low, middle, high, full: quarters of the users), registered_days.
        content_embeddings (`np.ndarray` of shape `(num_items, embedding_dim)`): float32, what a video encoder would
        give.

    Raises:
        ValueError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        num_users: int = 2000,
        num_items: int = 2000,
        *,
        num_days: int = 14,
        mean_events: float = 50.0,
        request_size: int = 5,
        embedding_dim: int = 64,
        start_time_ms: int = 1_704_067_200_000,
        seed: int = 0,
    ):
        for name, value, least in (
            ("num_users", num_users, 1),
            ("num_days", num_days, 1),
            ("request_size", request_size, 1),
            ("num_items", num_items, 2 * request_size),
            ("embedding_dim", embedding_dim, 1),
            ("start_time_ms", start_time_ms, 0),
            ("seed", seed, 0),
        ):
            if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be an integer of at least {least}, got {value!r}.")
        if not 1 <= mean_events < np.inf:
            raise ValueError(
                f"`mean_events` is the mean impressions of a user, at least 1 and finite; got {mean_events}."
            )
        self.num_users, self.num_items, self.num_days = int(num_users), int(num_items), int(num_days)
        self.request_size, self.start_time_ms, self.seed = int(request_size), int(start_time_ms), int(seed)
        geometry = build_geometry(np.random.default_rng([self.seed, 0]))
        self._items = build_items(
            self.num_items, self.num_days, embedding_dim, geometry, np.random.default_rng([self.seed, 1])
        )
        self._users = build_users(
            self.num_users, mean_events, self._items, geometry, np.random.default_rng([self.seed, 2])
        )
        self._logging_policy = LoggingPolicy(self)
        self._calibrate(np.random.default_rng([self.seed, 3]))

    @property
    def items(self) -> pd.DataFrame:
        return self._items.table

    @property
    def users(self) -> pd.DataFrame:
        return self._users.table

    @property
    def content_embeddings(self) -> np.ndarray:
        return self._items.content_embeddings

    def logs(self, seed: int = 0) -> pd.DataFrame:
        """
        Let the logging policy serve every user for `num_days` and write down what happens.

        Args:
            seed (`int`, *optional*, defaults to 0): of the policy's choices, the request times and the feedback. The
                same users come equally often in every log of a world.

        Returns:
            `pandas.DataFrame`: one row per impression, sorted by time: user_id, video_id, time_ms (int64, ms since
            1970 UTC, increasing within a user), request_id (int64, numbered by time), play_time_ms, duration_ms
            (int64), and int8 0/1 is_click, long_view, is_like, is_follow, is_forward, is_hate, is_comment. A session
            that is open at the end of the last day runs on, so the last few events may lie shortly after it.
        """
        return simulate_logs(self, self._logging_policy, _checked("seed", seed))

    def expected_feedback(self, user_id: ArrayLike, video_id: ArrayLike, time_ms: ArrayLike) -> dict[str, np.ndarray]:
        """
        True expected feedback of showing a video to a user at a time: the mean of `sample_feedback` over seeds.

        Exact up to the rounding of play times to whole milliseconds. Defined for any time (also after the log) and for
        videos not uploaded yet. For all pairs of B users and N items pass shapes (B, 1) and (1, N), in blocks of about
        a million pairs to keep memory near 200 MB.

        Args:
            user_id, video_id, time_ms (integer arrays or integers): broadcastable to one shape; ids from 0, ms since
                1970.

        Returns:
            `dict[str, np.ndarray]` of float64 arrays of the broadcast shape: play_time_ms in ms (not capped by the
            duration), and the probabilities is_click, long_view, is_like, is_follow, is_forward, is_hate, is_comment.

        Raises:
            ValueError: an id out of range, or a non-integer argument.
        """
        user, item, time = self._checked_triple(user_id, video_id, time_ms)
        affinity = self._affinity(user, item, time)
        return self._feedback.expected(affinity, item, self._users.expressiveness[user])

    def sample_feedback(
        self, user_id: ArrayLike, video_id: ArrayLike, time_ms: ArrayLike, seed: int = 0
    ) -> dict[str, np.ndarray]:
        """
        Draw the feedback of showing a video to a user at a time.

        The draw is a function of (world, seed, user, video, time) alone: not of the order or the batching of calls. So
        each seed fixes a table of potential outcomes, and two policies compared with one seed (a simulated A/B test
        with common random numbers) get identical feedback wherever they show the same video to the same user at the
        same time; their difference comes only from where they choose differently. Different videos and times are
        independent. Give each position of a request its own time, or the same video shown twice in it would get the
        same answer twice. Replicate a test over several seeds for its spread. `logs(seed)` draws from the same table.

        Args:
            user_id, video_id, time_ms (integer arrays or integers): as for `expected_feedback`.
            seed (`int` or integer array, *optional*, defaults to 0): broadcast with the others; an array of seeds
                gives many realisations of the same triples.

        Returns:
            `dict[str, np.ndarray]` of the broadcast shape: play_time_ms (int64, ms), the others int8 0/1. `is_click`
            and `long_view` follow from the play time: over 7 s, or 18 s and more, or all of a shorter video.

        Raises:
            ValueError: an id out of range, a negative seed, or a non-integer argument.
        """
        user, item, time = self._checked_triple(user_id, video_id, time_ms)
        state = hash_keys(self.seed, _checked("seed", seed), user, item, time)
        affinity = self._affinity(user, item, time)
        return self._feedback.sample(affinity, item, self._users.expressiveness[user], state)

    def _affinity(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> np.ndarray:
        """How much users like items at times, no unit, larger is better; index arrays, broadcast. Arguments
        unchecked.
        """
        days = (time - self.start_time_ms) / DAY_MS
        angle = 2 * np.pi * days / self._users.period_days[user]
        parts = np.stack([np.ones_like(angle), np.cos(angle), np.sin(angle)], axis=-1)
        taste = np.einsum("...k,...kd->...d", parts, self._users.taste[user])
        match = np.einsum("...d,...d->...", taste, self._items.latent[item])
        in_mood = self._items.category[item] == self._mood(user, time)
        shared = _QUALITY * self._items.quality[item] + _PATIENCE * self._users.patience[user]
        return match + _MOOD * in_mood + shared

    def _mood(self, user: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Category that users are in the mood for at times; broadcast. The first one of a day is random."""
        elapsed = np.asarray(time) - self.start_time_ms
        first = (NUM_INTERESTS * hash_uniform(hash_keys(self.seed, user, elapsed // DAY_MS), 0)).astype(np.int64)
        return self._users.interests[user, (first + elapsed // SLOT_MS) % NUM_INTERESTS]

    def _calibrate(self, rng: np.random.Generator) -> None:
        """Fit the feedback to what the logging policy shows: first at random times without history, then in a small
        log.
        """
        activity = self._users.num_events / self._users.num_events.sum()
        user = rng.choice(self.num_users, size=max(1, 2_500 // self.request_size), p=activity)
        time = self.start_time_ms + rng.integers(self.num_days * DAY_MS, size=len(user))
        item = self._logging_policy.choose(user, time, self.request_size, rng)
        self._fit_feedback(np.repeat(user, self.request_size), item.ravel(), np.repeat(time, self.request_size))
        enough = int(np.searchsorted(np.cumsum(self._users.num_events), _PILOT_EVENTS)) + 1
        pilots = np.arange(min(enough, _MAX_PILOT_USERS, self.num_users))
        log = simulate_users(self, self._logging_policy, pilots, np.array(0), rng)
        some = rng.permutation(len(log["user_id"]))[:_PILOT_VIEWS]
        self._fit_feedback(*(log[name][some] for name in ("user_id", "video_id", "time_ms")))

    def _fit_feedback(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        affinity = self._affinity(user, item, time)
        self._feedback = FeedbackModel(self._items.duration_ms, affinity, item, self._users.expressiveness[user])

    def _checked_triple(self, user_id, video_id, time_ms):
        user = _checked("user_id", user_id, self.num_users)
        item = _checked("video_id", video_id, self.num_items)
        return user, item, _checked("time_ms", time_ms)


def _checked(name: str, values, end: int | None = None) -> np.ndarray:
    """Integer array of values in [0, end), or an error that names the first bad one."""
    values = np.asarray(values)
    if values.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must hold integers, got dtype {values.dtype}.")
    bad = values[(values < 0) | (values >= end)] if end is not None else values[values < 0]
    if bad.size:
        allowed = f"0 to {end - 1}" if end is not None else "0 or more"
        raise ValueError(f"`{name}` must be {allowed} in this world, got {bad.flat[0]}.")
    return values.astype(np.int64)
