"""k-means of one level: Lloyd's algorithm, plain or balanced (OneRec, arXiv:2502.18965, Algorithm 1).

N items, K codebook size, D embedding width. All arithmetic is float32, in blocks of rows: nothing of size N x K is
ever held.
"""

import logging
import math
from typing import Literal

import torch

from .balance import Prices, balanced_sizes, cheapest, enforce_sizes
from .distances import Rows, row_blocks, squared_distances
from .exchange import exchange_items

logger = logging.getLogger(__name__)

# Most Lloyd iterations see a random sample: this many items per code (at least _MIN_SAMPLE_ITEMS in all). Plain
# clusters differ in size, so that their sample must be larger: 256 is what faiss takes.
_BALANCED_SAMPLE_PER_CODE = 64
_PLAIN_SAMPLE_PER_CODE = 256
_MIN_SAMPLE_ITEMS = 16384
# Balanced clusters of at most so many items times codes: every assignment is the cheapest there is. Beyond it prices
# are made better until an assignment is at most `_SMALL_GAP` dearer than the cheapest one, in at most so many rounds.
# Where more than `_LARGEST_GAP` is left, items are exchanged, unless they are many: that cost grows with N squared.
_FEW_DISTANCES = 2**18
_SMALL_GAP = 0.003
_MOST_ROUNDS = 4
_LARGEST_GAP = 0.01
_MOST_EXCHANGES = 2**24
_SEED_ITEMS_PER_CODE = 16  # of these (at least _MIN_SAMPLE_ITEMS in all) k-means++ chooses


def nearest_centroids(items: Rows, centroids: torch.Tensor, prices: torch.Tensor | None = None) -> torch.Tensor:
    """`argmin_k ||x - c_k||^2 + p_k` of every item, the lower index on ties.

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): vectors, any float type.
        centroids (`torch.FloatTensor` of shape `(K, D)`): float32, on the same device.
        prices (`torch.FloatTensor` of shape `(K,)`, *optional*): none where not given.

    Returns:
        `torch.LongTensor` of shape `(N,)`.
    """
    codes = torch.empty(len(items), dtype=torch.long, device=items.device)
    for block in row_blocks(len(items), len(centroids), items.device):
        # `min` and not `argmin`: on a processor it takes a third of the time.
        codes[block] = squared_distances(items[block], centroids, prices).min(dim=1).indices
    return codes


def cluster_means(items: Rows, codes: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (K, D) and sizes (K,) of the clusters; an empty cluster keeps its `previous` centroid."""
    sums = torch.zeros_like(previous, dtype=torch.float64)
    for block in row_blocks(len(items), items.shape[1], items.device):
        sums += torch.zeros_like(previous).index_add_(0, codes[block], items[block])
    sizes = torch.bincount(codes, minlength=len(previous))
    means = (sums / sizes.clamp_min(1).unsqueeze(1)).to(previous.dtype)
    return torch.where((sizes == 0).unsqueeze(1), previous, means), sizes


def train_codebook(
    items: Rows,
    codebook_size: int,
    *,
    balanced: bool | Literal["greedy"],
    num_iterations: int,
    num_full_iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebook and codes of the training items for one level.

    Balanced clusters start from `codebook_size` items at random, as the paper does, plain ones from
    `kmeans_plus_plus`; then `num_iterations` Lloyd iterations over a random sample of the items and
    `num_full_iterations` over all of them. `"greedy"`: Algorithm 1 as printed, all iterations over all items.

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): float32, `N >= codebook_size`.
        codebook_size (`int`): K.
        balanced (`bool` or `"greedy"`): clusters of exactly `N // K` items, the first `N % K` of them with one more.
        num_iterations, num_full_iterations (`int`): see above; the latter at least 1.
        generator (`torch.Generator`): on the CPU; picks the sample and the starting centroids.

    Returns:
        `(centroids (K, D) float32, codes (N,) int64)`. Balanced: `codes` are the balanced clusters and the centroids
        their means. Plain: `codes` are the nearest centroids.
    """
    per_code = _BALANCED_SAMPLE_PER_CODE if balanced else _PLAIN_SAMPLE_PER_CODE
    order = torch.randperm(len(items), generator=generator)
    order = order[: max(per_code * codebook_size, _MIN_SAMPLE_ITEMS)].clone().to(items.device)
    if balanced == "greedy":
        return _greedy(items, order, codebook_size, num_iterations + num_full_iterations)
    if balanced:
        return _balanced(items, order, codebook_size, num_iterations, num_full_iterations)
    return _plain(items, order, codebook_size, num_iterations, num_full_iterations, generator)


def kmeans_plus_plus(items: torch.Tensor, codebook_size: int, generator: torch.Generator) -> torch.Tensor:
    """
    Starting centroids: greedy k-means++ (Arthur and Vassilvitskii, SODA 2007), as scikit-learn does it.

    Every next centroid is an item drawn with probability proportional to its squared distance to the nearest centroid
    so far: of `2 + ln K` draws the one that leaves the smallest sum of squared distances.

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): float32, `N >= codebook_size`.
        codebook_size (`int`): K.
        generator (`torch.Generator`): on the CPU.

    Returns:
        `torch.FloatTensor` of shape `(K, D)`: K rows of `items`; repeated ones only where fewer than K differ.
    """
    trials = 2 + int(math.log(codebook_size))
    norms = items.square().sum(dim=1)
    chosen = torch.randint(len(items), (1,), generator=generator).to(items.device)
    centroids = [items[chosen]]
    nearest = (squared_distances(items, centroids[0])[:, 0] + norms).clamp_min_(0)  # (N,)
    for _ in range(codebook_size - 1):
        cumulative = nearest.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(items.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws, right=True).clamp_max_(len(items) - 1)
        distances = (squared_distances(items, items[candidates]) + norms.unsqueeze(1)).clamp_min_(0)  # (N, trials)
        distances = torch.minimum(distances, nearest.unsqueeze(1))
        best = distances.sum(dim=0).argmin()
        nearest = distances[:, best]
        centroids.append(items[candidates[best]].unsqueeze(0))
    return torch.cat(centroids)


def _plain(
    items, order, codebook_size, num_iterations, num_full_iterations, generator
) -> tuple[torch.Tensor, torch.Tensor]:
    sample = items[order]
    seeds = sample[: max(_SEED_ITEMS_PER_CODE * codebook_size, _MIN_SAMPLE_ITEMS)]
    centroids = kmeans_plus_plus(seeds, codebook_size, generator)
    for iteration in range(num_iterations + num_full_iterations):
        seen = sample if iteration < num_iterations else items
        codes = nearest_centroids(seen, centroids)
        centroids, sizes = cluster_means(seen, codes, centroids)
        centroids = _reset_empty(seen, codes, centroids, sizes)
    return centroids, nearest_centroids(items, centroids)


def _balanced(items, order, codebook_size, num_iterations, num_full_iterations) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm whose assignment step is a transport problem: prices first, then the last few exchanges.

    This is not Algorithm 1 as printed (`_greedy`), which fills the clusters one after the other: K passes per
    iteration, a result that depends on their order, and the last clusters get what nobody wanted.
    """
    sample = items[order]
    centroids = sample[:codebook_size].clone()
    sizes = balanced_sizes(len(items), codebook_size).to(items.device)
    prices = Prices(sizes)
    if len(items) * codebook_size <= _FEW_DISTANCES:  # exact assignments are cheap: no sample
        num_iterations, num_full_iterations = 0, num_iterations + num_full_iterations
    for iteration in range(num_iterations):
        first_half = 2 * iteration < num_iterations  # coarse centroids need few items
        seen = sample[: max(prices.sample_size, len(sample) // 4)] if first_half else sample
        own = prices.solve(sample, centroids)
        codes = torch.cat([own, nearest_centroids(seen[len(own) :], centroids, prices.values)])
        prices.correct(codes, own)
        centroids, _ = cluster_means(seen, codes, centroids)
    lowest = float("inf")
    best: tuple[torch.Tensor, torch.Tensor]
    for _ in range(num_full_iterations):
        codes, gap = _assign(items, sample, centroids, prices, sizes)
        centroids, _ = cluster_means(items, codes, centroids)
        # Squared error of a partition: sum_i ||x_i||^2, the same for all, minus sum_k |V_k| ||c_k||^2.
        error = -(sizes * centroids.double().square().sum(dim=1)).sum().item()
        if error < lowest:
            lowest, best, best_gap = error, (centroids, codes), gap
    if best_gap > _LARGEST_GAP:
        logger.warning("Clusters of equal size: another assignment may cost up to %.1f%% less.", 100 * best_gap)
    return best


def _assign(items, sample, centroids, prices, sizes) -> tuple[torch.Tensor, float]:
    """Codes (N,) with exactly these sizes, and by what share of their cost others may be cheaper.

    Prices are made for the sample first. A round reads all items once, and more rounds follow while prices that are
    made for all items help.
    """
    lowest, few = math.inf, len(items) * len(centroids) <= _FEW_DISTANCES
    own = prices.solve(sample, centroids)
    for rounds in range(_MOST_ROUNDS):
        costs, clusters = cheapest(items, centroids, prices.values)
        codes, margins = clusters[0].long(), costs[min(1, len(costs) - 1)] - costs[0]
        if rounds == 0:
            prices.correct(codes, own)
        seated = enforce_sizes(items, centroids, prices.values, codes, margins, sizes)
        gap = _largest_gap(items, centroids, prices.values, codes, seated)
        before, lowest = lowest, min(lowest, gap)
        if gap == lowest:
            best = seated
        if few or gap <= _SMALL_GAP or gap > 0.9 * before:
            break
        prices.refine(costs, clusters)
        del costs, clusters  # the next ones are as large
    if few or (lowest > _LARGEST_GAP and len(items) * len(centroids) <= _MOST_EXCHANGES):
        return exchange_items(items, centroids, best), 0.0
    return best, lowest


def _largest_gap(items, centroids, prices, cheapest, codes) -> float:
    """By what share of its cost `codes` may be dearer than the cheapest assignment with the same sizes.

    At any prices, no assignment costs less than that of every item to its `cheapest` cluster, less what full clusters
    would pay (the dual). With the prices of both sides taken off, the difference is that of single items.
    """
    saved = cost = 0.0
    for block in row_blocks(len(items), items.shape[1], items.device):
        own = (items[block] - centroids[codes[block]]).square().sum(dim=1)
        least = (items[block] - centroids[cheapest[block]]).square().sum(dim=1)
        saved += (own + prices[codes[block]] - least - prices[cheapest[block]]).sum().item()
        cost += own.sum().item()
    return saved / max(cost, 1e-30)


def _greedy(items, order, codebook_size, num_iterations) -> tuple[torch.Tensor, torch.Tensor]:
    """
    OneRec's Algorithm 1 as printed: cluster after cluster takes the nearest items that are left, until no item changes
    its cluster.

    That need not happen, so the iterations are counted and the cheapest of them is returned.
    """
    centroids = items[order[:codebook_size]].clone()
    sizes, norms = balanced_sizes(len(items), codebook_size).tolist(), items.square().sum(dim=1)
    best = codes = torch.full((len(items),), -1, device=items.device)
    lowest, best_centroids = float("inf"), centroids
    for _ in range(num_iterations):
        before, codes, error = codes, torch.full_like(codes, -1), 0.0
        for code, size in enumerate(sizes):
            distances = squared_distances(items, centroids[code : code + 1])[:, 0] + norms
            nearest = distances.masked_fill_(codes >= 0, math.inf).topk(size, largest=False).indices
            codes[nearest] = code
            centroids[code] = items[nearest].mean(dim=0)
            error -= size * centroids[code].double().square().sum().item()  # as in `_balanced`
        if error < lowest:
            lowest, best, best_centroids = error, codes, centroids.clone()
        if torch.equal(before, codes):
            break
    return best_centroids, best


def _reset_empty(items, codes, centroids, sizes) -> torch.Tensor:
    """Moves each centroid without items to one of the items that are farthest from theirs."""
    empty = (sizes == 0).nonzero().squeeze(1)
    if len(empty) > 0:
        errors = torch.empty(len(items), device=items.device)
        for block in row_blocks(len(items), items.shape[1], items.device):
            errors[block] = (items[block] - centroids[codes[block]]).square().sum(dim=1)
        centroids[empty] = items[errors.topk(len(empty)).indices]
    return centroids
