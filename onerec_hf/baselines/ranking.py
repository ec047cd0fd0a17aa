"""From scores of every item to ranked lists: exact, with ties broken uniformly at random.

Shapes: **B** users, **N** items. Counts tie often, and an order by item index would leak the catalogue's order.
"""

from collections.abc import Sequence

import numpy as np
import torch


def rank_items(
    scores: torch.Tensor,
    k: int,
    *,
    exclude: Sequence[Sequence[int]] | None = None,
    generator: torch.Generator | None = None,
) -> np.ndarray:
    """The k best items of every row; equal scores come in a uniformly random order, drawn anew for every row.

    Args:
        scores (`torch.Tensor` of shape `(B, N)`): a score of -inf means: never recommend this item.
        k (`int`): number of slots, at least 1; it may exceed N.
        exclude (list of B lists of item indices, *optional*): items that may not be returned, e.g. the histories.
        generator (`torch.Generator`, *optional*): source of the random order, on the CPU; torch's global generator if
            None (which `onerec_hf.evaluation.evaluate` seeds).

    Returns:
        `np.ndarray` of shape `(B, k)`, int64: item indices, best first; -1 where a row has fewer than k items left.
    """
    if scores.ndim != 2 or not scores.is_floating_point() or k < 1:
        raise ValueError(
            f"rank_items needs floating point scores of shape (B, N) and k >= 1, got {scores.dtype} of shape "
            f"{tuple(scores.shape)} and k = {k}."
        )
    scores = scores.cpu()
    if exclude is not None:
        row = torch.repeat_interleave(torch.arange(len(exclude)), torch.tensor([len(items) for items in exclude]))
        item = torch.tensor([i for items in exclude for i in items], dtype=torch.long)
        scores = scores.index_put((row, item), torch.tensor(-torch.inf, dtype=scores.dtype))

    # Candidates: all items as good as the k-th, in random order, then sorted (stably) by score within their row.
    best = scores.topk(min(k, scores.shape[1]), dim=1).values
    if best.isnan().any():  # topk puts NaN first
        raise ValueError("rank_items got NaN scores: the recommender's model has diverged.")
    row, item = (scores >= best[:, -1:]).nonzero(as_tuple=True)
    allowed = scores[row, item] > -torch.inf
    row, item = row[allowed], item[allowed]
    order = torch.randperm(len(row), generator=generator)
    order = order[scores[row[order], item[order]].argsort(descending=True, stable=True)]
    order = order[row[order].argsort(stable=True)]
    row, item = row[order], item[order]
    slot = torch.arange(len(row)) - torch.searchsorted(row, row)
    row, item, slot = row[slot < k], item[slot < k], slot[slot < k]
    ranked = torch.full((len(scores), k), -1)
    ranked[row, slot] = item
    return ranked.numpy()
