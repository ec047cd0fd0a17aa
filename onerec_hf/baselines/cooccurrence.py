"""Co-occurrence: items that stand near the recent items of a history in the histories of others.

A strong heuristic without training, in the family of item-to-item Markov chains (no paper; the weights are not tuned).
Shapes: **B** users, **N** items, **E** non-zero entries of the item-item matrix.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from .ranking import rank_items

COUNTS = ("values", "columns", "row_starts", "fallback")


class CoOccurrence:
    """Scores item j by the sum over the last items i of the history of `decay**age(i) * M[i, j]`, age 0 = most recent.

    For each pair of a training history with a at 1 <= d <= `window` positions before b, M[a, b] grows by 1 / d and
    M[b, a] by `backward_weight / d`; then M[a, b] is divided by pop(a)^(1/2) * pop(b)^(1/4), pop = training
    occurrences, at least 1. Items that get no score follow after all others, by popularity.

    Args:
        num_items (`int`): N, the size of the catalogue.
        window (`int`, defaults to 10): largest distance of a pair.
        backward_weight (`float`, defaults to 0.5): weight of recommending what came before.
        decay (`float`, defaults to 0.7): weight of a history item relative to the next more recent one.
        max_history (`int`, defaults to 20): number of most recent history items that are used.
    """

    def __init__(
        self,
        num_items: int,
        *,
        window: int = 10,
        backward_weight: float = 0.5,
        decay: float = 0.7,
        max_history: int = 20,
    ):
        self.num_items = num_items
        self.window = window
        self.backward_weight = backward_weight
        self.decay = decay
        self.max_history = max_history
        # made by `fit`
        self.values: torch.Tensor  # (E,) M, row by row
        self.columns: torch.Tensor  # (E,) item b of an entry M[a, b]
        self.row_starts: torch.Tensor  # (N + 1,) first entry of item a
        self.fallback: torch.Tensor  # (N,) in [-1, 0): popularity, below every score

    def fit(self, histories: Iterable[Sequence[int]]) -> "CoOccurrence":
        """Counts pairs; `histories`: item indices in time order, one list per user (`dataset["train"]["history"]`)."""
        rows = [torch.tensor(history, dtype=torch.long) for history in histories]
        user = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([len(row) for row in rows]))
        items = torch.cat(rows)
        popularity = torch.bincount(items, minlength=self.num_items).float()
        if len(popularity) > self.num_items:
            raise ValueError(f"histories hold item index {len(popularity) - 1}, but num_items is {self.num_items}.")

        keys, values = torch.empty(0, dtype=torch.long), torch.empty(0)  # of pair (a, b): a * N + b
        for distance in range(1, min(self.window, len(items) - 1) + 1):
            same_user = user[:-distance] == user[distance:]
            before, after = items[:-distance][same_user], items[distance:][same_user]
            keys = torch.cat([keys, before * self.num_items + after, after * self.num_items + before])
            weights = torch.full((len(before),), 1.0 / distance)
            values = torch.cat([values, weights, weights * self.backward_weight])
            keys, inverse = keys.unique(return_inverse=True)  # after every distance: bounds the memory
            values = torch.zeros(len(keys)).index_add_(0, inverse, values)

        popularity = popularity.clamp(min=1)
        before, self.columns = keys // self.num_items, keys % self.num_items
        self.values = values / (popularity[before].sqrt() * popularity[self.columns] ** 0.25)
        self.row_starts = torch.searchsorted(before, torch.arange(self.num_items + 1))
        self.fallback = popularity / (popularity.max() + 1) - 1
        return self

    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k best items for each row of `examples["history"]`, `(B, k)`; see `rank_items` for ties and -1."""
        histories = examples["history"]
        scores = self._scores(histories)
        scores = torch.where(scores > 0, scores, self.fallback)
        return rank_items(scores, k, exclude=histories if exclude_seen else None, generator=generator)

    def score_items(self, examples: dict[str, list]) -> torch.Tensor:
        """Log of each item's share of a history's counts, (B, N); `-inf` where there are none."""
        scores = self._scores(examples["history"])
        shares = torch.full_like(scores, -torch.inf)
        some = scores.nonzero(as_tuple=True)  # few: the logarithm of 0 is slow
        shares[some] = (scores[some] / scores.sum(1)[some[0]]).log()
        return shares

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`: the counts."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = ("num_items", "window", "backward_weight", "decay", "max_history")
        config = {name: getattr(self, name) for name in names}
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file({name: getattr(self, name).contiguous() for name in COUNTS}, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "CoOccurrence":
        """Reads what `save_pretrained` wrote."""
        self = cls(**json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
        for name, tensor in load_file(Path(folder) / "model.safetensors").items():
            setattr(self, name, tensor)
        return self

    def _scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        if not hasattr(self, "values"):
            raise ValueError("CoOccurrence has no counts yet: call fit(histories) first.")
        recent = [history[-self.max_history :] for history in histories]
        row = torch.repeat_interleave(torch.arange(len(recent)), torch.tensor([len(items) for items in recent]))
        item = torch.tensor([i for items in recent for i in items], dtype=torch.long)
        age = torch.tensor([float(a) for items in recent for a in reversed(range(len(items)))])

        # The entries of all history items' rows of M, end to end.
        length = self.row_starts[item + 1] - self.row_starts[item]
        source = torch.repeat_interleave(torch.arange(len(item)), length)  # which history item an entry belongs to
        entry = torch.arange(len(source)) + (self.row_starts[item] - length.cumsum(0) + length)[source]
        scores = torch.zeros(len(recent) * self.num_items)
        scores.index_add_(
            0, row[source] * self.num_items + self.columns[entry], self.decay ** age[source] * self.values[entry]
        )
        return scores.view(len(recent), self.num_items)
