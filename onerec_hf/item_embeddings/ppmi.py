"""Co-occurrence of items as a sparse matrix that need not fit into memory: counted in sorted runs, multiplied by
blocks of rows.

N items. Counts are whole numbers, so that neither the order nor the number of the parts changes a bit of them.
"""

import math
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

# weights 1 / d as whole multiples of 1 / 720720: exact up to a distance of 16
_UNIT = math.lcm(*range(1, 17))
_SLICE = 500_000  # events whose pairs are made at once
_RUN = 8_000_000  # pairs (64 MB) that are held before they are sorted and written to disk
_BLOCK = 4_000_000  # pairs that are counted, or multiplied, at once
_RANGES = 2**16  # of rows: where runs and blocks can be cut
_WIDTH = 16  # columns of the dense side that are multiplied at once: their rows then stay in the cache


class PairCounts:
    """
    Counts the pairs of different items at most `window` events apart.

    Args:
        num_items: N.
        window: Greatest distance; a pair at distance d weighs 1 / d, in both directions.
        folder: For what does not fit into memory.
    """

    def __init__(self, num_items: int, window: int, folder: Path):
        if num_items**2 * window >= 2**63:
            raise ValueError(f"num_items={num_items} with window={window}: at most 2^63 / window pairs of items.")
        self.num_items, self.window, self.folder = num_items, window, folder
        self.edges = np.linspace(0, num_items, min(num_items, _RANGES) + 1).astype(np.int64)  # of the ranges of rows
        self.num_events = 0
        self._held: list[np.ndarray] = []
        self._runs: list[tuple[Path | np.ndarray, np.ndarray]] = []  # sorted keys, and where each range begins

    def add(self, items: np.ndarray, lengths: np.ndarray) -> None:
        """
        Histories, one after another.

        Args:
            items (`np.ndarray` of shape (M,)): Item indices in time order.
            lengths (`np.ndarray` of shape (histories,)): Events of each history.

        Raises:
            ValueError: An index outside 0..N-1.
        """
        if len(items) and not 0 <= items.min() <= items.max() < self.num_items:
            raise ValueError(f"item indices must lie in 0..{self.num_items - 1}, got {items.min()}..{items.max()}")
        self.num_events += len(items)
        ends = np.cumsum(lengths)
        history = np.repeat(np.arange(len(lengths)), lengths)
        start = 0
        while start < len(items):  # whole histories, of about `_SLICE` events
            stop = int(ends[np.searchsorted(ends, min(start + _SLICE, len(items)))])
            self._add_slice(items[start:stop].astype(np.int64), history[start:stop])
            start = stop

    def _add_slice(self, items: np.ndarray, history: np.ndarray) -> None:
        """A pair's key is (row, column, distance - 1) as one number: what is sorted is what is counted."""
        for distance in range(1, self.window + 1):
            pairs = (history[:-distance] == history[distance:]) & (items[:-distance] != items[distance:])
            first, second = items[:-distance][pairs], items[distance:][pairs]
            for row, column in ((first, second), (second, first)):
                self._held.append((row * self.num_items + column) * self.window + (distance - 1))
        if sum(map(len, self._held)) >= _RUN:
            keys = self._sorted()
            path = self.folder / f"pairs-{len(self._runs):05d}"
            self._runs.append((path, self._starts(keys)))
            keys.tofile(path)

    def _sorted(self) -> np.ndarray:
        keys = np.concatenate(self._held or [np.zeros(0, np.int64)])
        self._held = []
        keys.sort()
        return keys

    def _starts(self, keys: np.ndarray) -> np.ndarray:
        return np.searchsorted(keys, self.edges * (self.num_items * self.window))

    def blocks(self) -> Iterator[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]:
        """First row and row behind the last one, and of all pairs in them, sorted, rows, columns and weights (int64,
        in units of 1 / 720720). Runs are deleted behind the last block.
        """
        keys = self._sorted()
        self._runs.append((keys, self._starts(keys)))
        ends = np.sum([starts for _, starts in self._runs], axis=0)
        weights = np.rint(_UNIT / np.arange(1, self.window + 1)).astype(np.int64)
        begin = 0
        while begin < len(self.edges) - 1:
            # as many ranges as fit, one at least
            end = max(begin + 1, int(np.searchsorted(ends, ends[begin] + _BLOCK, side="right")) - 1)
            parts = [self._read(run, starts[begin], starts[end]) for run, starts in self._runs]
            block = np.concatenate(parts)
            block.sort(kind="stable")  # of sorted parts: it merges them
            weight = weights[block % self.window]
            block //= self.window
            first = np.flatnonzero(np.diff(block, prepend=-1))
            total = np.add.reduceat(weight, first) if len(first) else np.zeros(0, np.int64)
            row, column = np.divmod(block[first], self.num_items)
            yield int(self.edges[begin]), int(self.edges[end]), row, column, total
            begin = end
        for run, _ in self._runs:
            if isinstance(run, Path):
                run.unlink()

    def _read(self, run: Path | np.ndarray, start: int, stop: int) -> np.ndarray:
        if isinstance(run, Path):
            return np.fromfile(run, dtype=np.int64, count=stop - start, offset=8 * int(start))
        return run[start:stop]


class PPMI:
    """
    M_ij = max(0, log(C_ij C / (C_i C_j))), with C_ij the weights of [`PairCounts`], C_i their row sums, C their sum.

    Blocks of rows lie in `folder` unless they are few.

    Raises:
        ValueError: There is no pair.
    """

    def __init__(self, counts: PairCounts, folder: Path):
        self.num_items, self.folder = counts.num_items, folder
        # Whole numbers below 2^53: float64 adds them exactly
        sums, stored = np.zeros(self.num_items), []
        for number, (first, stop, row, column, total) in enumerate(counts.blocks()):
            own = row - first
            sums[first:stop] += np.bincount(own, total, stop - first)
            lengths = np.bincount(own, minlength=stop - first)
            stored.append((first, stop, self._store(number, lengths, column.astype(np.int32), total)))
        if not sums.any():
            raise ValueError(
                f"no two items occur within {counts.window} events of each other in the {counts.num_events} events "
                "given"
            )
        self.seen = np.zeros(self.num_items, dtype=bool)
        self._blocks = []
        for number, (first, stop, block) in enumerate(stored):
            lengths, column, total = self._load(block)
            own = np.repeat(np.arange(stop - first), lengths)
            value = np.log(total * (sums.sum() / (sums[first + own] * sums[column]))).astype(np.float32)
            keep = value > 0
            lengths = np.bincount(own[keep], minlength=stop - first)
            self.seen[first:stop] = lengths > 0
            block = self._store(number, lengths, column[keep], value[keep])
            self._blocks.append((first, stop, block))

    def _store(self, number: int, *arrays: np.ndarray) -> list[Path] | list[np.ndarray]:
        """Blocks that others will follow go to disk: a single one is small."""
        if number == 0 and len(arrays[1]) < _BLOCK // 4:
            return list(arrays)
        paths = [self.folder / f"block-{number:05d}-{i}.npy" for i in range(len(arrays))]
        for path, array in zip(paths, arrays):
            np.save(path, array)
        return paths

    def _load(self, block: list[Path] | list[np.ndarray]) -> list[np.ndarray]:
        return [np.load(part) if isinstance(part, Path) else part for part in block]

    @torch.sparse.check_sparse_tensor_invariants(False)  # made here
    def multiply(self, dense: torch.Tensor) -> torch.Tensor:
        """M @ dense, both (N, D) float32."""
        product = torch.empty_like(dense)
        columns = [dense[:, i : i + _WIDTH].contiguous() for i in range(0, dense.shape[1], _WIDTH)]
        for first, stop, block in self._blocks:
            lengths, column, value = self._load(block)
            rows = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch: "in beta state"
                matrix = torch.sparse_csr_tensor(
                    rows, torch.from_numpy(column), torch.from_numpy(value), (stop - first, self.num_items)
                )
            for i, part in enumerate(columns):
                product[first:stop, i * _WIDTH : (i + 1) * _WIDTH] = matrix @ part
        return product
