"""Percentile intervals of a comparison by resampling users (Efron and Tibshirani 1993, ch. 13), with
`scipy.stats.bootstrap`.
"""

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import DegenerateDataWarning, bootstrap

BATCH = 50  # resamples in memory at once: 50 numbers per user


class Lift(NamedTuple):
    """
    Relative change of a total, as [`bootstrap_lift`] finds it; 0.01 is one percent.

    Args:
        value (`float`): treatment / control - 1, over all users.
        low, high (`float`): Ends of its percentile interval: the change is significant where 0 lies outside.
    """

    value: float
    low: float
    high: float


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, seed: int = 0, num_samples: int = 1000, confidence: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of mean(a - b), users drawn anew with replacement.

    Args:
        a, b (`np.ndarray` of shape `(U,)`): one metric of the same users, in the same order, for two recommenders.
        seed (`int`): the same seed gives the same interval.

    Returns:
        `(low, high)`: the difference is significant at `1 - confidence` where 0 lies outside.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) == 0:
        raise ValueError(f"a and b must be two non-empty vectors over the same users, got {a.shape} and {b.shape}.")
    return _interval((a - b,), np.mean, confidence, num_samples, seed)


def bootstrap_lift(
    control: np.ndarray,
    treatment: np.ndarray,
    level: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
    per: tuple[np.ndarray, np.ndarray] | None = None,
) -> Lift:
    """
    sum(treatment) / sum(control) - 1, with users drawn with replacement, each with both of their values.

    Args:
        control, treatment (`np.ndarray` of shape (U,)): Totals of the same users under the two policies.
        per (*optional*): What the totals are divided by, of control and treatment, (U,) each: the lift of a share,
            such as that of new videos among the views.
        level (`float`, defaults to 0.95): Of the interval.
        num_samples, seed (`int`): Of the bootstrap.

    Raises:
        ValueError: Shapes that differ, or a control that sums to 0.
    """
    control, treatment = np.asarray(control, float), np.asarray(treatment, float)
    if control.shape != treatment.shape or control.ndim != 1:
        raise ValueError(f"control has shape {control.shape}, treatment {treatment.shape}: the same users, (U,) each.")
    if not control.sum():
        raise ValueError("the control sums to 0: a relative change of it is not defined.")
    values = (control, treatment, *(np.asarray(total, float) for total in per or ()))
    return Lift(float(_lift(*values)), *_interval(values, _lift, level, num_samples, seed))


def _lift(control: np.ndarray, treatment: np.ndarray, *per: np.ndarray, axis: int = -1) -> np.ndarray:
    """NaN where all users who were drawn have nothing in the control, or nothing to divide by."""
    total = control.sum(axis)
    ratio = treatment.sum(axis) / np.where(total == 0, np.nan, total)
    if per:
        first, second = (values.sum(axis) for values in per)
        ratio = ratio * first / np.where(second == 0, np.nan, second)
    return ratio - 1


def _interval(values: tuple, statistic: Callable, level: float, num_samples: int, seed: int) -> tuple[float, float]:
    if len(values[0]) == 1:  # scipy wants two; one user drawn anew is the same user
        return (float(statistic(*values, axis=-1)),) * 2
    settings = {"n_resamples": num_samples, "batch": BATCH, "rng": np.random.default_rng(seed)}
    with warnings.catch_warnings():  # its own interval is NaN, with a warning, where a single resample is; ours is not
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(values, statistic, paired=True, vectorized=True, method="percentile", **settings)
    low, high = np.nanquantile(found.bootstrap_distribution, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
