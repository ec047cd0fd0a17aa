"""A flat, sorted prefix index over semantic IDs: which codes may follow which prefix.

The layout follows STATIC (arXiv:2602.22647) without its dense tables: the nodes of a level are sorted by prefix, so
that a node's id is its position, its children are one run of the next level, and the nodes of the last level, the
leaves, are the semantic IDs in order. Legend: B users, K beams, N items, L levels, W children per run.
"""

import numpy as np
import torch
import torch.nn.functional as F

RUN_LENGTH = 32  # children per run of `PrefixIndex.expand`


def _smallest(values: np.ndarray) -> torch.Tensor:
    """The values (none negative) in the smallest integer type that holds them."""
    types = ((np.uint8, 2**8), (np.int16, 2**15), (np.int32, 2**31), (np.int64, 2**63))
    return torch.from_numpy(values.astype(next(kind for kind, end in types if values.max() < end)))


class PrefixIndex:
    """
    What the search asks about a set of semantic IDs; [`Catalogue`] adds the items.

    Attributes:
        codebook_sizes (`list[int]`): Codes per level.
        codes (`list[torch.Tensor]`): Per level, the last code of each node.
        surplus (`list[torch.Tensor]`): Per level, (first child of a node) - (number of the node), and one end more. A
            node has at least one child, so this is how many children beyond one the nodes before it have: small
            numbers in a small type where prefixes are nearly unique. Below a leaf lie the places of its items.
        max_children (`list[int]`): Most children of one node that lie on each level; on the first level, those of the
            root.
        max_items (`int`): Most items of one leaf.
    """

    codebook_sizes: list[int]
    codes: list[torch.Tensor]
    surplus: list[torch.Tensor]
    max_children: list[int]
    max_items: int
    _run_counts: list[list[tuple[int, int]]]

    def _build_index(self, key: np.ndarray, codebook_sizes: list[int]):
        """`key` (N,): the semantic IDs as sorted numbers, (size - 1).bit_length() bits per level."""
        self.codebook_sizes = codebook_sizes
        self.codes, self.surplus, self.max_children, self._run_counts = [], [], [], []
        for size in reversed(codebook_sizes):
            bits = (size - 1).bit_length()
            first = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1, [len(key)]])
            children = np.diff(first)
            # how many nodes have how many runs of children, most runs first
            histogram = np.bincount((children + RUN_LENGTH - 1) // RUN_LENGTH)
            self._run_counts.insert(
                0, [(runs, int(histogram[runs])) for runs in np.flatnonzero(histogram)[::-1].tolist()]
            )
            self.max_children.insert(0, int(children.max()))
            self.surplus.insert(0, _smallest(first - np.arange(len(first))))
            key = key[first[:-1]]
            self.codes.insert(0, _smallest(key & ((1 << bits) - 1)))
            key = key >> bits
        *self.max_children, self.max_items = [len(self.codes[0]), *self.max_children]

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.codes)

    @property
    def num_semantic_ids(self) -> int:
        """Leaves of the index: different semantic IDs; fewer than items where semantic IDs collide."""
        return len(self.codes[-1])

    def first_child(self, node: torch.Tensor, level: int) -> torch.Tensor:
        """First child of nodes of `level`; of `node + 1`, the end of the children. Below a leaf, a place in
        `item_order`.
        """
        return self.surplus[level][node] + node

    def leaf_range(self, node: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First leaf below nodes of `level` (0-based) and the one behind the last, in the shape of `node`."""
        first, end = node, node + 1
        for above in range(level, self.num_levels - 1):
            first, end = self.first_child(first, above), self.first_child(end, above)
        return first, end

    def children(self, node: torch.Tensor | None, level: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Children on `level` (0-based) of nodes of the level above; `node=None` is the root.

        Returns:
            codes (..., W), node ids (..., W) and a bool mask (..., W) of real children; W is the largest fan-out of
            the level.
        """
        child = torch.arange(self.max_children[level], device=self.codes[0].device)
        if node is None:
            return self.codes[0].long(), child, torch.ones_like(child, dtype=torch.bool)
        child = self.first_child(node, level - 1).unsqueeze(-1) + child
        real = child < self.first_child(node + 1, level - 1).unsqueeze(-1)
        child = child.clamp(max=len(self.codes[level]) - 1)
        return self.codes[level][child].long(), child, real

    def valid_codes(
        self, node: torch.Tensor | None, level: int, node_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        The codes of `level` that lead on from nodes of the level above (R,), -1 for none; `node=None` is the root.

        Args:
            node_mask (`torch.BoolTensor` of shape (B, nodes of `level`), *optional*): Those that count; rows of a
                request are adjacent.

        Returns:
            `torch.BoolTensor` of shape (R, V_level); at the root (1 or B, V_level).
        """
        codes, child, real = self.children(None if node is None else node.clamp(min=0), level)
        if node is None:
            real = real[None] if node_mask is None else node_mask
        else:
            real = real & (node >= 0).unsqueeze(1)
            if node_mask is not None:
                real = real & node_mask.repeat_interleave(node.shape[0] // node_mask.shape[0], 0).gather(1, child)
        size = self.codebook_sizes[level]
        code = torch.where(real, codes, size)  # what is no child goes to one column more
        valid = torch.zeros(code.shape[0], size + 1, dtype=torch.bool, device=code.device)
        return valid.scatter_(1, code, True)[:, :-1]

    def expand(
        self, node: torch.Tensor | None, level: int, beams: int = 1, distinct: bool = True, padded: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        All children of K nodes per request, in R runs of W children.

        Two layouts, the smaller one is taken: one run per node, as long as the largest fan-out of the level, or runs
        of 32 children. Where the nodes of a request are different, the runs of the K largest nodes of the level bound
        the number of runs exactly, so nothing is lost and no length has to be read back from a device. On a CPU, where
        reading costs nothing, there are as many runs as the largest request has; a compiled graph keeps the bound.

        Args:
            node (`torch.LongTensor` of shape (B, K)): Nodes of the level above, -1 for none; None is the root.
            beams (`int`, defaults to 1): K at the root, whose children are then listed once per beam.
            distinct (`bool`, defaults to `True`): Whether no node occurs twice in a row of `node`.
            padded (`bool`, defaults to `False`): Always one run per node, R = K.

        Returns:
            parent (B, R) (position 0..K-1 in its row), child (B, R, W), each int64, and a bool mask (B, R, W) of real
            ones. At the root B is 1.
        """
        if node is None:
            parent = torch.arange(beams, device=self.codes[0].device)[None]
            child = torch.arange(len(self.codes[0]), device=parent.device).expand(1, beams, -1)
            return parent, child, torch.ones((), dtype=torch.bool, device=parent.device).expand(child.shape)
        batch, beams = node.shape
        start = self.first_child(node.clamp(min=0), level - 1)
        count = self.first_child(node.clamp(min=0) + 1, level - 1) - start
        count = count.masked_fill(node < 0, 0)  # (B, K) children
        width = RUN_LENGTH
        ends = ((count + width - 1) // width).cumsum(1)  # (B, K) runs up to and with this beam
        runs = self._run_bound(level, beams) if distinct else beams * -(-self.max_children[level] // width)
        if ends.device.type == "cpu" and not torch.compiler.is_compiling():
            runs = max(1, int(ends[:, -1].max()))  # nothing to wait for: as many as there are
        if padded or beams * self.max_children[level] <= runs * width:
            width = self.max_children[level]
            parent = torch.arange(beams, device=node.device).expand(batch, -1)
        else:
            run = torch.arange(runs, device=node.device).expand(batch, -1).contiguous()
            parent = torch.searchsorted(ends, run, right=True).clamp(max=beams - 1)  # (B, R)
            skipped = (run - F.pad(ends, (1, -1)).gather(1, parent)) * width
            start, count = start.gather(1, parent) + skipped, count.gather(1, parent) - skipped
            # behind the last run, the last beam's count is used up: negative or zero
        offset = torch.arange(width, device=node.device)
        child = (start.unsqueeze(2) + offset).clamp_(max=len(self.codes[level]) - 1)
        return parent, child, offset < count.unsqueeze(2)

    def _run_bound(self, level: int, beams: int) -> int:
        """The most runs of 32 children that `beams` different nodes of the level above can have."""
        total = 0
        for runs, nodes in self._run_counts[level - 1]:
            total, beams = total + runs * min(nodes, beams), beams - min(nodes, beams)
        return total

    def step(self, node: torch.Tensor | None, level: int, code: torch.Tensor) -> torch.Tensor:
        """The child of `node` that carries `code` on `level`, or -1; a dead parent (-1) stays dead. Shapes are
        equal.
        """
        if node is None:
            low, end = torch.zeros_like(code), torch.full_like(code, len(self.codes[0]))
        else:
            low, end = (self.first_child(node.clamp(min=0) + more, level - 1) for more in (0, 1))
        codes, high = self.codes[level], end
        for _ in range(self.max_children[level].bit_length()):  # binary search in the sorted run of children
            middle = (low + high) // 2
            right = (middle < high) & (codes[middle.clamp(max=len(codes) - 1)] < code)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        found = (low < end) & (codes[low.clamp(max=len(codes) - 1)] == code)
        if node is not None:
            found = found & (node >= 0)
        return torch.where(found, low, -1)

    def _node_masks(self, places: torch.Tensor) -> list[torch.Tensor]:
        """Per level, the nodes (B, nodes) below which one of the `places` (B, N) of items is True."""
        mask = places
        masks: list[torch.Tensor] = []
        for level in reversed(range(self.num_levels)):
            if level + 1 < self.num_levels or self.max_items > 1:  # else every leaf is its one item
                edges = self.first_child(torch.arange(len(self.codes[level]) + 1, device=mask.device), level)
                before = F.pad(mask.cumsum(1, dtype=torch.int32), (1, 0)).index_select(1, edges)
                mask = before[:, 1:] > before[:, :-1]
            masks.insert(0, mask)
        return masks


__all__ = ["RUN_LENGTH", "PrefixIndex"]
