"""Sessions from logs: what OneRec learns to generate (arXiv:2502.18965, section 3.2).

A session is the batch of videos returned for one request, typically 5 to 10. The model learns from high-quality ones,
by three criteria: how many videos were watched, for how long, and whether the user interacted.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal

import numpy as np
from transformers.utils import logging

from .features import reaches
from .interactions import Interactions
from .time_units import NAMES, UNITS

logger = logging.get_logger(__name__)

SHORT_GAP, LONG_GAP = 10, 86_400  # seconds: no session ends so soon, hardly one waits so long


@dataclass(frozen=True)
class SessionConfig:
    r"""
    How sessions are found in a log, judged, and turned into rows. Give exactly one of `request` and `max_gap`.

    Thresholds (`{"is_click": 1, "play_time_ms": 7000}`) are met by an event that reaches **one** of them.

    Args:
        request (`str`, *optional*): Feedback column with the id of the request; a session is what one user got for one
            of them.
        max_gap (`float`, *optional*): For logs without request ids, in the unit of the timestamps (milliseconds where
            they are dates): an event later than this after the user's previous one opens a session.
        max_events (`int`, *optional*): Longer sessions become several, of so many consecutive events. `max_events=1`,
            with the criteria off, makes one row per event: point-wise targets.
        watched (`dict[str, float]`, *optional*, defaults to `{"is_click": 1}`): Thresholds of "actually watched" and
            "effectively watched", which the paper does not define; None: every event is.
        interactions (`dict[str, float]`, defaults to `is_like`, `is_follow`, `is_forward` of 1): Thresholds of
            interactions.
        min_watched (`int`, defaults to 5): Different items watched in the session, at least; 0 switches the criterion
            off.
        min_watch_time_ms (`float`, defaults to 60,000): Sum of `watch_time` over the session, at least; 0 switches it
            off. The paper has a threshold and does not give it.
        min_interactions (`int`, defaults to 1): Interactions in the session, at least; a liked and followed video
            counts twice. 0 switches it off.
        require (`"all"` or `"any"`, defaults to `"all"`): How many of the criteria that are on; the paper does not
            say.
        watch_time (`str`, defaults to `"play_time_ms"`): The column that `min_watch_time_ms` sums up; negative is
            unknown, and 0.
        session_size (`int`, defaults to 5): m, the items of a row's target at most. An item that is repeated in a
            session is one target.
        cut (`"watched"` or `"first"`, defaults to `"watched"`): Which items of a longer session stay: watched ones
            before others and early ones before late ones, or simply the first ones. Either way they keep their order.
            The paper does not say.
        history (`"effective"` or `"all"`, defaults to `"effective"`): The earlier events that make a history: those
            watched or interacted with (OneRec), or all of them (the pathways of the Technical Report).
        max_history (`int`, defaults to 256): n, the items of a history; older ones are dropped.
        min_history (`int`, defaults to 1): Sessions with a shorter history make no row (counted in a warning). Not in
            the paper.

    All impressions of every request, as OneRec-V2 trains on them and reward models need them: `min_watched=0,
    min_watch_time_ms=0, min_interactions=0, cut="first"`.
    """

    request: str | None = None
    max_gap: float | None = None
    max_events: int | None = None
    watched: Mapping[str, float] | None = field(default_factory=lambda: {"is_click": 1})
    interactions: Mapping[str, float] = field(default_factory=lambda: {"is_like": 1, "is_follow": 1, "is_forward": 1})
    min_watched: int = 5
    min_watch_time_ms: float = 60_000
    min_interactions: int = 1
    require: Literal["all", "any"] = "all"
    watch_time: str = "play_time_ms"
    session_size: int = 5
    cut: Literal["watched", "first"] = "watched"
    history: Literal["effective", "all"] = "effective"
    max_history: int = 256
    min_history: int = 1

    def __post_init__(self):
        if (self.request is None) == (self.max_gap is None):
            raise ValueError(
                f"request={self.request!r} and max_gap={self.max_gap!r}: give exactly one, the column with the "
                "request id or the largest gap inside a session."
            )
        for name, allowed in (
            ("require", ("all", "any")),
            ("cut", ("watched", "first")),
            ("history", ("effective", "all")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: allowed are {allowed}.")
        least = {"session_size": 1, "max_history": 1, "max_events": 1, "min_history": 0, "max_gap": 0}
        least |= {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}
        for name, bound in least.items():
            value: Any = getattr(self, name)
            if value is not None and not (isinstance(value, Real) and float(value) >= bound):
                raise ValueError(f"{name}={value!r}: it must be a number of at least {bound}.")

    def watched_events(self, interactions: Interactions) -> np.ndarray:
        """Events that were watched, shape (M,), bool."""
        if self.watched is None:
            return np.ones(len(interactions), dtype=bool)
        return reaches(_checked(interactions, "watched", self.watched), self.watched)

    def effective_events(self, interactions: Interactions) -> np.ndarray:
        """Events that were watched or interacted with, shape (M,), bool."""
        columns = _checked(interactions, "interactions", self.interactions)
        return self.watched_events(interactions) | reaches(columns, self.interactions)


def _checked(interactions: Interactions, argument: str, names: Mapping[str, float] | list[str]) -> Mapping:
    """The event columns, or an error if one of `names` is absent, holds NaN, or text where numbers are needed."""
    feedback = {"timestamp": interactions.timestamp, **interactions.feedback}
    for name in names:
        if name not in feedback:
            raise ValueError(
                f"no event column {name!r}, which SessionConfig.{argument} names; the log has "
                f"{sorted(interactions.feedback)}. Load it with feedback=[...], or give {argument} other columns."
            )
        values = feedback[name]
        if values.dtype.kind not in "biuf" and argument != "request":
            raise ValueError(
                f"event column {name!r} holds {values.dtype}, not numbers; SessionConfig.{argument} compares it with "
                "numbers."
            )
        if values.dtype.kind == "f" and (unknown := int(np.isnan(values).sum())):
            raise ValueError(
                f"{unknown} of {len(values)} values of {name!r} are NaN (SessionConfig.{argument}): fill them in (-1 "
                "is unknown), or load the log with drop_nulls=True."
            )
    return feedback


def session_index(interactions: Interactions, config: SessionConfig) -> np.ndarray:
    """
    The session of every event.

    Returns:
        `np.ndarray` of shape (M,), int64: 0..S-1, numbered by the row of their first event, so by user and then by
        start. The events of a request need not follow one another.

    Raises:
        ValueError: the log lacks the request column, or it holds NaN.
    """
    user, timestamp = interactions.user_index, interactions.timestamp
    if config.request is not None:
        request = _checked(interactions, "request", [config.request])[config.request]
        code = np.unique(request, return_inverse=True)[1]
        session = _numbered(user * (code.max(initial=0) + 1) + code)
    else:
        opens = np.ones(len(interactions), dtype=bool)
        opens[1:] = (user[1:] != user[:-1]) | (np.diff(timestamp) > config.max_gap)
        session = np.cumsum(opens) - 1
    if config.max_events is not None:
        part = _position(session) // config.max_events
        session = _numbered(session * (part.max(initial=0) + 1) + part)
    return session


def _numbered(keys: np.ndarray) -> np.ndarray:
    """Keys as 0, 1, 2, ... by first appearance."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _position(group: np.ndarray) -> np.ndarray:
    """Position of each element among those of its group, 0 for the first; groups 0..S-1 in any order."""
    order = np.argsort(group, kind="stable")
    size = np.bincount(group)
    position = np.empty(len(group), dtype=np.int64)
    position[order] = np.arange(len(group)) - np.repeat(np.cumsum(size) - size, size)
    return position


def session_criteria(interactions: Interactions, session: np.ndarray, config: SessionConfig) -> dict[str, np.ndarray]:
    """
    Which sessions meet which criterion.

    Args:
        session (`np.ndarray` of shape (M,)): Of [`session_index`].

    Returns:
        `dict[str, np.ndarray]` of shape (S,), bool, for those of `min_watched`, `min_watch_time_ms`,
        `min_interactions` that are on.

    Raises:
        ValueError: a column of a criterion is absent or holds NaN.
    """
    size = int(session.max(initial=-1)) + 1
    meets = {}
    if config.min_watched:
        watched = config.watched_events(interactions)
        pairs = np.unique(session[watched] * interactions.num_items + interactions.item_index[watched])
        meets["min_watched"] = np.bincount(pairs // interactions.num_items, minlength=size) >= config.min_watched
    if config.min_watch_time_ms:
        time = _checked(interactions, "watch_time", [config.watch_time])[config.watch_time]
        total = np.bincount(session, weights=time.clip(min=0), minlength=size)
        meets["min_watch_time_ms"] = total >= config.min_watch_time_ms
    if config.min_interactions:
        columns = _checked(interactions, "interactions", config.interactions)
        count = np.zeros(size)
        for name, least in config.interactions.items():
            count += np.bincount(session, weights=reaches(columns, {name: least}), minlength=size)
        meets["min_interactions"] = count >= config.min_interactions
    return meets


def high_quality(
    interactions: Interactions, session: np.ndarray, config: SessionConfig, counts: Counter[str]
) -> np.ndarray:
    """Which sessions are kept, shape (S,), bool; adds to `counts` how many, and how many failed what."""
    meets = session_criteria(interactions, session, config)
    size = int(session.max(initial=-1)) + 1
    kept = np.ones(size, dtype=bool)
    if meets:
        kept = (
            np.logical_and.reduce([*meets.values()])
            if config.require == "all"
            else np.logical_or.reduce([*meets.values()])
        )
    counts.update({"sessions": size, "kept": int(kept.sum())})
    counts.update({f"failed {name}": int((~met).sum()) for name, met in meets.items()})
    return kept


def report_gap(counts: Counter[str], config: SessionConfig) -> None:
    """Warns where `max_gap` seems to be in another unit than the times; `counts` has how many shards have which."""
    units = [unit for unit in (*UNITS, None) if counts[f"times in {unit}"]]
    if len(units) != 1 or (unit := units[0]) is None or not config.max_gap:
        return
    seconds = config.max_gap / UNITS[unit]
    # half an hour in milliseconds is 21 days in seconds, and half an hour in seconds is 2 s in milliseconds
    if seconds < SHORT_GAP or (unit != "ms" and seconds > LONG_GAP):
        logger.warning(
            f"max_gap={config.max_gap:g} is {seconds:,.3g} seconds, as the timestamps are {NAMES[unit]}: it is in the "
            "unit of the timestamps, which numbers keep; dates and ISO text become milliseconds"
        )


def report_quality(counts: Counter[str], config: SessionConfig) -> None:
    """
    Warns of what [`high_quality`] counted.

    Raises:
        ValueError: No session is kept.
    """
    failed = {
        f"{name}={vars(config)[name]:g}": counts[f"failed {name}"]
        for name in ("min_watched", "min_watch_time_ms", "min_interactions")
        if vars(config)[name]
    }
    found = (
        f"{counts['kept']} of {counts['sessions']} sessions meet {config.require} of the criteria; failed by "
        f"criterion: {failed}"
    )
    if not counts["kept"]:
        raise ValueError(f"{found}. Lower these thresholds of SessionConfig, or set one to 0 to switch it off.")
    logger.warning(found)
