"""The cheapest clusters of given sizes: exchanges of items until none helps."""

import torch

from .distances import Rows, row_blocks, squared_distances


def exchange_items(items: Rows, centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """
    Passes items around between clusters while that lowers the sum of squared distances; every size stays.

    A round of a pass gives one item of cluster a to b, one of b to c, ..., and one of the last cluster back to a. Such
    rings are the negative cycles of the transport problem's residual graph (Klein, Management Science 14, 1967): where
    none is left, no assignment with these sizes is cheaper, up to `1e-6` of the mean squared distance per item.

    Args:
        items (`torch.FloatTensor` of shape `(N, D)`): float32.
        centroids (`torch.FloatTensor` of shape `(K, D)`): fixed.
        codes (`torch.LongTensor` of shape `(N,)`): an assignment; no cluster is empty.

    Returns:
        `torch.LongTensor` of shape `(N,)`: the cheaper assignment.
    """
    num_clusters = len(centroids)
    sizes = torch.bincount(codes, minlength=num_clusters)
    members = torch.full((num_clusters, int(sizes.max())), -1, device=items.device)
    order = codes.argsort(stable=True)
    slots = torch.arange(len(order), device=items.device) - (sizes.cumsum(0) - sizes)[codes[order]]
    members[codes[order], slots] = order
    tolerance = 1e-6 * _mean_distance(items, centroids, codes)
    # moves[a, b]: what the item of a that loses least costs more in b; leavers[a, b]: its slot in a.
    moves = torch.empty(num_clusters, num_clusters, device=items.device)
    leavers = torch.empty_like(moves, dtype=torch.long)
    touched = torch.arange(num_clusters, device=items.device)
    while True:
        for block in row_blocks(len(touched), members.shape[1] * max(num_clusters, items.shape[1]), items.device):
            rows = touched[block]
            held = members[rows]  # (r, S)
            costs = squared_distances(items[held.flatten()], centroids).view(*held.shape, num_clusters)
            costs = costs - costs.gather(2, rows.view(-1, 1, 1).expand(-1, held.shape[1], 1))
            costs.masked_fill_((held < 0).unsqueeze(2), torch.inf)
            moves[rows], leavers[rows] = costs.min(dim=1)
        rings = _negative_cycles((moves + tolerance).fill_diagonal_(torch.inf))
        if not rings:
            break
        for ring in rings:
            places = [(a, int(leavers[a, b])) for a, b in zip(ring, ring[1:] + ring[:1], strict=True)]
            passed = [int(members[place]) for place in places]
            for place, item in zip(places, passed[-1:] + passed[:-1], strict=True):
                members[place] = item
        touched = torch.tensor([cluster for ring in rings for cluster in ring], device=items.device)
    result = torch.empty_like(codes)
    clusters = torch.arange(num_clusters, device=items.device).unsqueeze(1).expand_as(members)
    result[members[members >= 0]] = clusters[members >= 0]
    return result


def _mean_distance(items, centroids, codes) -> float:
    total = 0.0
    for block in row_blocks(len(items), items.shape[1], items.device):
        total += (items[block] - centroids[codes[block]]).square().sum().item()
    return total / len(items)


def _negative_cycles(weights: torch.Tensor) -> list[list[int]]:
    """Disjoint cycles of negative weight, by Bellman and Ford's algorithm from all clusters at once; none: `[]`."""
    distances = torch.zeros(len(weights), device=weights.device)
    before = torch.full((len(weights),), -1, device=weights.device)
    for _ in range(len(weights)):
        shorter, via = (distances.unsqueeze(1) + weights).min(dim=0)
        better = shorter < distances
        if not better.any():
            return []
        distances = torch.where(better, shorter, distances)
        before = torch.where(better, via, before)
        cycles = _cycles(before.tolist())
        if cycles:
            return cycles
    return []


def _cycles(before: list[int]) -> list[list[int]]:
    """Cycles of the graph in which every node has one predecessor, or none (-1); each in forward order."""
    seen = [-1] * len(before)
    cycles = []
    for start in range(len(before)):
        node = start
        while node >= 0 and seen[node] < 0:
            seen[node] = start
            node = before[node]
        if node >= 0 and seen[node] == start:
            cycle, last = [node], node
            while before[last] != node:
                last = before[last]
                cycle.append(last)
            cycles.append(cycle[::-1])
    return cycles
