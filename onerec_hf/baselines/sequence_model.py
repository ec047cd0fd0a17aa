"""What SASRec, BERT4Rec and FDSA share: a history is read, its last position scores every item by a dot product.

Shapes: **B** users, **T** positions of a history, **M** positions with a target, **N** items, **D** width.
"""

from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedModel

from .ranking import rank_items
from .softmax_loss import FullSoftmaxLoss
from .training import pad_right, recent_items


class SequenceModel:
    """`self.model` is a transformers model; a subclass says how it reads histories and what scores an item."""

    model: Any
    training_log: list[dict[str, float]]

    @property
    def num_items(self) -> int:
        """N, the size of the catalogue."""
        return self.model.config.vocab_size

    @property
    def max_length(self) -> int:
        """Number of most recent history items that the model sees."""
        return self.model.config.max_position_embeddings

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        self.model.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save_pretrained` wrote."""
        self = cls.__new__(cls)
        self.model = cls._load(folder).eval()
        self.training_log = []
        return self

    @classmethod
    def _load(cls, folder: str | Path) -> PreTrainedModel:
        """The model in a folder that `save_pretrained` wrote."""
        raise NotImplementedError

    @torch.no_grad()
    def recommend(
        self,
        examples: dict[str, list],
        k: int,
        exclude_seen: bool = False,
        generator: torch.Generator | None = None,
    ) -> np.ndarray:
        """The k best of all items for each row of `examples["history"]`, `(B, k)`; ties and -1: see `rank_items`."""
        exclude = examples["history"] if exclude_seen else None
        return rank_items(self._scores(examples), k, exclude=exclude, generator=generator)

    @torch.no_grad()
    def score_items(self, examples: dict[str, list]) -> torch.Tensor:
        """Log-probability of every item as the next one, (B, N); `-inf` for a history without items."""
        rows = [i for i, history in enumerate(examples["history"]) if len(history)]
        found = torch.full((len(examples["history"]), self.num_items), -torch.inf)
        if rows:
            known = {name: [values[i] for i in rows] for name, values in examples.items()}
            found[rows] = self._scores(known).log_softmax(1).cpu()
        return found

    def _scores(self, examples: dict[str, list]) -> torch.Tensor:
        """A score of every item for every history, (B, N)."""
        queries, padding = self._queries(examples)
        lengths = torch.tensor([len(query) for query in queries])
        last = torch.empty(len(queries), self.model.config.hidden_size, device=self.model.device)  # (B, D)
        for rows in lengths.argsort().split(64):  # similar lengths together: little padding
            hidden = self._hidden(pad_right([queries[row] for row in rows.tolist()], padding).to(last.device))
            last[rows] = hidden[torch.arange(len(rows)), lengths[rows] - 1]
        users, items = self._score_vectors(last)
        return users @ items.T

    def _queries(self, examples: dict[str, list]) -> tuple[list[list[int]], int]:
        """Input ids of each row, the last position being the one that answers; and what pads them on the right."""
        return recent_items(examples, self.max_length, type(self).__name__), 0

    def _hidden(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, T, D)."""
        raise NotImplementedError

    def _score_vectors(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of M hidden states (M, D) and of the items (N, D), such that their dot products are the scores."""
        raise NotImplementedError

    def _softmax_loss(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
        """Cross-entropy over all items, summed over the M positions with a label, and M."""
        position = batch["labels"] != -100
        hidden, items = self._score_vectors(self._hidden(batch["input_ids"])[position])
        return FullSoftmaxLoss.apply(hidden, items, batch["labels"][position]), len(hidden)
