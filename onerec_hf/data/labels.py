"""Targets of reward models from logged feedback, in one place: OneRec's swt, vtr, wtr, ltr (arXiv:2502.18965) and the
others.

All targets lie in [0, 1], ready for binary cross-entropy; NaN is unknown and trains nothing. The names are Kuaishou's:

| target | of one event | columns |
|---|---|---|
| `ctr`, `ltr`, `wtr`, ... | 0 or 1, see `FEEDBACK_COLUMNS` | `is_click`, `is_like`, `is_follow`, ... |
| `vtr`, `lvtr` | 0 or 1: viewed, viewed long | `play_time_ms`, `duration_ms` |
| `swt` | 0 to 1: watch time, as a share of a cap | `play_time_ms` |

Neither paper says when a video counts as viewed, nor how a time becomes a target of binary cross-entropy. Here a view
is at least `view_ms` of play, or all of a shorter video (KuaiRand's own rule for its column `long_view`, which holds
in 98% of its events), and a time becomes min(time / cap, 1): the tower then predicts an expected capped time, in units
of the cap, and linearly.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

FEEDBACK_COLUMNS = {
    "ctr": "is_click",
    "ltr": "is_like",
    "wtr": "is_follow",
    "cmtr": "is_comment",
    "ftr": "is_forward",
    "ptr": "is_profile_enter",
    "htr": "is_hate",
}
TARGETS = (*FEEDBACK_COLUMNS, "vtr", "lvtr", "swt")


def event_labels(
    feedback: Mapping[str, np.ndarray],
    targets: Sequence[str],
    *,
    view_ms: int = 7_000,
    long_view_ms: int = 18_000,
    watch_cap_ms: int | None = None,
) -> np.ndarray:
    """
    Targets of single events.

    Args:
        feedback (`Mapping[str, np.ndarray]`): Columns of any one shape (...), such as `Interactions.feedback`.
            Negative or NaN values are unknown (KuaiRand's history has -1), and so is a duration of 0.
        targets (`Sequence[str]`): Names of the table above, or of any other column, whose values must be 0 or 1.
        view_ms, long_view_ms (`int`): `vtr` and `lvtr` are `play_time_ms >= min(duration_ms, this)`.
        watch_cap_ms (`int`, *optional*): `swt` is min(`play_time_ms` / this, 1). Needed for `swt`; a high percentile
            of the training log (such as the 95th) uses the range well.

    Returns:
        `np.ndarray` of shape (..., targets), float32, in [0, 1] or NaN.

    Raises:
        ValueError: On a missing column, a column that is not 0/1 or not numbers, or `swt` without its cap; the message
            names it.
    """
    columns = [_event_label(feedback, target, view_ms, long_view_ms, watch_cap_ms) for target in targets]
    return np.stack(columns, axis=-1).astype(np.float32)


def session_labels(
    feedback: Mapping[str, np.ndarray],
    targets: Sequence[str],
    *,
    session_cap_ms: int | None = None,
    reduce: Literal["mean", "any"] = "mean",
    **settings,
) -> np.ndarray:
    """
    Targets of whole sessions (OneRec, section on the reward model, eq. 5 to 7).

    Args:
        feedback (`Mapping[str, np.ndarray]`): Columns of shape (..., m): m events of a session. Unknown events
            (padding, -1) are left out.
        session_cap_ms (`int`, *optional*): `swt` is min(sum of `play_time_ms` / this, 1).
        reduce: All other targets: the share of the session's items (`"mean"`, the default: Table 1's wtr of .003 and
            vtr of .6 are rates of items), or whether there is one at all (`"any"`). Not in the paper.
        settings: `view_ms` and `long_view_ms` of [`event_labels`].

    Returns:
        `np.ndarray` of shape (..., targets), float32, in [0, 1]; NaN where no event of the session is known.
    """
    if reduce not in ("mean", "any"):
        raise ValueError(f"reduce={reduce!r}: allowed are 'mean' (share of the items) and 'any'.")
    columns = []
    for target in targets:
        if target == "swt":
            time, cap = _known(feedback, "play_time_ms"), _cap(session_cap_ms, "session_cap_ms")
            total = np.where(np.isnan(time).all(-1), np.nan, np.nansum(time, axis=-1))
            columns.append(np.minimum(total / cap, 1))
            continue
        label = event_labels(feedback, [target], **settings)[..., 0]
        count = (~np.isnan(label)).sum(-1)
        total = np.nansum(label, axis=-1)
        value = total / np.maximum(count, 1) if reduce == "mean" else total > 0
        columns.append(np.where(count > 0, value, np.nan))
    return np.stack(columns, axis=-1).astype(np.float32)


def _event_label(feedback, target, view_ms, long_view_ms, watch_cap_ms) -> np.ndarray:
    if target == "swt":
        return np.minimum(_known(feedback, "play_time_ms") / _cap(watch_cap_ms, "watch_cap_ms"), 1)
    if target in ("vtr", "lvtr"):
        play, duration = _known(feedback, "play_time_ms"), _known(feedback, "duration_ms")
        enough = play >= np.minimum(duration, view_ms if target == "vtr" else long_view_ms)
        return np.where(np.isnan(play) | np.isnan(duration) | (duration == 0), np.nan, enough)
    values = _known(feedback, FEEDBACK_COLUMNS.get(target, target))
    if not np.isin(values[~np.isnan(values)], (0, 1)).all():
        raise ValueError(f"target {target!r} has values other than 0 and 1; for a time use 'swt', 'vtr' or 'lvtr'.")
    return values


def _known(feedback: Mapping[str, np.ndarray], column: str) -> np.ndarray:
    """The column as float64, NaN where it is unknown."""
    if column not in feedback:
        raise ValueError(f"the log has no column {column!r}; it has {sorted(feedback)}, and targets are {TARGETS}.")
    values = np.asarray(feedback[column])
    if values.dtype.kind not in "biuf":
        raise ValueError(f"column {column!r} holds {values.dtype}, not numbers; a target needs 0/1 or a time.")
    values = values.astype(np.float64)
    return np.where(values < 0, np.nan, values)


def _cap(cap_ms: int | None, name: str) -> int:
    if cap_ms is None or cap_ms <= 0:
        raise ValueError(
            f"{name}={cap_ms}: 'swt' needs a cap in milliseconds, above 0; a time at the cap is target 1."
        )
    return cap_ms
