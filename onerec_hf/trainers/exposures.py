"""Logged exposures -> rows for reinforcement learning from user feedback, and for rejection-sampled fine-tuning.

OneRec-V2, duration-aware reward shaping and GBPO (arXiv:2508.20900); OneRec Technical Report, RSFT (arXiv:2506.13695).
Legend: M events of a log, U users, n exposures of a request, L levels.
"""

from collections.abc import Mapping
from typing import Literal

import datasets
import numpy as np
import torch

from ..data import Interactions, SessionConfig, match_ids, reaches, session_index
from ..models import Catalogue
from ..rewards import duration_aware_advantages, play_time_percentiles

_USERS_PER_CHUNK = 256  # bounds the memory of the percentiles, exposures x past events per user


def feedback_exposures(
    interactions: Interactions,
    catalogue: Catalogue,
    *,
    positive: Mapping[str, float],
    negative: str = "is_hate",
    play_time: str = "play_time_ms",
    duration: str = "duration_ms",
    request: str | None = "request_id",
    start: float | None = None,
    log_probs: np.ndarray | None = None,
    user_ids: np.ndarray | None = None,
    max_history: int = 50,
    quantile: float = 0.75,
    ties: Literal["strict", "inclusive"] = "strict",
    **percentiles,
) -> datasets.Dataset:
    r"""
    One row per request of a log of **all** impressions, short plays included.

    The advantage of an exposure is OneRec-V2's: -1 for an explicit dislike, +1 for the top quartile of play-time
    percentiles among the user's own earlier plays of videos of similar length, 0 otherwise. The quartile is taken over
    all exposures of the call (the paper: of a batch). The context of a request holds what the user watched before it,
    as in supervised training.

    Args:
        interactions (`Interactions`): Every impression, with the columns named below in `feedback`.
        catalogue (`Catalogue`): Items that the policy knows; others are neither targets nor context, their play times
            still count.
        positive (`dict[str, float]`): Column -> threshold of an effective view, the events that make up histories.
        negative, play_time, duration (`str`): Columns: dislike (0/1), times in one unit.
        request (`str`, *optional*): Column of request ids, of any kind; what one user got for one id shares a context,
            however its rows lie among others. `None`: each exposure is its own.
        start (`float`, *optional*): Only exposures from this time on make rows; the earlier ones are past to judge
            them by.
        log_probs (`np.ndarray` of shape (M, L), *optional*): Log-probability of each code at exposure, by the policy
            that chose it, in the order of `interactions`; NaN where another pipeline did.
        user_ids (`np.ndarray`, *optional*): Ids in the order of the `user` column, of which users of the log that it
            lacks become -1; default the log's own.
        max_history (`int`): Items of history kept.
        quantile, ties: See [`duration_aware_advantages`]; `percentiles`: `base`, `eps`, `min_history`, `count_self` of
            [`play_time_percentiles`].

    Returns:
        `datasets.Dataset`, sorted by user and by time of the request's first exposure: `user`, `history` (watched
        before that exposure), `timestamp` and the feedback columns but the request id parallel to it, `targets` (n),
        `advantage` (n), `play_time` (of all exposures of the request, summed) and, if given, `log_probs` (n, L).

    Raises:
        ValueError: a column that the log lacks, a request id that is NaN, `log_probs` of another shape, or no row.
    """
    needed = [*positive, negative, play_time, duration, *([request] if request else [])]
    if absent := [name for name in needed if name not in interactions.feedback]:
        raise ValueError(f"the log has no columns {absent}; it has {sorted(interactions.feedback)}.")
    if log_probs is not None and log_probs.shape != (len(interactions), catalogue.num_levels):
        raise ValueError(f"log_probs is {log_probs.shape}, expected {(len(interactions), catalogue.num_levels)}.")
    feedback, count = interactions.feedback, len(interactions)
    if not count:
        raise ValueError(f"{interactions!r} has no events; if where() chose them, choose more.")
    item = match_ids(interactions.item_ids, catalogue.item_ids)
    item = item[interactions.item_index]  # (M,) item of the catalogue or -1
    number = (
        session_index(interactions, SessionConfig(request=request)) if request else np.arange(count)
    )  # request, (M,)
    events = np.split(
        np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1]
    )  # of each request, in time order
    begin = np.array([rows[0] for rows in events], dtype=np.int64)
    percentile = _percentiles(interactions, begin[number], play_time, duration, percentiles)
    judged = np.ones(count, dtype=bool) if start is None else interactions.timestamp >= start
    advantage = duration_aware_advantages(
        percentile,
        torch.from_numpy(np.asarray(feedback[negative]) > 0),
        quantile=quantile,
        ties=ties,
        mask=torch.from_numpy(judged),
    ).numpy()
    watched = np.flatnonzero(reaches(feedback, positive) & (item >= 0))
    before = np.searchsorted(watched, begin)  # watched events before each request, of all users
    user_first = np.searchsorted(watched, interactions.user_offsets[interactions.user_index[begin]])
    users = np.arange(interactions.num_users)
    if user_ids is not None:
        users = match_ids(interactions.user_ids, user_ids)
    rows = []
    for k, shown in enumerate(events):
        exposed = shown[item[shown] >= 0]
        if not len(exposed) or (start is not None and interactions.timestamp[shown[0]] < start):
            continue
        past = watched[max(user_first[k], before[k] - max_history) : before[k]]
        row = {"user": int(users[interactions.user_index[shown[0]]]), "history": item[past].tolist()}
        row |= {"timestamp": interactions.timestamp[past].tolist()}
        row |= {name: values[past].tolist() for name, values in feedback.items() if name != request}
        row |= {"targets": item[exposed].tolist(), "advantage": advantage[exposed].tolist()}
        row["play_time"] = float(feedback[play_time][shown].sum())
        if log_probs is not None:
            row["log_probs"] = log_probs[exposed].tolist()
        rows.append(row)
    if not rows:
        raise ValueError(f"no exposure of {count} is at or after start={start} and of an item of {catalogue}.")
    return datasets.Dataset.from_list(rows)


def _percentiles(
    interactions: Interactions, before: np.ndarray, play_time: str, duration: str, settings
) -> torch.Tensor:
    """Percentile of every event, (M,); an event is judged by its user's events in front of row `before` of it."""
    offsets, feedback = interactions.user_offsets, interactions.feedback
    percentile = np.full(len(interactions), np.nan)
    for user in range(0, interactions.num_users, _USERS_PER_CHUNK):
        edges = offsets[user : user + _USERS_PER_CHUNK + 1]
        width = int(np.diff(edges).max(initial=1))
        rows = np.minimum(edges[:-1, None] + np.arange(width), len(interactions) - 1)  # (U, T)
        real = np.arange(width) < np.diff(edges)[:, None]
        played, length = (torch.from_numpy(feedback[name][rows].astype(np.float64)) for name in (play_time, duration))
        seen = (rows[:, None, :] < before[rows][:, :, None]) & real[:, None, :]  # (U, n, T) events before the request
        found = play_time_percentiles(played, length, played, length, torch.from_numpy(seen), **settings)
        percentile[rows[real]] = found.numpy()[real]
    return torch.from_numpy(percentile)


def rejection_sample(rows: datasets.Dataset, drop: float = 0.5, column: str = "play_time") -> datasets.Dataset:
    """
    RSFT's data: the rows without the share `drop` that was played least (Technical Report: the worst half of exposure
    sessions).

    Args:
        rows (`datasets.Dataset`): With a number per row in `column`, such as [`feedback_exposures`] makes.

    Returns:
        The kept rows in their order; of rows that tie at the edge the later ones stay.
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop={drop}: the share of rows to leave out lies in [0, 1).")
    order = np.argsort(np.asarray(rows[column]), kind="stable")
    return rows.select(np.sort(order[int(drop * len(rows)) :]))


__all__ = ["feedback_exposures", "rejection_sample"]
