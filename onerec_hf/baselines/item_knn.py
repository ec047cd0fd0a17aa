"""Item-kNN (Deshpande and Karypis, ACM TOIS 22, 2004): items whose users are the users of the history's items.

Sparse matrices of SciPy; a library of its own would do the same product. Shapes: **B** users, **U** training users,
**N** items.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array

from .ranking import rank_items


class ItemKNN:
    """Scores item j by the sum over the history's items i of `decay**age(i) * similarity[i, j]`, age 0 = most recent.

    `similarity[i, j] = |U_i and U_j| / (sqrt(|U_i| |U_j|) + shrink)` for the `num_neighbors` items j most similar to
    i, else 0; U_i are the training users with item i. Items that get no score follow after all others, by popularity.

    Args:
        num_items (`int`): N, the size of the catalogue.
        num_neighbors (`int`, defaults to 100): items kept per item.
        shrink (`float`, defaults to 10.0): lowers similarities that few users support.
        decay (`float`, defaults to 1.0): weight of a history item relative to the next more recent one; 1 forgets the
            order, as in the paper.
    """

    def __init__(self, num_items: int, *, num_neighbors: int = 100, shrink: float = 10.0, decay: float = 1.0):
        self.num_items, self.num_neighbors, self.shrink, self.decay = num_items, num_neighbors, shrink, decay
        self.similarity: csr_array | None = None  # (N, N), row i: the neighbours of item i
        self.fallback: np.ndarray  # made by `fit`: (N,) in [-1, 0): popularity, below every score

    def fit(self, histories: Iterable[Sequence[int]]) -> "ItemKNN":
        """Counts; `histories`: item indices, one list per user (`dataset["train"]["history"]`)."""
        rows = [np.unique(np.asarray(history, dtype=np.int64)) for history in histories]
        items = np.concatenate(rows or [np.zeros(0, np.int64)])
        if len(items) == 0 or items.max() >= self.num_items:
            raise ValueError(
                f"histories must hold item indices in 0..{self.num_items - 1}, got "
                f"{'none' if len(items) == 0 else f'index {items.max()}'}."
            )
        starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        seen = csr_array((np.ones(len(items)), items, starts), shape=(len(rows), self.num_items))  # (U, N)
        both = (seen.T @ seen).tocsr()  # (N, N) users with both items
        counts = both.diagonal()
        row = np.repeat(np.arange(self.num_items), np.diff(both.indptr))
        both.data = both.data / (np.sqrt(counts[row] * counts[both.indices]) + self.shrink)
        both.data[row == both.indices] = 0.0  # an item is no neighbour of itself
        self.similarity = self._nearest(both, row)
        self.fallback = counts / (counts.max() + 1) - 1
        return self

    def _nearest(self, similarity: csr_array, row: np.ndarray) -> csr_array:
        order = np.lexsort((-similarity.data, row))
        rank = np.arange(len(row)) - similarity.indptr[row]
        kept = order[(rank < self.num_neighbors) & (similarity.data[order] > 0)]
        values = (similarity.data[kept], (row[kept], similarity.indices[kept]))
        return csr_array(values, shape=similarity.shape)

    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k best items for each row of `examples["history"]`, `(B, k)`; see `rank_items` for ties and -1."""
        histories = examples["history"]
        found = self._scores(histories)
        scores = torch.from_numpy(np.where(found > 0, found, self.fallback))
        return rank_items(scores, k, exclude=histories if exclude_seen else None, generator=generator)

    def _scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        if self.similarity is None:
            raise ValueError("ItemKNN has no counts yet: call fit(histories) first.")
        lengths = [len(history) for history in histories]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        items = np.array([item for history in histories for item in history], dtype=np.int64)
        age = np.repeat(starts[1:], lengths) - 1 - np.arange(len(items))
        weights = csr_array((self.decay**age, items, starts), shape=(len(histories), self.num_items))
        return (weights @ self.similarity).toarray()
