"""Confidence intervals of a comparison by resampling users (Efron, 1979): what an online A/B test reports."""

from typing import NamedTuple

import numpy as np


class Lift(NamedTuple):
    """Relative change of the total and its percentile interval; 0.01 is one percent."""

    value: float
    low: float
    high: float


def bootstrap_lift(
    control: np.ndarray, treatment: np.ndarray, level: float = 0.95, num_samples: int = 2000, seed: int = 0
) -> Lift:
    """
    sum(treatment) / sum(control) - 1, with users drawn with replacement, each with both of their values.

    Args:
        control, treatment (`np.ndarray` of shape (U,)): Totals of the same users under the two policies.
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
    users, rng = len(control), np.random.default_rng(seed)
    lifts = np.empty(num_samples)
    for i in range(num_samples):
        drawn = rng.integers(users, size=users)
        total = control[drawn].sum()
        lifts[i] = treatment[drawn].sum() / total - 1 if total else np.nan
    low, high = np.nanquantile(lifts, [(1 - level) / 2, (1 + level) / 2])
    return Lift(float(treatment.sum() / control.sum() - 1), float(low), float(high))
