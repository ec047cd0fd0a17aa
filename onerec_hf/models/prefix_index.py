"""A flat, sorted prefix index over semantic IDs: which codes may follow which prefix.

The layout follows STATIC (arXiv:2602.22647) without its dense tables: the nodes of a level are sorted by prefix, so that a node's
id is its position, its children are one run of the next level, and the nodes of the last level, the leaves, are the semantic IDs
in order. Legend: B users, K beams, N items, L levels, W largest fan-out of a level, M listed children.
"""

import torch

RUN_LENGTH = 32  # children per run of `PrefixIndex.expand`


class PrefixIndex:
    """
    What the search asks about a set of semantic IDs; [`Catalogue`] adds the items.

    Attributes:
        codes (`list[torch.Tensor]`): Per level, the last code of each node.
        first_child (`list[torch.IntTensor]`): Per level, where the children of each node begin, and one end more; below a leaf
            lie the places of its items in `item_order`.
        max_children (`list[int]`): Largest fan-out that leads to each level; the first one is the root's.
    """

    def _build_index(self, key: torch.LongTensor, codebook_sizes: list[int], code_dtype: torch.dtype):
        """`key` (N,): the semantic IDs as numbers of base `codebook_sizes`, sorted."""
        self.codes, self.first_child, self.max_children = [], [], []
        for size in reversed(codebook_sizes):
            starts = torch.cat([torch.ones(1, dtype=torch.bool), key[1:] != key[:-1]]).nonzero()[:, 0]
            first = torch.cat([starts, torch.tensor([len(key)])])
            key = key[starts]
            self.first_child.insert(0, first.int())
            self.codes.insert(0, (key % size).to(code_dtype))
            self.max_children.insert(0, int((first[1:] - first[:-1]).max()))
            key = key // size
        self._run_totals = {}  # level -> running sum of the runs of its largest nodes
        *self.max_children, self.max_items = [len(self.codes[0]), *self.max_children]

    @property
    def num_semantic_ids(self) -> int:
        """Leaves of the index: different semantic IDs; fewer than items where semantic IDs collide."""
        return len(self.codes[-1])

    def children(self, node: torch.LongTensor | None, level: int):
        """
        Children on `level` (0-based) of nodes of the level above; `node=None` is the root.

        Returns:
            codes (..., W), node ids (..., W) and a bool mask (..., W) of real children; W is the largest fan-out of the level.
        """
        if node is None:
            child = torch.arange(len(self.codes[0]), device=self.codes[0].device)
            return self.codes[0].long(), child, torch.ones_like(child, dtype=torch.bool)
        first = self.first_child[level - 1].long()
        child = first[node].unsqueeze(-1) + torch.arange(self.max_children[level], device=self.codes[0].device)
        real = child < first[node + 1].unsqueeze(-1)
        child = torch.where(real, child, 0)
        return self.codes[level][child].long(), child, real

    def leaf_range(self, node: torch.LongTensor, level: int):
        """First leaf below nodes of `level` (0-based) and the one behind the last, in the shape of `node`."""
        first, end = node, node + 1
        for pointers in self.first_child[level:-1]:
            first, end = pointers[first].long(), pointers[end].long()
        return first, end

    def expand(self, node: torch.LongTensor | None, level: int, beams: int = 1, distinct: bool = True):
        """
        All children of K nodes per request, as one flat list with a static length.

        Two layouts, the shorter one is taken: every node padded to the largest fan-out of the level, or runs of 32 children. Where
        the nodes of a request are different, the runs of the K largest nodes of the level bound the number of runs exactly, so
        nothing is lost and no length has to be read back from the device.

        Args:
            node (`torch.LongTensor` of shape (B, K)): Nodes of the level above, -1 for none; None is the root.
            beams (`int`, defaults to 1): K at the root, whose children are then listed once per beam.
            distinct (`bool`, defaults to `True`): Whether no node occurs twice in a row of `node`.

        Returns:
            parent (B, M) (position 0..K-1 in its row), code (B, M), child (B, M), each int64, and a bool mask (B, M) of real ones.
            At the root B is 1.
        """
        if node is None:
            codes, child, real = (x.repeat(beams)[None] for x in self.children(None, 0))
            parent = torch.arange(beams, device=self.codes[0].device).repeat_interleave(len(self.codes[0]))
            return parent[None], codes, child, real
        batch, beams = node.shape
        runs = self._run_bound(level, beams)
        first = self.first_child[level - 1].long()
        start = first[node.clamp(min=0)]
        count = torch.where(node >= 0, first[node.clamp(min=0) + 1] - start, 0)  # (B, K) children
        if not distinct or beams * self.max_children[level] <= runs * RUN_LENGTH:
            offset = torch.arange(self.max_children[level], device=node.device)
            parent = torch.arange(beams, device=node.device).repeat_interleave(len(offset)).expand(batch, -1)
            child = (start.unsqueeze(2) + offset).flatten(1)
            real = (offset < count.unsqueeze(2)).flatten(1)
        else:
            ends = ((count + RUN_LENGTH - 1) // RUN_LENGTH).cumsum(1)  # (B, K) runs up to and with this beam
            run = torch.arange(runs, device=node.device).expand(batch, -1).contiguous()
            parent = torch.searchsorted(ends, run, right=True).clamp(max=beams - 1)  # (B, runs)
            before = torch.nn.functional.pad(ends, (1, -1)).gather(1, parent)
            offset = ((run - before) * RUN_LENGTH).unsqueeze(2) + torch.arange(RUN_LENGTH, device=node.device)
            child = (start.gather(1, parent).unsqueeze(2) + offset).flatten(1)
            real = ((offset < count.gather(1, parent).unsqueeze(2)) & (run < ends[:, -1:]).unsqueeze(2)).flatten(1)
            parent = parent.repeat_interleave(RUN_LENGTH, dim=1)
        child = torch.where(real, child, 0)
        return parent, self.codes[level][child].long(), child, real

    def _run_bound(self, level: int, beams: int) -> int:
        """The most runs of 32 children that `beams` different nodes of the level above can have."""
        if level not in self._run_totals:
            first = self.first_child[level - 1]
            runs = (first[1:] - first[:-1] + RUN_LENGTH - 1) // RUN_LENGTH
            largest = runs.sort(descending=True).values[: 2**13]
            self._run_totals[level] = largest.long().cumsum(0).tolist()
        totals = self._run_totals[level]
        if beams <= len(totals):
            return totals[beams - 1]
        return totals[-1] if len(totals) < 2**13 else totals[-1] + (beams - len(totals)) * (totals[-1] - totals[-2])

    def step(self, node: torch.LongTensor | None, level: int, code: torch.LongTensor) -> torch.LongTensor:
        """The child of `node` that carries `code` on `level`, or -1; a dead parent (-1) stays dead. Shapes are equal."""
        if node is None:
            low, end = torch.zeros_like(code), torch.full_like(code, len(self.codes[0]))
        else:
            first = self.first_child[level - 1].long()
            low, end = first[node.clamp(min=0)], first[node.clamp(min=0) + 1]
        codes, high = self.codes[level], end
        for _ in range(self.max_children[level].bit_length()):  # binary search in the sorted run of children
            middle = (low + high) // 2
            right = (middle < high) & (codes[middle.clamp(max=len(codes) - 1)] < code)
            low, high = torch.where(right, middle + 1, low), torch.where(right, high, middle)
        found = (low < end) & (codes[low.clamp(max=len(codes) - 1)] == code)
        if node is not None:
            found = found & (node >= 0)
        return torch.where(found, low, -1)

    def alive(self, allowed: torch.BoolTensor) -> list[torch.BoolTensor]:
        """
        Per level, the nodes that still lead to an allowed item: a subset of the catalogue, without rebuilding it.

        Args:
            allowed (`torch.BoolTensor` of shape (B, N)): Items that may be generated, one row per request.

        Returns:
            `list[torch.BoolTensor]`: One (B, nodes of the level) mask per level.
        """
        if allowed.dtype != torch.bool or allowed.dim() != 2 or allowed.shape[1] != self.num_items:
            raise ValueError(
                f"allowed is {allowed.dtype} of shape {tuple(allowed.shape)}: expected a bool mask (batch, {self.num_items}), "
                "one row per request and one column per item of the catalogue."
            )
        mask, masks = allowed[:, self.item_order.long()], []
        for first in reversed(self.first_child):
            total = torch.nn.functional.pad(mask.int().cumsum(1), (1, 0))
            mask = total[:, first[1:].long()] > total[:, first[:-1].long()]
            masks.insert(0, mask)
        return masks


__all__ = ["RUN_LENGTH", "PrefixIndex"]
