"""What happens when several items get one semantic ID. The OneRec papers do not say; TIGER (arXiv:2305.05065) adds a level."""

from typing import Literal

import numpy as np
import torch

from .residual import ResidualKMeans


POLICIES = ("extra_level", "next_free", "keep")


def resolve_collisions(
    codes: torch.Tensor,
    quantizer: ResidualKMeans,
    item_embeddings: torch.Tensor | np.ndarray,
    policy: Literal["extra_level", "next_free", "keep"] = "next_free",
) -> torch.Tensor:
    """
    Codes after a collision policy.

    Args:
        codes (`torch.LongTensor` of shape `(num_items, num_levels)`): as the quantizer gave them.
        quantizer (`ResidualKMeans`): fitted; its last codebook decides what is near.
        item_embeddings (`(num_items, embedding_dim)`): what `codes` were made from.
        policy:
            `"extra_level"`: one more level numbers the items inside a semantic ID, 0, 1, ... in item order.
            `"next_free"`: the item nearest to its last-level centroid keeps its code; each other one, nearest first, takes the nearest
            code of the last level that is free under the same prefix. The levels above stay as they are.
            `"keep"`: nothing changes; items share a semantic ID, and the catalogue ranks them inside it by popularity.

    Returns:
        `torch.LongTensor` of shape `(num_items, num_levels)`, or `(num_items, num_levels + 1)` under `"extra_level"`.

    Raises:
        ValueError: an unknown policy, or, under `"next_free"`, a prefix with more items than codes.
    """
    if policy not in POLICIES:
        raise ValueError(f"`policy` is {policy!r}; allowed are {', '.join(map(repr, POLICIES))}.")
    if policy == "keep":
        return codes.clone()
    if policy == "extra_level":
        return torch.cat([codes, _rank_in_group(_group_of(codes)).unsqueeze(1)], dim=1)
    return _next_free(codes, quantizer, torch.as_tensor(item_embeddings))


def _group_of(codes: torch.Tensor) -> torch.Tensor:
    """Number of the distinct row that each row equals, (N,)."""
    return torch.unique(codes, dim=0, return_inverse=True)[1]


def _rank_in_group(group: torch.Tensor) -> torch.Tensor:
    """Position of each row among the rows of its group, in row order, (N,)."""
    order = group.argsort(stable=True)
    start = torch.nn.functional.pad(torch.bincount(group).cumsum(0), (1, 0))[:-1]
    rank = torch.empty_like(group)
    rank[order] = torch.arange(len(group), device=group.device) - start[group[order]]
    return rank


def _next_free(codes: torch.Tensor, quantizer: ResidualKMeans, item_embeddings: torch.Tensor) -> torch.Tensor:
    codebook = quantizer.codebooks[-1].to(codes.device)
    size = len(codebook)
    prefix = _group_of(codes[:, :-1]) if codes.shape[1] > 1 else torch.zeros_like(codes[:, 0])
    crowded = torch.bincount(prefix)
    if crowded.max() > size:
        worst = codes[prefix == crowded.argmax()][0, :-1].tolist()
        raise ValueError(
            f"{int((crowded > size).sum())} prefixes hold more items than the last level has codes ({size}); the largest, {worst}, "
            f"holds {int(crowded.max())}. Use a larger codebook_size or more levels, or policy='extra_level' or 'keep'."
        )
    clash = torch.bincount(_group_of(codes))[_group_of(codes)] > 1
    affected = torch.isin(prefix, prefix[clash].unique())  # only prefixes in which something collides can change
    rows = affected.nonzero()[:, 0]
    rows = rows[prefix[rows].argsort(stable=True)]
    upper = torch.cat([codes[rows, :-1], torch.zeros_like(codes[rows, :1])], dim=1)
    ends = prefix[rows].unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
    result, position = codes.clone(), 0
    for end in ends:  # one prefix at a time: its items and the free codes of its last level
        part = rows[position:end]
        above = quantizer.decode(upper[position:end]) - codebook[0]  # what the levels above reconstruct
        residual = item_embeddings[part].to(codebook.dtype) - above
        result[part, -1] = _assign(torch.cdist(residual, codebook), codes[part, -1])
        position = end
    return result


def _assign(distance: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Different codes for the items of one prefix: owners first (nearest to the code they want), then the others, nearest first."""
    own = distance.gather(1, wanted.unsqueeze(1))[:, 0]
    taken, result, left = {}, wanted.clone(), []
    for item in own.argsort(stable=True).tolist():
        if int(wanted[item]) in taken:
            left.append(item)
        else:
            taken[int(wanted[item])] = item
    free = torch.ones(distance.shape[1], dtype=torch.bool, device=distance.device)
    free[list(taken)] = False
    for item in left:
        code = distance[item].masked_fill(~free, float("inf")).argmin()
        result[item], free[code] = code, False
    return result
