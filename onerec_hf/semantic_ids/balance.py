"""Clusters of equal size, as in balanced k-means (OneRec, arXiv:2502.18965, Algorithm 1), by optimal transport.

With fixed centroids, "every cluster takes exactly its size, at the least total squared distance" is a transport
problem. Its dual has one price per cluster: item x goes to `argmin_k ||x - c_k||^2 + p_k`, and the right prices make
every cluster exactly full (power diagrams; Aurenhammer, Hoffmann, Aronov, Algorithmica 20, 1998). Algorithm 1 as
printed fills one cluster after the other instead: that is `kmeans._greedy`; see `kmeans._balanced` for why it is not
the default.
"""

import torch

from .distances import Rows, row_blocks, squared_distances

# The prices are solved on a sample: 16 items per code, fewer where a (sample, K) matrix, of which two exist at a time,
# would have more than 2^25 elements, but at least 4 per code (K = 8192: 1 GiB) and at least 4096 in all.
_MOST_ITEMS_PER_CODE = 16
_LEAST_ITEMS_PER_CODE = 4
_LEAST_ITEMS = 4096
_ELEMENTS = 2**25
# Softness of the assignment while prices are solved, in units of the mean margin between an item's two cheapest
# clusters, and the steps at each.
_TEMPERATURES = (0.3, 0.1)
_STEPS_PER_TEMPERATURE = 16
# Clusters that are farther away weigh nothing in float32 (4e-18 of the nearest one); numbers so small that a processor
# handles them apart made a step three times as long.
_FARTHEST = -40.0
# What the sample got wrong is mended over all items, where only this many clusters per item count: the cheapest ones.
# The unit is the median margin then: far clumps make a mean that is large for most items.
_CANDIDATES = 16
_REFINED_TEMPERATURES = (0.3, 0.1, 0.03)
# `smallest` looks into chunks of so many numbers where there are at least so many times more chunks than it looks for.
_CHUNK, _MANY_CHUNKS = 32, 8
# Items of one block of such a step: its few arrays stay in the cache.
_BLOCK_ITEMS = 2**16
# `enforce_sizes` stops asking when a round seats less than this share of those who wait.
_SLOWEST_ROUND = 1 / 64


def balanced_sizes(num_items: int, codebook_size: int) -> torch.Tensor:
    """Sizes (K,): `N // K` items each, one more for the first `N % K` clusters."""
    sizes = torch.full((codebook_size,), num_items // codebook_size)
    sizes[: num_items % codebook_size] += 1
    return sizes


def cheapest(
    items: Rows, centroids: torch.Tensor, prices: torch.Tensor, count: int = _CANDIDATES
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cheapest clusters of every item, the cheapest one first.

    Returns:
        `(costs (count, N) float32, clusters (count, N) int32)`: costs are `||x - c_k||^2 - ||x||^2 + p_k`.
        `count` is K at most.
    """
    count = min(count, len(centroids))
    costs = torch.empty(count, len(items), device=items.device)
    clusters = torch.empty(count, len(items), dtype=torch.int32, device=items.device)
    for block in row_blocks(len(items), len(centroids), items.device):
        values, indices = smallest(squared_distances(items[block], centroids, prices), count)
        costs[:, block], clusters[:, block] = values.T, indices.T
    return costs, clusters


def smallest(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rows.topk(count, largest=False)` of `rows` (n, K), in half of the time where K is large on a processor.

    The smallest numbers lie in the chunks with the smallest minima, as many chunks as numbers.
    """
    num_chunks = rows.shape[1] // _CHUNK
    if rows.shape[1] % _CHUNK or num_chunks < _MANY_CHUNKS * count:
        return rows.topk(count, dim=1, largest=False)
    chunks = rows.view(len(rows), num_chunks, _CHUNK)
    best = chunks.amin(dim=2).topk(count, dim=1, largest=False).indices
    values = chunks.gather(1, best.unsqueeze(2).expand(-1, -1, _CHUNK)).flatten(1)  # (n, count * chunk)
    found = values.topk(count, dim=1, largest=False)
    return found.values, best.gather(1, found.indices // _CHUNK) * _CHUNK + found.indices % _CHUNK


def _two_smallest(costs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return costs.topk(min(2, costs.shape[1]), dim=1, largest=False)


class Prices:
    """Prices of the clusters, warm from one Lloyd iteration to the next.

    They maximise the entropy-smoothed dual of the transport problem on a fixed sample of the items, by damped Jacobi
    steps on a kernel that is computed once per temperature, so that a step is two matrix-vector products. What the
    sample gets wrong shows when the items are assigned: `correct` moves the shares that the sample must show, so that
    the items get the shares they must have (a control variate).

    Args:
        sizes (`torch.LongTensor` of shape `(K,)`): how many of all items each cluster must take.
    """

    def __init__(self, sizes: torch.Tensor):
        codebook_size = len(sizes)
        rows = min(_MOST_ITEMS_PER_CODE * codebook_size, _ELEMENTS // codebook_size)
        rows = max(rows, _LEAST_ITEMS_PER_CODE * codebook_size, _LEAST_ITEMS)
        self.sample_size = min(rows, int(sizes.sum()))
        self.shares = sizes.float() / sizes.sum()  # (K,) of all items
        self.targets = self.shares  # (K,) of the sample
        self.values = torch.zeros_like(self.shares)

    def solve(self, sample: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
        """Updates `values` for these centroids from the first `sample_size` rows of `sample`; returns their codes."""
        distances = squared_distances(sample[: self.sample_size], centroids)
        no_prices = torch.zeros_like(self.values)
        # Centroids that jumped (the first means) make warm prices worse than none.
        if self._dual(distances, self.values) < self._dual(distances, no_prices):
            self.values = no_prices
        for softness in _TEMPERATURES:
            self.values = self.values + self._ascend(distances + self.values, softness)
        self.values = self.values - self.values.mean()
        return distances.add_(self.values).min(dim=1).indices

    def refine(self, costs: torch.Tensor, clusters: torch.Tensor) -> None:
        """Updates `values` from `costs` and `clusters` (count, N), which are those of `cheapest` at the values so far;
        the prices are taken off `costs`.

        The same ascent as `solve`, over all items and few clusters of each. What these leave out shows when the
        cheapest ones are looked for again.
        """
        count, num_items = costs.shape
        margin = (costs[min(1, count - 1)] - costs[0]).median().item()
        before, reach = self.values, (costs[-1] - costs[0]).median()  # beyond it other clusters could be cheaper
        blocks = []
        for start in range(0, num_items, _BLOCK_ITEMS):
            rows = slice(start, start + _BLOCK_ITEMS)
            costs[:, rows] -= before[clusters[:, rows]]  # in place: a copy would be another 64 bytes an item
            blocks.append((costs[:, rows], clusters[:, rows]))
        for softness in _REFINED_TEMPERATURES:
            temperature = max(softness * margin, 1e-30)
            for _ in range(_STEPS_PER_TEMPERATURE):
                step = self._step(blocks, temperature).clamp(-temperature, temperature)
                self.values = torch.minimum(torch.maximum(self.values + step, before - reach), before + reach)
        self.values = self.values - self.values.mean()

    def _step(self, blocks: list[tuple[torch.Tensor, torch.Tensor]], temperature: float) -> torch.Tensor:
        load, squares, num_items = torch.zeros_like(self.values), torch.zeros_like(self.values), 0
        for distances, block in blocks:
            clusters = block.flatten()  # here, a block at a time: all of them are another 64 bytes an item
            weights = self.values.index_select(0, clusters).view_as(distances).add_(distances)
            weights = weights.sub_(weights.amin(dim=0)).div_(-temperature).clamp_(min=_FARTHEST).exp_()
            weights.div_(weights.sum(dim=0))
            load.index_add_(0, clusters, weights.flatten())
            squares.index_add_(0, clusters, weights.square_().flatten())
            num_items += weights.shape[1]
        curvature = (load - squares) / num_items + 1e-3 * self.shares
        return 0.5 * temperature * (load / num_items - self.shares) / curvature

    def correct(self, codes: torch.Tensor, sample_codes: torch.Tensor) -> None:
        """Sets the shares to aim at on the sample, given the codes that items and sample got at the same prices."""
        error = self._histogram(codes) - self._histogram(sample_codes)
        targets = (self.shares - error).clamp_min(0) + 0.1 * self.shares
        self.targets = targets / targets.sum()

    def _histogram(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.bincount(codes, minlength=len(self.shares)).float() / len(codes)

    def _dual(self, distances: torch.Tensor, prices: torch.Tensor) -> float:
        """Lower bound on the mean cost of any assignment with the target shares; the best prices maximise it."""
        return ((distances + prices).amin(dim=1).mean() - (prices * self.targets).sum()).item()

    def _ascend(self, costs: torch.Tensor, softness: float) -> torch.Tensor:
        """Change of the prices (K,) at one temperature. `costs` (n, K) is overwritten: it may be 1 GiB."""
        smallest, _ = _two_smallest(costs[:2048])
        margin = (smallest[:, -1] - smallest[:, 0]).mean().item()
        temperature = max(softness * margin, 1e-30)  # margin 0: all items are equal, and so are all temperatures
        kernel = costs.sub_(costs.amin(dim=1, keepdim=True)).div_(-temperature).clamp_(min=_FARTHEST).exp_()
        kernel.div_(kernel.sum(dim=1, keepdim=True))  # softmax in place
        squares = torch.zeros_like(self.values)
        for block in row_blocks(len(kernel), kernel.shape[1], kernel.device):
            squares += kernel[block].square().sum(dim=0)
        # The Hessian of the dual is a graph Laplacian, which twice its diagonal bounds: no K x K matrix is needed.
        curvature = kernel.mean(dim=0) - squares / len(kernel) + 1e-3 * self.shares
        change = torch.zeros_like(self.values)
        for _ in range(_STEPS_PER_TEMPERATURE):
            weights = torch.exp(-change / temperature)
            load = weights * torch.mv(kernel.T, 1 / torch.mv(kernel, weights)) / len(kernel)
            step = 0.5 * temperature * (load - self.targets) / curvature
            change += step.clamp(-temperature, temperature)
        return change


def enforce_sizes(
    items: Rows,
    centroids: torch.Tensor,
    prices: torch.Tensor,
    codes: torch.Tensor,
    margins: torch.Tensor,
    sizes: torch.Tensor,
) -> torch.Tensor:
    """Codes (N,) with exactly `sizes` items per cluster, as few items as possible away from the given codes.

    In rounds: a cluster that is asked for more items than it has room for takes those that would lose most by going
    elsewhere (`margins`); the others ask for the cheapest cluster with room left. Where nearly all of them ask for the
    same cluster round after round, they are copies of one another, and what is left of them fills the room as it
    comes.
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
            costs, nearest = cheapest(rows, centroids[open_clusters], prices[open_clusters], count=2)
            codes[block], margins[block] = open_clusters[nearest[0]], costs[-1] - costs[0]
