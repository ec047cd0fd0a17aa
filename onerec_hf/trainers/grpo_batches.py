"""What reinforcement learning draws beside rollouts: batches by number, so that a resumed run needs no state.

OneRec-V2 (arXiv:2508.20900) trains on logged exposures of which only some have a logged generation probability; the OneRec
Technical Report (arXiv:2506.13695) runs RL beside a supervised loss. Legend: B contexts, n exposures of a context, L levels.
"""

import datasets
import numpy as np
import torch


class EndlessBatches:
    """
    Batch k of an endless pass over a data set, reshuffled each time round: a function of k, so a resumed run needs no state.

    Args:
        rows (`datasets.Dataset`): At least one row.
        batch_size (`int`): Rows per call and process.
        seed, process, num_processes (`int`): Each process gets its own share of every round.
    """

    def __init__(
        self, rows: datasets.Dataset, batch_size: int, seed: int = 0, process: int = 0, num_processes: int = 1
    ):
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.process, self.num_processes = process, num_processes
        self._round, self._order = -1, np.arange(len(rows))

    def __call__(self, k: int) -> list[dict]:
        first = (k * self.num_processes + self.process) * self.batch_size
        places = []
        for place in range(first, first + self.batch_size):
            number, index = divmod(place, len(self.rows))
            if number != self._round:
                self._round = number
                self._order = np.random.default_rng([self.seed, number]).permutation(len(self.rows))
            places.append(int(self._order[index]))
        batch = self.rows[places]
        return [dict(zip(batch, values)) for values in zip(*batch.values())]


def pad_logged(rows: list[dict], shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Advantages (B, n), 0 where a row has fewer exposures, and logged log-probabilities (B, n, L), NaN where none are known.

    Raises:
        ValueError: Where a row has not one advantage, or not L log-probabilities, per target.
    """
    advantages, logged = torch.zeros(shape[:2]), torch.full(shape, torch.nan)
    for i, row in enumerate(rows):
        count = len(row["targets"])
        if len(row["advantage"]) != count:
            raise ValueError(f"a logged row has {count} targets and {len(row['advantage'])} advantages: one each.")
        advantages[i, :count] = torch.as_tensor(np.asarray(row["advantage"], dtype=np.float32))
        if row.get("log_probs") is not None:
            values = np.asarray([list(item) for item in row["log_probs"]], dtype=np.float32)
            if values.shape != (count, shape[2]):
                raise ValueError(f"log_probs of a logged row is {values.shape}, expected {(count, shape[2])}.")
            logged[i, :count] = torch.as_tensor(values)
    return advantages, logged


__all__ = ["EndlessBatches", "pad_logged"]
