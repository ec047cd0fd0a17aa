"""Nearest neighbours of the last items by their embeddings: a heuristic without trained weights, after what
arXiv:2605.07125 finds so hard to beat (the last one or two items, and what is similar to them).

Shapes: **B** users, **N** items, **D** width.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from .cooccurrence import COUNTS, CoOccurrence
from .ranking import rank_items

_SHARPNESS = 10.0  # of a similarity as a probability: cosines of neighbours differ by some hundredths


class EmbeddingKNN:
    """Scores item j by the sum over the last items i of `decay**age(i) * cos(e_i, e_j)`, age 0 = most recent.

    With `counter_weight`, that many times the score of [`CoOccurrence`] is added, divided by the user's largest.

    Args:
        embeddings (`np.ndarray` of shape `(N, D)`): one vector per item, e.g. `DataFolder(...).item_embeddings`.
        num_recent (`int`, defaults to 2): number of most recent history items that are used.
        decay (`float`, defaults to 0.5): weight of a history item relative to the next more recent one.
        counter_weight (`float`, defaults to 0.0): of the co-occurrence counter.
    """

    def __init__(
        self, embeddings: np.ndarray, *, num_recent: int = 2, decay: float = 0.5, counter_weight: float = 0.0
    ):
        if embeddings.ndim != 2 or num_recent < 1:
            raise ValueError(
                f"EmbeddingKNN needs embeddings of shape (N, D) and num_recent >= 1, got {embeddings.shape} and "
                f"num_recent={num_recent}."
            )
        self.embeddings = normalize(torch.as_tensor(embeddings, dtype=torch.float32), dim=1)
        self.num_recent, self.decay, self.counter_weight = num_recent, decay, counter_weight
        self.counter = CoOccurrence(len(embeddings))

    def fit(self, histories: Iterable[Sequence[int]]) -> "EmbeddingKNN":
        """Counts for the co-occurrence counter, where it has a weight; nothing else is learned."""
        if self.counter_weight:
            self.counter.fit(histories)
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
        return rank_items(scores, k, exclude=histories if exclude_seen else None, generator=generator)

    def score_items(self, examples: dict[str, list]) -> torch.Tensor:
        """Softmax of ten times the similarities, as log-probabilities (B, N), without the counter; `-inf` for a
        history without items.
        """
        scores = self._similarities(examples["history"], _SHARPNESS).log_softmax(1)
        empty = torch.tensor([not len(history) for history in examples["history"]], dtype=torch.bool)
        return scores.masked_fill_(empty[:, None], -torch.inf) if empty.any() else scores

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`: the vectors, and the counts where they have a weight."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {name: getattr(self, name) for name in ("num_recent", "decay", "counter_weight")}
        (Path(folder) / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        counts = {name: getattr(self.counter, name).contiguous() for name in COUNTS if self.counter_weight}
        save_file({"embeddings": self.embeddings} | counts, Path(folder) / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "EmbeddingKNN":
        """Reads what `save_pretrained` wrote."""
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(Path(folder) / "model.safetensors")
        self = cls(tensors.pop("embeddings").numpy(), **config)
        for name, tensor in tensors.items():
            setattr(self.counter, name, tensor)
        return self

    def _scores(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        scores = self._similarities(histories)
        if self.counter_weight:
            counts = self.counter._scores(histories)
            largest = counts.amax(1, keepdim=True).clamp(min=torch.finfo(counts.dtype).tiny)
            scores += self.counter_weight * counts / largest
        return scores

    def _similarities(self, histories: Sequence[Sequence[int]], factor: float = 1.0) -> torch.Tensor:
        users = torch.zeros(len(histories), self.embeddings.shape[1])  # (B, D)
        for user, history in enumerate(histories):
            for age, item in enumerate(reversed(history[-self.num_recent :])):
                users[user] += factor * self.decay**age * self.embeddings[item]
        return users @ self.embeddings.T
