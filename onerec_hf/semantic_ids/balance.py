"""Clusters of equal size: the assignment step of balanced k-means (OneRec, arXiv:2502.18965, Algorithm 1) as optimal transport.

With fixed centroids, "every cluster takes exactly its size, at the least total squared distance" is a transport problem. Its
dual has one price per cluster: item x goes to `argmin_k ||x - c_k||^2 + p_k`, and the right prices make every cluster exactly
full (power diagrams; Aurenhammer, Hoffmann, Aronov, Algorithmica 20, 1998). The papers do not say how they solve it.
"""

import torch

from .blocks import row_blocks, squared_distances


# Items whose distances to all centroids are kept while prices are solved: 16 per code, and at most 2 GiB.
_PRICE_ITEMS_PER_CODE = 16
_MIN_PRICE_ITEMS = 4096
_MAX_PRICE_ELEMENTS = 2**29
_PRICE_STEPS = 16
# Softness of the assignment while prices are solved, in units of the mean margin between an item's best two clusters.
_TEMPERATURE = 0.1
# `enforce_sizes` stops asking when a round seats less than this share of those who wait.
_SLOWEST_ROUND = 1 / 64


def balanced_sizes(num_items: int, codebook_size: int) -> torch.Tensor:
    """Sizes (K,): `N // K` items each, one more for the first `N % K` clusters."""
    sizes = torch.full((codebook_size,), num_items // codebook_size)
    sizes[: num_items % codebook_size] += 1
    return sizes


def cheapest_two(
    items: torch.Tensor, centroids: torch.Tensor, prices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cheapest cluster at these prices (N,), and how much dearer the second cheapest one is (N,)."""
    codes = torch.empty(len(items), dtype=torch.long, device=items.device)
    margins = torch.empty(len(items), device=items.device)
    for block in row_blocks(len(items), len(centroids), items.device):
        costs, clusters = _two_smallest(squared_distances(items[block], centroids, prices))
        codes[block], margins[block] = clusters[:, 0], costs[:, -1] - costs[:, 0]
    return codes, margins


def _two_smallest(costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return costs.topk(min(2, costs.shape[1]), dim=1, largest=False)


class Prices:
    """Prices of the clusters, warm from one Lloyd iteration to the next.

    They maximise the entropy-smoothed dual of the transport problem on a fixed sample of the items, whose K x n kernel is
    computed once per call, so that a step is two matrix-vector products. What a sample gets wrong is known after the items
    were assigned: `correct` moves the sizes that the sample must show, so that the items have the sizes they must have
    (a control variate).

    Args:
        sizes (`torch.LongTensor` of shape `(K,)`): how many of all items each cluster must take.
    """

    def __init__(self, sizes: torch.Tensor):
        codebook_size = len(sizes)
        rows = max(_PRICE_ITEMS_PER_CODE * codebook_size, _MIN_PRICE_ITEMS)
        self.shares = sizes.float() / sizes.sum()  # (K,) of all items
        self.targets = self.shares  # (K,) of the price sample
        self.values = torch.zeros_like(self.shares)
        self.sample_size = min(rows, _MAX_PRICE_ELEMENTS // codebook_size, int(sizes.sum()))

    def solve(self, sample: torch.Tensor, centroids: torch.Tensor) -> None:
        """Updates `values` for these centroids from the first `sample_size` rows of `sample` (n, D)."""
        kernel, temperature = self._kernel(sample[: self.sample_size], centroids)
        load = kernel.mean(dim=0)
        # -(second derivative) of the dual is a graph Laplacian; twice its diagonal bounds it: damped Jacobi, no K x K matrix
        curvature = load - torch.linalg.vector_norm(kernel, dim=0).square() / len(kernel) + 1e-3 * self.shares
        change = torch.zeros_like(self.values)
        for _ in range(_PRICE_STEPS):
            weights = torch.exp(-change / temperature)
            load = weights * torch.mv(kernel.T, 1 / torch.mv(kernel, weights)) / len(kernel)
            step = 0.5 * temperature * (load - self.targets) / curvature
            change += step.clamp(-temperature, temperature)
        self.values = self.values + change
        self.values = self.values - self.values.mean()

    def correct(self, codes: torch.Tensor, sample_codes: torch.Tensor) -> None:
        """Sets the shares to aim at on the sample, given the codes that items and sample got at the same prices."""
        error = self._histogram(codes) - self._histogram(sample_codes)
        targets = (self.shares - error).clamp_min(0) + 0.1 * self.shares
        self.targets = targets / targets.sum()

    def _histogram(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.bincount(codes, minlength=len(self.shares)).float() / len(codes)

    def _kernel(self, sample: torch.Tensor, centroids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Soft assignment (n, K) at the present prices, and its temperature (unit: squared distance)."""
        kernel = sample.new_empty(len(sample), len(centroids))
        temperature = None
        for block in row_blocks(len(sample), len(centroids), sample.device):
            costs = squared_distances(sample[block], centroids, self.values, out=kernel[block])
            if temperature is None:
                smallest, _ = _two_smallest(costs[:2048])
                margin = (smallest[:, -1] - smallest[:, 0]).mean().item()
                # all items equal: any temperature will do
                temperature = max(_TEMPERATURE * margin, torch.finfo(torch.float32).tiny * 1e6)
            torch.softmax(costs.div_(-temperature), dim=1, out=kernel[block])
        return kernel, temperature


def enforce_sizes(
    items: torch.Tensor,
    centroids: torch.Tensor,
    prices: torch.Tensor,
    codes: torch.Tensor,
    margins: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:
    """Codes (N,) with exactly `sizes` items per cluster, as few items as possible away from the given codes.

    In rounds: a cluster that is asked for more items than it has room for takes those that would lose most by going elsewhere
    (`margins`); the others ask for the cheapest cluster with room left. Where nearly all of them ask for the same cluster round
    after round, they are copies of one another, and what is left of them fills the room as it comes.
    """
    result = torch.empty_like(codes)
    room = sizes.clone()
    waiting = torch.arange(len(items), device=items.device)
    while True:
        order = margins.argsort(descending=True, stable=True)
        order = order[codes[order].argsort(stable=True)]  # by cluster, largest margin first
        asked = torch.bincount(codes, minlength=len(sizes))
        wanted = codes[order]
        rank = torch.arange(len(order), device=items.device) - (asked.cumsum(0) - asked)[wanted]
        taken = rank < room[wanted]
        result[waiting[order[taken]]] = wanted[taken]
        room -= torch.minimum(asked, room)
        num_taken = len(waiting)
        waiting = waiting[order[~taken]]
        num_taken -= len(waiting)
        if num_taken < len(waiting) * _SLOWEST_ROUND:
            result[waiting] = torch.repeat_interleave(room)
            return result
        if len(waiting) == 0:
            return result
        open_clusters = room.nonzero().squeeze(1)
        codes = torch.empty_like(waiting)
        margins = torch.empty(len(waiting), device=items.device)
        for block in row_blocks(len(waiting), max(len(open_clusters), items.shape[1]), items.device):
            rows = items[waiting[block]]
            nearest, margins[block] = cheapest_two(rows, centroids[open_clusters], prices[open_clusters])
            codes[block] = open_clusters[nearest]
