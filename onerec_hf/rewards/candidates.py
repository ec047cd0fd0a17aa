"""A reward model as a reward function: generated completions become the candidates it judges.

OneRec, reward model (arXiv:2502.18965, eq. 5 to 7); OneRec Technical Report, P-Score (arXiv:2506.13695). Legend: B samples, G
completions of a sample, m items of a completion.
"""

from typing import Any

import torch

from ..models.catalogue import Catalogue
from .functions import ModelReward, completion_leaves


class CandidateCollator:
    r"""
    Makes a reward model's inputs from samples with `completion_ids`: the `collate` of [`ModelReward`].

    A semantic ID that several items share counts as its most popular one. Completions that are no items get item 0 and a score that
    means nothing.

    Args:
        collator: The reward model's own: `context(rows)`, the context tensors, and `candidates(rows)`, the tensors of the items in
            each row's `targets` (`RewardCollator`).
        catalogue (`Catalogue`): The policy's, to read items from completions.
        device (`torch.device`, *optional*): Where the tensors shall be.
    """

    def __init__(self, collator: Any, catalogue: Catalogue, device: torch.device | None = None):
        self.collator, self.catalogue, self.device = collator, catalogue, device

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        completions = [ids for row in rows for ids in row["completion_ids"]]
        leaves, owner = completion_leaves(completions, self.catalogue)
        items = self.catalogue.items_of(leaves.to(self.catalogue.device).unsqueeze(1), 1)[:, 0].clamp(min=0).cpu()
        order = owner.argsort(stable=True)
        items = items[order].split(owner.bincount(minlength=len(completions)).tolist())
        requests = [_request(row) for row in rows]
        samples = [request for request in requests for _ in request["completion_ids"]]
        judged = [self._candidate(request, candidate.tolist()) for request, candidate in zip(samples, items)]
        batch = self.collator.context(requests) | self.collator.candidates(judged)
        return {name: value.to(self.device) for name, value in batch.items()}

    def _candidate(self, row: dict, items: list[int]) -> dict:
        """The row with other items in its request, whose own columns (scenario, hour) are the same for all of them."""
        request = {name: [*values[:1]] * len(items) for name, values in row.items() if name.startswith("target_")}
        return row | request | {"targets": items}


def _request(row: dict) -> dict:
    """
    A training row without targets as the request it was generated for: the last item of the history comes next, so its time and
    scenario are the request's, and the history ends before it.
    """
    if "targets" in row:
        return row
    length = len(row["history"])
    events = {
        name: v for name, v in row.items() if hasattr(v, "__len__") and not isinstance(v, str) and len(v) == length
    }
    events.pop("completion_ids", None)
    row = row | {name: values[:-1] for name, values in events.items()}
    row |= {f"target_{name}": values[-1:] for name, values in events.items() if name != "history"}
    return row | ({"session_start": events["timestamp"][-1]} if "timestamp" in events else {})


def _score(reward_model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    rewards = reward_model(**batch).rewards
    if rewards.dim() == 1:
        return rewards
    mask = batch.get("item_mask", torch.ones_like(rewards, dtype=torch.bool))
    return (rewards * mask).sum(1) / mask.sum(1)


def reward_of_model(
    reward_model: Any,
    collator: Any,
    policy: Any,
    num_generations: int,
    catalogue: Catalogue | None = None,
    batch_size: int = 64,
) -> ModelReward:
    """
    A reward model as a reward function for the policy's completions.

    Args:
        reward_model: Any module that takes the tensors of `collator` and returns an object with `rewards`, one for each completion,
            or one for each item of it (P-Score), whose mean then counts.
        collator: See [`CandidateCollator`].
        policy: The OneRec model that generates.
        num_generations (`int`): Completions per sample, adjacent: `num_candidates` of [`IPAConfig`].
        catalogue (`Catalogue`, *optional*): The one that the reward model was trained with, to be compared with the policy's beside
            the fingerprint in the reward model's config.
        batch_size (`int`, defaults to 64): Samples per call of the reward model.

    Raises:
        ValueError: When the reward model knows other semantic IDs than the policy.
    """
    if list(reward_model.config.codebook_sizes) != list(policy.config.codebook_sizes):
        raise ValueError(
            f"the reward model has codebook_sizes={reward_model.config.codebook_sizes}, the policy {policy.config.codebook_sizes}: "
            "it was trained with other semantic IDs. Train it with the policy's tokenizer."
        )
    own = policy.catalogue
    known = {reward_model.config.catalogue_fingerprint, catalogue.fingerprint() if catalogue is not None else None}
    if known - {None, own.fingerprint()}:
        raise ValueError(
            f"the reward model was trained with {catalogue or 'another catalogue'}, the policy has {own}: the same codes mean "
            "other items. Train it with the policy's tokenizer."
        )
    reward_model.eval()
    collate = CandidateCollator(collator, own, reward_model.device)
    return ModelReward(lambda **batch: _score(reward_model, batch), collate, num_generations, batch_size=batch_size)


__all__ = ["CandidateCollator", "reward_of_model"]
