"""Duration-aware reward shaping of OneRec-V2 (arXiv:2508.20900): a long play of a long video is no merit of its own.

Legend: B users, n exposures of a user in the batch, T events of the user's history.
"""

from typing import Literal

import torch


def duration_buckets(duration: torch.Tensor, base: float = 2.0, eps: float = 1e-6) -> torch.Tensor:
    """
    F(d) = floor(log_base(d + eps)) (OneRec-V2, duration-aware reward shaping).

    Args:
        duration (`torch.Tensor` of any shape): Lengths of videos, 0 or more, in any one unit: the bucket edges are the
            powers of `base` in that unit, so milliseconds and seconds cut differently.
        base (`float`, defaults to 2.0): The paper's beta, above 1. Its value is not in the paper.
        eps (`float`, defaults to 1e-6): The paper's example. It also keeps exact powers of `base` in the upper bucket.

    Returns:
        `torch.LongTensor` of the same shape; a zero duration has a bucket of its own far below the others.

    Raises:
        ValueError: On negative or NaN durations, or `base` of 1 or less.
    """
    if not base > 1:
        raise ValueError(f"base={base}: the logarithm needs a base above 1.")
    duration = torch.as_tensor(duration).double()
    if bool((duration.isnan() | (duration < 0)).any()):
        raise ValueError(
            "duration holds negative or NaN values: mark unknown events in the masks, and put any length there."
        )
    return ((duration + eps).log() / torch.tensor(base, dtype=torch.float64).log()).floor().long()


def play_time_percentiles(
    play_time: torch.Tensor,
    duration: torch.Tensor,
    history_play_time: torch.Tensor,
    history_duration: torch.Tensor,
    history_mask: torch.Tensor | None = None,
    *,
    base: float = 2.0,
    eps: float = 1e-6,
    min_history: int = 1,
    count_self: bool = False,
) -> torch.Tensor:
    r"""
    Percentile of each play time among the user's own plays of videos of similar length:
    q_i = |{p in P_{u,b}: p <= p_i}| / |P_{u,b}| with b = F(d_i) (OneRec-V2, duration-aware reward shaping).

    Args:
        play_time, duration (`torch.Tensor` of shape (B, n)): Exposures to be judged, one unit for all times of the
            call.
        history_play_time, history_duration (`torch.Tensor` of shape (B, T)): The users' past events.
        history_mask (`torch.BoolTensor` of shape (B, T) or (B, n, T), *optional*): True for real events with a known
            play time and duration; the second shape lets each exposure see its own past only.
        base, eps: See [`duration_buckets`].
        min_history (`int`, defaults to 1): Fewer past events than this in the bucket give NaN: no verdict. Not in the
            paper; 1 is the least for which q is defined, larger values make q less coarse.
        count_self (`bool`, defaults to `False`): Whether P_{u,b} holds p_i itself as well. Not in the paper. With
            `True` an exposure in an empty bucket has q = 1 (if `min_history` is 0), so a user without history would
            only ever be rewarded.

    Returns:
        `torch.Tensor` of shape (B, n), float64, q in [0, 1]; NaN where the bucket holds too little.
    """
    if min_history < (0 if count_self else 1):
        raise ValueError(
            f"min_history={min_history}: the percentile of an empty bucket is not defined, use 1 or more."
        )
    if history_mask is None:
        history_mask = torch.ones_like(history_play_time, dtype=torch.bool)
    if history_mask.dim() == 2:
        history_mask = history_mask.unsqueeze(1)
    # a masked event may hold anything
    past_duration = torch.where(history_mask.any(1), history_duration, 0)
    bucket = duration_buckets(duration, base, eps)  # (B, n)
    past = duration_buckets(past_duration, base, eps)  # (B, T)
    same = history_mask & (past.unsqueeze(1) == bucket.unsqueeze(2))  # (B, n, T)
    below = (same & (history_play_time.unsqueeze(1) <= play_time.unsqueeze(2))).sum(2)
    count = same.sum(2)
    enough = count >= min_history
    if count_self:
        below, count = below + 1, count + 1
    return torch.where(enough, below.double() / count.clamp(min=1), torch.nan)


def duration_aware_advantages(
    percentiles: torch.Tensor,
    is_negative: torch.Tensor,
    *,
    quantile: float = 0.75,
    ties: Literal["strict", "inclusive"] = "strict",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""
    A_i = -1 for explicit dislikes, +1 for the batch's top quartile of q, 0 for the rest, which does not train and
    should be dropped (`advantages != 0`). Not normalised: the paper found that to hurt.

    The threshold tau_B is the `quantile` (linear interpolation) of all q of the call that are defined, disliked ones
    included. An exposure without verdict (q = NaN) is 0, unless disliked.

    Args:
        percentiles (`torch.Tensor` of any shape): From [`play_time_percentiles`]; NaN for no verdict.
        is_negative (`torch.Tensor` of the same shape): True (1) for an explicit dislike.
        quantile (`float`, defaults to 0.75): The paper's top quartile.
        ties: `"strict"` is the paper's q > tau_B: when more than a quarter of the batch shares the largest q (q = 1,
            with short histories), nothing is positive. `"inclusive"` is q >= tau_B: then all of those are.
        mask (`torch.BoolTensor` of the same shape, *optional*): False for padding, which is 0 and has no part in
            tau_B.

    Returns:
        `torch.Tensor` of the same shape, float32, in {-1, 0, 1}.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile={quantile}: must lie in [0, 1]; the paper's top quartile is 0.75.")
    if ties not in ("strict", "inclusive"):
        raise ValueError(f"ties={ties!r}: allowed are 'strict' (q > threshold) and 'inclusive' (q >= threshold).")
    if mask is not None:
        percentiles = percentiles.masked_fill(~mask, torch.nan)
        is_negative = is_negative.bool() & mask
    threshold = torch.nanquantile(
        percentiles.double().flatten(), quantile
    )  # NaN when nothing is defined: no positives
    above = percentiles > threshold if ties == "strict" else percentiles >= threshold
    return torch.where(is_negative.bool(), -1.0, above.float())


__all__ = ["duration_aware_advantages", "duration_buckets", "play_time_percentiles"]
