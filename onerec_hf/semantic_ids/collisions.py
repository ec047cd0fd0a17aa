"""Items that share a semantic ID: the policies. None of the OneRec papers states one (TIGER, arXiv:2305.05065, adds a
level).
"""

import logging

import numpy as np
import torch

from .distances import row_blocks, squared_distances
from .embedding_files import EmbeddingFiles
from .residual import ResidualKMeans
from .rqvae import RQVAE

logger = logging.getLogger(__name__)

COLLISION_POLICIES = ("extra_level", "next_free", "keep")


def resolve_collisions(
    codes: torch.Tensor,
    quantizer: ResidualKMeans | RQVAE | None = None,
    item_embeddings: torch.Tensor | EmbeddingFiles | None = None,
    *,
    policy: str,
) -> torch.Tensor:
    """Semantic IDs of a catalogue from the codes of its items.

    - `"extra_level"`: one level more, which numbers the items with the same codes by row, from 0; an item alone has 0.
      The new level has as many codes as the largest group has items. Items added later do not move the others.
    - `"next_free"`: of the items with the same codes the one nearest to its last-level centroid keeps them; the
      others, nearest first, take the nearest last-level code that is still free under the same prefix. Where more
      items share a prefix than there are codes behind it, as items do of which nothing is known, those farthest from
      it move to the nearest code of its last level that has room. No further level, every ID unique.
    - `"keep"`: items share semantic IDs; whoever ranks items must rank them inside one ID.

    Args:
        codes (`torch.LongTensor` of shape `(num_items, num_levels)`): `train_codes`, or what `encode` returned.
        quantizer (`ResidualKMeans` or `RQVAE`, *optional*): for `"next_free"`; distances are those of the space it
            quantises.
        item_embeddings (`torch.FloatTensor` or `EmbeddingFiles` of shape `(num_items, embedding_dim)`, *optional*):
            for `"next_free"`; the same rows on the same device.
        policy (`str`): one of the three.

    Returns:
        `torch.LongTensor` of shape `(num_items, num_levels)`, or `(num_items, num_levels + 1)` for `"extra_level"`.

    Raises:
        ValueError: `"next_free"` where there are more items than semantic IDs.
    """
    if policy not in COLLISION_POLICIES:
        raise ValueError(f"`policy` is {policy!r}; choose one of {', '.join(map(repr, COLLISION_POLICIES))}.")
    if policy == "keep":
        return codes.clone()
    if policy == "extra_level":
        groups = row_ids(codes)
        return torch.cat([codes, _ranks(groups, torch.zeros_like(groups)).unsqueeze(1)], dim=1)
    if quantizer is None or item_embeddings is None:
        raise ValueError('`policy="next_free"` measures distances: pass `quantizer` and `item_embeddings` as well.')
    if not isinstance(item_embeddings, EmbeddingFiles):
        item_embeddings = torch.as_tensor(item_embeddings)
    if isinstance(quantizer, RQVAE):
        return _next_free(codes, quantizer.latent, quantizer.encoder_outputs(item_embeddings))
    return _next_free(codes, quantizer, item_embeddings)


def row_ids(codes: torch.Tensor) -> torch.Tensor:
    """A number (N,) per row, equal where the rows (N, L) are equal, in lexicographic order of the rows."""
    ids = torch.zeros(len(codes), dtype=torch.long, device=codes.device)
    for column in codes.T:
        ids = torch.unique(ids * (column.max() + 1) + column, return_inverse=True)[1]
    return ids


def _ranks(groups: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Place (N,) of every row inside its group by ascending key, by row number on ties."""
    order = keys.argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]
    sizes = torch.bincount(groups)
    starts = sizes.cumsum(0) - sizes
    ranks = torch.empty_like(groups)
    ranks[order] = torch.arange(len(groups), device=groups.device) - starts[groups[order]]
    return ranks


def append_codes(
    known: torch.Tensor,
    codebook_sizes: list[int],
    quantizer: ResidualKMeans | RQVAE,
    item_embeddings: torch.Tensor,
    *,
    policy: str,
) -> torch.Tensor:
    """
    Semantic IDs of items that come after the codebooks were fitted: the nearest codes, under the policy of the
    catalogue. The items that are there keep theirs.

    Args:
        known (`torch.LongTensor` of shape `(num_items, num_levels)`): Semantic IDs of the items that are there.
        codebook_sizes (`list[int]`): Of every level.
        quantizer (`ResidualKMeans` or `RQVAE`): Fitted; it is not changed.
        item_embeddings (`torch.FloatTensor` of shape `(num_new, embedding_dim)`): Of the new items, from the model
            whose embeddings the codebooks were fitted on.
        policy (`str`): As of [`resolve_collisions`]. `"next_free"`: a new item whose semantic ID is taken moves to
            the nearest code of the last level that is free under its prefix, or, where none is, under the nearest
            prefix with room.

    Returns:
        `torch.LongTensor` of shape `(num_new, num_levels)`.

    Raises:
        ValueError: Where there is no place left: of `"next_free"` under all prefixes, of `"extra_level"` in a group.
    """
    codes = quantizer.encode(item_embeddings)
    if policy == "extra_level":
        return torch.from_numpy(append_collision_level(codes.numpy(), known.numpy(), codebook_sizes[-1]))
    if policy == "keep" or not len(codes):
        return codes
    latent = quantizer.latent if isinstance(quantizer, RQVAE) else quantizer
    if isinstance(quantizer, RQVAE):
        item_embeddings = quantizer.encoder_outputs(item_embeddings)
    no_embeddings = item_embeddings.new_zeros(len(known), item_embeddings.shape[1])  # they stay where they are
    everything = torch.cat([no_embeddings, item_embeddings])
    return _next_free(torch.cat([known, codes]), latent, everything, num_fixed=len(known))[len(known) :]


def _next_free(
    codes: torch.Tensor,
    quantizer: ResidualKMeans,
    item_embeddings: torch.Tensor | EmbeddingFiles,
    num_fixed: int = 0,
) -> torch.Tensor:
    """`num_fixed`: so many of the first items keep their codes, whatever their distances."""
    if item_embeddings.shape[0] != codes.shape[0]:
        raise ValueError(f"{len(codes)} rows of codes, but {len(item_embeddings)} rows of `item_embeddings`.")
    distances = torch.empty(len(codes), device=codes.device)
    for block in row_blocks(len(item_embeddings), item_embeddings.shape[1], codes.device):
        errors = item_embeddings[block].float() - quantizer.decode(codes[block])
        distances[block] = errors.square().sum(dim=1)
    distances[:num_fixed] = -1.0  # nearer than any other
    codes = _with_room(codes, quantizer, item_embeddings, distances, num_fixed)
    prefixes = row_ids(codes[:, :-1])
    movers = _ranks(row_ids(codes), distances).nonzero().squeeze(1)  # rank 0 keeps its codes
    movers = movers[movers >= num_fixed]
    resolved = codes.clone()
    if len(movers) == 0:
        return resolved

    # Prefixes do not touch each other, so the r-th mover of all prefixes moves at once; a part of the prefixes at a
    # time.
    crowded = torch.unique(prefixes[movers])
    place = torch.full((int(prefixes.max()) + 1,), -1, device=codes.device)
    place[crowded] = torch.arange(len(crowded), device=codes.device)
    place = place[prefixes]  # (N,) among the crowded prefixes, else -1
    present = place.argsort(stable=True)[int((place < 0).sum()) :]
    movers = movers[place[movers].argsort(stable=True)]
    present_places, mover_places = place[present], place[movers]
    ranks = _ranks(mover_places, distances[movers])
    for part in row_blocks(len(crowded), quantizer.codebook_size, codes.device):
        free = torch.ones(part.stop - part.start, quantizer.codebook_size, dtype=torch.bool, device=codes.device)
        items = present[_span(present_places, part)]
        free[place[items] - part.start, codes[items, -1]] = False
        span = _span(mover_places, part)
        turns = movers[span][ranks[span].argsort(stable=True)]
        for rows in torch.split(turns, torch.bincount(ranks[span]).tolist()):
            prefix = place[rows] - part.start
            taken = _nearest_free(codes[rows], quantizer, item_embeddings[rows], free[prefix])
            free[prefix, taken] = False
            resolved[rows, -1] = taken
    return resolved


def _span(ascending: torch.Tensor, part: slice) -> slice:
    """Where the values in `[part.start, part.stop)` stand in an ascending vector."""
    bounds = torch.tensor([part.start, part.stop], device=ascending.device)
    return slice(*torch.searchsorted(ascending, bounds).tolist())


def _nearest_free(codes, quantizer, item_embeddings, free) -> torch.Tensor:
    """Nearest last-level code (n,) among the free ones (n, K) of each item."""
    last = quantizer.codebooks[-1].to(codes.device)
    residuals = item_embeddings.float() - quantizer.decode(codes) + last[codes[:, -1]]
    return squared_distances(residuals, last).masked_fill_(~free, float("inf")).argmin(dim=1)


def _with_room(codes, quantizer, item_embeddings, distances, num_fixed: int) -> torch.Tensor:
    """Codes where no prefix has more items than there are codes behind it; `distances` (N,) of what moved are new."""
    size, levels = quantizer.codebook_size, codes.shape[1]
    if len(codes) > size**levels:
        raise ValueError(
            f"{len(codes)} items, but {levels} levels of {size} codes name only {size**levels}: use "
            '`policy="extra_level"`, a larger `codebook_size` or one level more. Codebooks that are full for new '
            "items must be fitted anew, and the model with them."
        )
    moved = torch.zeros(len(codes), dtype=torch.bool, device=codes.device)
    for level in range(levels - 1):  # from the first on: what moves takes new codes on all levels behind
        places = size ** (levels - 1 - level)  # of a prefix that ends here
        prefixes = row_ids(codes[:, : level + 1])
        if int(torch.bincount(prefixes).max()) <= places:
            continue  # as nearly always: no ranks, which sort all items twice
        leaves = _ranks(prefixes, distances) >= places
        leaves[:num_fixed] = False
        if not leaves.any():
            continue
        codes, moved = codes.clone(), moved | leaves
        above = row_ids(codes[:, :level]) if level else torch.zeros(len(codes), dtype=torch.long, device=codes.device)
        for group in above[leaves].unique().tolist():
            movers = (leaves & (above == group)).nonzero().squeeze(1)
            movers = movers[distances[movers].argsort(stable=True)]
            room = (places - torch.bincount(codes[~leaves & (above == group), level], minlength=size)).cpu()
            for block in row_blocks(len(movers), size, codes.device):
                rows = movers[block]
                codes[rows], distances[rows] = _moved(codes[rows], level, quantizer, item_embeddings[rows], room)
    if moved.any():
        logger.warning(
            "%d items had more company under their first codes than there are codes behind these: they moved to the "
            "nearest codes with room",
            int(moved.sum()),
        )
    return codes


def _moved(codes, level: int, quantizer, item_embeddings, room: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of items (n, L), new codes from `level` on, the nearest with `room` (K,), which they use up, and what is nearest
    behind it; and their distances (n,).
    """
    books = quantizer.codebooks.to(codes.device)
    left = item_embeddings.float()
    for above in range(level):
        left = left - books[above][codes[:, above]]
    chosen = []  # one after the other, each by what those before it left; not on a device, which would wait
    for far in squared_distances(left, books[level]).cpu():
        chosen.append(int(far.masked_fill_(room < 1, float("inf")).argmin()))
        room[chosen[-1]] -= 1
    codes = codes.clone()
    codes[:, level] = torch.tensor(chosen, device=codes.device)
    for behind in range(level, codes.shape[1]):
        if behind > level:
            codes[:, behind] = squared_distances(left, books[behind]).argmin(dim=1)
        left = left - books[behind][codes[:, behind]]
    return codes, left.square().sum(dim=1)


def append_collision_level(codes: np.ndarray, known: np.ndarray, codebook_size: int) -> np.ndarray:
    """
    The last level of `"extra_level"` for items that come later: each one's number inside the group of items with its
    codes, behind those that are there.

    Args:
        codes: Of the new items, (M, L - 1).
        known: Semantic IDs of the items that are there, (N, L).
        codebook_size: Size of the last level.

    Raises:
        ValueError: Where a group is full.
    """
    taken: dict[tuple, int] = {}
    for row in known:
        taken[tuple(row[:-1])] = max(taken.get(tuple(row[:-1]), -1), int(row[-1]))
    last = []
    for row in map(tuple, codes):
        taken[row] = taken.get(row, -1) + 1
        last.append(taken[row])
    if max(last) >= codebook_size:
        full = sum(n >= codebook_size for n in last)
        raise ValueError(
            f"{full} new items have codes whose {codebook_size} places are all taken: fit the codebooks anew."
        )
    return np.concatenate([codes, np.array(last)[:, None]], axis=1)
