"""k-means of one level: Lloyd's algorithm, plain or balanced (OneRec, arXiv:2502.18965, Algorithm 1).

N items, K codebook size, D embedding width. All arithmetic is float32, in blocks of rows: nothing of size N x K is ever held.
"""

import torch

from .balance import Prices, balanced_sizes, cheapest_two, enforce_sizes
from .blocks import row_blocks, squared_distances


# Lloyd's iterations before the last few see a random sample only: 64 items place a centroid within 1/64 of its cluster's
# variance, and the full iterations remove the rest.
SAMPLE_ITEMS_PER_CODE = 64
MIN_SAMPLE_ITEMS = 16384


def nearest_centroids(items: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """`argmin_k ||x - c_k||^2` of every item, the lower index on ties.

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): vectors, any float type.
        centroids (`torch.FloatTensor` of shape `(K, D)`): float32, on the same device.

    Returns:
        `torch.LongTensor` of shape `(N,)`.
    """
    codes = torch.empty(len(items), dtype=torch.long, device=items.device)
    for block in row_blocks(len(items), len(centroids), items.device):
        codes[block] = squared_distances(items[block], centroids).argmin(dim=1)
    return codes


def cluster_means(items: torch.Tensor, codes: torch.Tensor, previous: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Means (K, D) and sizes (K,) of the clusters; an empty cluster keeps its `previous` centroid."""
    sums = torch.zeros_like(previous, dtype=torch.float64)
    for block in row_blocks(len(items), items.shape[1], items.device):
        sums += torch.zeros_like(previous).index_add_(0, codes[block], items[block])
    sizes = torch.bincount(codes, minlength=len(previous))
    means = (sums / sizes.clamp_min(1).unsqueeze(1)).to(previous.dtype)
    return torch.where((sizes == 0).unsqueeze(1), previous, means), sizes


def train_codebook(
    items: torch.Tensor,
    codebook_size: int,
    *,
    balanced: bool,
    num_iterations: int,
    num_full_iterations: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codebook and codes of the training items for one level.

    Starts from `codebook_size` items at random, as the paper does. `num_iterations` Lloyd iterations run over a random sample
    (the first half of them over a quarter of it), then `num_full_iterations` over all items.

    Balanced: the assignment step is the transport problem "every cluster takes its size". Its prices come from `Prices`, the
    last exchanges from `enforce_sizes`, and the cheapest of the full iterations is kept. Algorithm 1 as printed fills the
    clusters one after the other instead, which costs K passes per iteration, depends on the order of the clusters, does not
    converge, and leaves the last clusters with what nobody wanted (`benchmarks/semantic_ids.py` runs it).

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): float32, `N >= codebook_size`.
        codebook_size (`int`): K.
        balanced (`bool`): clusters of exactly `N // K` items, the first `N % K` of them with one more.
        num_iterations, num_full_iterations (`int`): see above; the latter at least 1.
        generator (`torch.Generator`): on the CPU; picks the sample and the starting centroids.

    Returns:
        `(centroids (K, D) float32, codes (N,) int64)`. Balanced: the centroids are the means of the clusters that `codes`
        describes. Plain: `codes` are the nearest centroids.
    """
    order = torch.randperm(len(items), generator=generator)
    order = order[: max(SAMPLE_ITEMS_PER_CODE * codebook_size, MIN_SAMPLE_ITEMS)].to(items.device)
    sample = items[order]
    centroids = sample[:codebook_size].clone()
    if not balanced:
        return _plain(items, sample, centroids, num_iterations, num_full_iterations)

    sizes = balanced_sizes(len(items), codebook_size).to(items.device)
    prices = Prices(sizes)
    for iteration in range(num_iterations):
        seen = sample[: max(prices.sample_size, _share(iteration, num_iterations, len(sample)))]
        prices.solve(sample, centroids)
        codes, _ = cheapest_two(seen, centroids, prices.values)
        prices.correct(codes, codes[: prices.sample_size])
        centroids, _ = cluster_means(seen, codes, centroids)

    cheapest, best = float("inf"), None
    for _ in range(num_full_iterations):
        prices.solve(sample, centroids)
        codes, margins = cheapest_two(items, centroids, prices.values)
        prices.correct(codes, codes[order[: prices.sample_size]])
        codes = enforce_sizes(items, centroids, prices.values, codes, margins, sizes)
        centroids, _ = cluster_means(items, codes, centroids)
        # The squared error of a partition is sum ||x||^2 - sum_k |V_k| ||c_k||^2, and the first sum is a constant.
        cost = -(sizes * centroids.double().square().sum(dim=1)).sum().item()
        if cost < cheapest:
            cheapest, best = cost, (centroids, codes)
    return best


def _share(iteration: int, num_iterations: int, sample_size: int) -> int:
    return sample_size if 2 * iteration >= num_iterations else sample_size // 4


def _plain(items, sample, centroids, num_iterations, num_full_iterations) -> tuple[torch.Tensor, torch.Tensor]:
    for iteration in range(num_iterations + num_full_iterations):
        full = iteration >= num_iterations
        seen = items if full else sample[: max(len(centroids), _share(iteration, num_iterations, len(sample)))]
        codes = nearest_centroids(seen, centroids)
        centroids, sizes = cluster_means(seen, codes, centroids)
        centroids = _reset_empty(seen, codes, centroids, sizes)
    return centroids, nearest_centroids(items, centroids)


def _reset_empty(items, codes, centroids, sizes) -> torch.Tensor:
    """Moves each centroid without items to one of the items that are farthest from theirs."""
    empty = (sizes == 0).nonzero().squeeze(1)
    if len(empty) > 0:
        errors = torch.empty(len(items), device=items.device)
        for block in row_blocks(len(items), items.shape[1], items.device):
            errors[block] = (items[block] - centroids[codes[block]]).square().sum(dim=1)
        centroids[empty] = items[errors.topk(len(empty)).indices]
    return centroids
