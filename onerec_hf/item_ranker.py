"""Items from a trained model through `model.generate` and nothing else, with the call that evaluation and the baselines share."""

from typing import Any

import numpy as np
import torch

from .data.collators import OneRecCollator


class ItemRanker:
    r"""
    A generative model with the call that `evaluate` and every baseline share: rows of item indices in, item indices out.

    Args:
        model: A OneRec model with a catalogue.
        collator (`OneRecCollator`): As in training; its `context` makes the model's inputs.
        num_beams (`int`, defaults to 50): Beam width; at least the number of items asked for.
    """

    def __init__(self, model: Any, collator: OneRecCollator, num_beams: int = 50):
        if model.catalogue is None:
            raise ValueError("the model has no catalogue: set `model.catalogue`, or load it from a folder with one.")
        self.model, self.collator, self.num_beams = model, collator, num_beams

    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool = False) -> np.ndarray:
        """
        The `k` best items of each user.

        Args:
            examples: Columns of a split (`user`, `history`, ...), B rows.
            k: Items per user, at most `num_beams`.
            exclude_seen: Keep the items of the history out of the search.

        Returns:
            `np.ndarray` of shape (B, k), int64: item indices, best first, -1 where fewer items exist.
        """
        if k > self.num_beams:
            raise ValueError(f"k={k} items need num_beams of at least {k}, it is {self.num_beams}.")
        rows = [dict(zip(examples, values)) for values in zip(*examples.values())]
        allowed = None
        if exclude_seen:
            allowed = torch.ones(len(rows), self.model.catalogue.num_items, dtype=torch.bool)
            for i, row in enumerate(rows):
                allowed[i, np.asarray(row["history"], dtype=np.int64)] = False
        return self.search(rows, k, allowed)[0].cpu().numpy()

    def search(
        self, rows: list[dict], k: int, allowed: torch.Tensor | None = None, num_beams: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Items (B, k) and the log-probabilities (B, k), in nats, of the semantic IDs they carry; -1 and -inf for none.

        Raises:
            ValueError: For a model in training mode. The search does not change the mode: other threads share the model.
        """
        model, catalogue, width = self.model, self.model.catalogue, num_beams or self.num_beams
        if model.training:
            raise ValueError("the model is in training mode, with dropout: call `model.eval()` before you search.")
        batch = {name: tensor.to(model.device) for name, tensor in self.collator.context(rows).items()}
        found = model.generate(  # of a session, its first item
            **batch,
            num_beams=width,
            num_return_sequences=width,
            num_items=1,
            allowed_items=allowed,
            return_dict_in_generate=True,
        )
        codes = found.sequences[:, 1:] - torch.tensor(model.config.level_offsets, device=model.device)
        leaves = catalogue.leaves_of(codes).view(len(rows), width)
        items = catalogue.items_of(leaves, k, allowed=allowed)  # (B, k)
        scores = found.sequences_scores.view(len(rows), width) * catalogue.num_levels
        own = catalogue.leaves_of(catalogue.semantic_ids[items.clamp(min=0)].flatten(0, 1).long()).view(items.shape)
        place = (own.unsqueeze(2) == leaves.unsqueeze(1)).int().argmax(2)  # the beam that an item came from
        return items, scores.gather(1, place).masked_fill(items < 0, float("-inf"))


__all__ = ["ItemRanker"]
