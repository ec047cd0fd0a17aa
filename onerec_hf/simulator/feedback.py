"""Feedback of one shown video, calibrated on KuaiRand-Pure (Gao et al., CIKM 2022): watch levels, play time,
reactions.

A view reaches one of five ordered levels: 0 not played, 1 skipped within seconds, 2 watched in part, 3 watched to the
end, 4 watched again. The level follows an ordered logit of the affinity, so a better liked video is watched further;
given the level, the play time depends on the duration alone. Reactions are logits of the affinity, the user's
expressiveness and the long view. All distributions have elementary distribution functions, so every expected value is
a closed form.
"""

import numpy as np

# the order is that of the streams of random numbers: a new one goes to the end, so that no log changes
FEEDBACK = ("play_time_ms", "is_click", "long_view", "is_like", "is_follow", "is_forward", "is_hate", "is_comment")
REACTIONS = FEEDBACK[3:]

CLICK_MS = 7_001  # is_click: over 7 s, or all of a shorter video
LONG_VIEW_MS = 18_000  # long_view: 18 s or more, or all of a shorter video

# Share of each level by duration: least squares on the play times of KuaiRand-Pure (2022-04-25 to 05-08), rounded and
# then adjusted by hand so that the published rates by duration come out; level 0 is .095 at all durations, as on
# average there
_KNOTS_S = np.array([6.0, 9.0, 15.0, 25.0, 45.0, 90.0, 180.0, 400.0])
_PLAYED = np.full(8, 0.905)
_AGAIN = np.array([0.47, 0.22, 0.15, 0.105, 0.035, 0.012, 0.004, 0.001])
_TO_THE_END = _AGAIN + np.array([0.01, 0.06, 0.115, 0.16, 0.15, 0.105, 0.04, 0.015])
_IN_PART = _TO_THE_END + np.array([0.14, 0.16, 0.23, 0.245, 0.355, 0.42, 0.435, 0.375])
_TARGETS = np.stack([_PLAYED, _IN_PART, _TO_THE_END, _AGAIN])  # (4, 8): P(level >= 1..4)

_SKIP_SCALE_MS = 2_400.0  # level 1: Weibull of shape 2
_PART_FROM_MS = 4_500.0  # level 2: log-uniform from here to the duration
_END_OVERTIME = 0.08  # level 3: duration times U(1, 1.08)
_AGAIN_MEAN = 0.6  # level 4: duration times (1 + exponential of this mean)

_LEVEL_SLOPE = 1.2  # log-odds per standard deviation of affinity
# P(reaction | long view), P(reaction | no long view) in KuaiRand-Pure; log-odds per unit of affinity, of
# expressiveness
_REACTIONS = {
    "is_like": (0.0350, 0.0090, 0.8, 1.0),
    "is_follow": (0.0028, 0.00064, 0.8, 0.8),
    "is_forward": (0.0019, 0.00034, 0.8, 0.8),
    "is_hate": (0.00065, 0.00092, -0.8, 0.0),
    "is_comment": (0.0071, 0.00046, 0.8, 0.8),
}


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function, stable for any argument."""
    return 0.5 * (1.0 + np.tanh(0.5 * x))


def hash_keys(*keys) -> np.ndarray:
    """64 random-looking bits (uint64) that are a function of the broadcastable integer keys and their order
    (splitmix64).
    """
    with np.errstate(over="ignore"):
        state = np.zeros(1, dtype=np.uint64)
        for key in keys:
            state = _splitmix64(state ^ np.asarray(key).astype(np.uint64))
    return state.reshape(np.broadcast_shapes(*(np.shape(key) for key in keys)))


def hash_uniform(state: np.ndarray, stream: int) -> np.ndarray:
    """Uniform number in [0, 1), float64, for each state of `hash_keys`; streams of one state are independent."""
    with np.errstate(over="ignore"):
        bits = _splitmix64(state ^ np.uint64((stream + 1) << 32))
    return (bits >> np.uint64(11)) * 2.0**-53


def _splitmix64(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _solve_intercept(logits: np.ndarray, target: np.ndarray | float, weights: np.ndarray | None = None) -> np.ndarray:
    """Intercepts b (T,) with weighted mean of sigmoid(logits + b) = target (T,), by bisection; logits (M,)."""
    target = np.atleast_1d(target)
    low, high = np.full(target.shape, -20.0), np.full(target.shape, 20.0)
    for _ in range(26):
        middle = (low + high) / 2
        mean = np.array([np.average(sigmoid(logits + b), weights=weights) for b in middle])
        low, high = np.where(mean < target, middle, low), np.where(mean < target, high, middle)
    return (low + high) / 2


class FeedbackModel:
    """
    Conditional distribution of the feedback given (affinity, video, user's expressiveness).

    The intercepts are solved such that the pilot views, i.e. what the logging policy shows, have the published rates.

    Args:
        duration_ms (`np.ndarray` of shape `(num_items,)`): video lengths in ms, at least 5,000.
        affinity (`np.ndarray` of shape `(num_pilot,)`): affinities of pilot views, in any unit.
        item_index (`np.ndarray` of shape `(num_pilot,)`): their videos.
        expressiveness (`np.ndarray` of shape `(num_pilot,)`): their users' tendency to react, standard normal.
    """

    def __init__(
        self, duration_ms: np.ndarray, affinity: np.ndarray, item_index: np.ndarray, expressiveness: np.ndarray
    ):
        self.duration_ms = duration_ms
        self.centre, self.scale = affinity.mean(), max(affinity.std(), 0.1)  # 0.1: worlds with next to no choice
        self.means = _level_means(duration_ms)  # (N, 5, 3)
        score = self._score(affinity)
        at_knots = [_solve_intercept(_LEVEL_SLOPE * score, target) for target in _TARGETS]  # 4 x (8,)
        position = np.log(duration_ms / 1000.0)
        self.intercepts = np.stack(
            [np.interp(position, np.log(_KNOTS_S), knot) for knot in at_knots], axis=1
        )  # (N, 4)
        long_view = self._watch_means(score, item_index)[..., 2]
        self.reaction_intercepts = {}
        for name, (if_long, if_short, slope, expressive) in _REACTIONS.items():
            logits = slope * score + expressive * expressiveness
            self.reaction_intercepts[name] = (
                _solve_intercept(logits, if_short, 1 - long_view)[0],
                _solve_intercept(logits, if_long, long_view)[0],
            )

    def _score(self, affinity: np.ndarray) -> np.ndarray:
        return (affinity - self.centre) / self.scale

    def _reached(self, score: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        """P(level >= 1..4), shape (..., 4)."""
        return sigmoid(_LEVEL_SLOPE * score[..., None] + self.intercepts[item_index])

    def _watch_means(self, score: np.ndarray, item_index: np.ndarray) -> np.ndarray:
        """Expected play_time_ms, is_click, long_view, shape (..., 3)."""
        means = self.means[item_index]  # (..., 5, 3)
        steps = np.diff(means, axis=-2)
        return means[..., 0, :] + np.einsum("...l,...lk->...k", self._reached(score, item_index), steps)

    def _reaction_probability(self, name: str, score, expressiveness, long_view) -> np.ndarray:
        """P(reaction | long_view); `long_view` is 0/1, any broadcastable shape."""
        _, _, slope, expressive = _REACTIONS[name]
        if_short, if_long = self.reaction_intercepts[name]
        return sigmoid(slope * score + expressive * expressiveness + np.where(long_view, if_long, if_short))

    def expected(self, affinity: np.ndarray, item_index: np.ndarray, expressiveness: np.ndarray) -> dict:
        """Expected value of every feedback; arguments broadcast, see `ShortVideoWorld.expected_feedback`."""
        score = self._score(affinity)
        watch = self._watch_means(score, item_index)
        values = {name: watch[..., k] for k, name in enumerate(FEEDBACK[:3])}
        long_view = values["long_view"]
        for name in REACTIONS:
            if_long = self._reaction_probability(name, score, expressiveness, 1)
            if_short = self._reaction_probability(name, score, expressiveness, 0)
            values[name] = long_view * if_long + (1 - long_view) * if_short
        return values

    def sample(
        self, affinity: np.ndarray, item_index: np.ndarray, expressiveness: np.ndarray, state: np.ndarray
    ) -> dict:
        """One draw of every feedback, a function of the arguments and of the random bits `state` (see `hash_keys`)."""
        score = self._score(affinity)
        duration = self.duration_ms[item_index]
        level = (hash_uniform(state, 0)[..., None] < self._reached(score, item_index)).sum(-1)
        play_time = np.rint(_play_time(level, duration, hash_uniform(state, 1))).astype(np.int64)
        values = {
            "play_time_ms": play_time,
            "is_click": (play_time >= np.minimum(CLICK_MS, duration)).astype(np.int8),
            "long_view": (play_time >= np.minimum(LONG_VIEW_MS, duration)).astype(np.int8),
        }
        for stream, name in enumerate(REACTIONS, start=2):
            probability = self._reaction_probability(name, score, expressiveness, values["long_view"])
            values[name] = (hash_uniform(state, stream) < probability).astype(np.int8)
        return values


def _play_time(level: np.ndarray, duration: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """Play time in ms by inverse distribution functions: more of `uniform` is more time."""
    tail = -np.log1p(-uniform)
    skipped = _SKIP_SCALE_MS * np.sqrt(tail)
    in_part = _PART_FROM_MS * (duration / _PART_FROM_MS) ** uniform
    to_the_end = duration * (1 + _END_OVERTIME * uniform)
    again = duration * (1 + _AGAIN_MEAN * tail)
    return np.select([level == 1, level == 2, level == 3, level == 4], [skipped, in_part, to_the_end, again], 0.0)


def _level_means(duration_ms: np.ndarray) -> np.ndarray:
    """Mean play time in ms, P(is_click), P(long_view) of each level, shape (N, 5, 3); thresholds as after rounding."""
    duration = duration_ms.astype(np.float64)
    span = np.log(duration / _PART_FROM_MS)
    means = np.zeros((len(duration), 5, 3))
    means[:, 1, 0] = _SKIP_SCALE_MS * np.sqrt(np.pi) / 2
    means[:, 2, 0] = (duration - _PART_FROM_MS) / span
    means[:, 3, 0] = duration * (1 + _END_OVERTIME / 2)
    means[:, 4, 0] = duration * (1 + _AGAIN_MEAN)
    for k, threshold_ms in ((1, CLICK_MS), (2, LONG_VIEW_MS)):
        least = np.minimum(threshold_ms, duration) - 0.5
        means[:, 1, k] = np.exp(-((least / _SKIP_SCALE_MS) ** 2))
        means[:, 2, k] = np.clip(1 - np.log(least / _PART_FROM_MS) / span, 0, 1)
        means[:, 3:, k] = 1.0
    return means
