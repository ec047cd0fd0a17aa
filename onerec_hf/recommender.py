"""Ranked items from a trained model: histories in, item indices out, through `model.generate` and nothing else."""

import numpy as np
import torch

from .data.collators import OneRecCollator


class Recommender:
    r"""
    A generative model as a recommender, with the same call as every baseline.

    Args:
        model: A OneRec model with a catalogue.
        collator (`OneRecCollator`): As in training; its `context` makes the model's inputs.
        num_beams (`int`, defaults to 50): Beam width; at least the number of items asked for.
    """

    def __init__(self, model, collator: OneRecCollator, num_beams: int = 50):
        if model.catalogue is None:
            raise ValueError(
                "the model has no catalogue: set `model.catalogue` or load the model from a folder that holds one."
            )
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
        catalogue = self.model.catalogue
        rows = [dict(zip(examples, values)) for values in zip(*examples.values())]
        batch = {name: tensor.to(self.model.device) for name, tensor in self.collator.context(rows).items()}
        if exclude_seen:
            allowed = torch.ones(len(rows), catalogue.num_items, dtype=torch.bool)
            for i, row in enumerate(rows):
                allowed[i, np.asarray(row["history"], dtype=np.int64)] = False
            batch["allowed_items"] = allowed
        was_training = self.model.training
        self.model.eval()
        width = {"num_beams": self.num_beams, "num_return_sequences": self.num_beams}
        tokens = self.model.generate(**batch, **width, num_items=1)  # of a session, its first item
        self.model.train(was_training)
        codes = tokens[:, 1:] - torch.tensor(self.model.config.level_offsets, device=tokens.device)
        leaves = catalogue.leaves_of(codes).view(len(rows), self.num_beams)
        return catalogue.items_of(leaves, k, allowed=batch.get("allowed_items")).cpu().numpy()
