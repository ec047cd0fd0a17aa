"""A reward model as a reward function: generated completions become the candidates it judges.

OneRec, reward model (arXiv:2502.18965, eq. 5 to 7); OneRec Technical Report, P-Score (arXiv:2506.13695). Legend: B
samples, G completions of a sample, m items of a completion.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..models.catalogue import Catalogue
from .functions import completion_leaves, is_legal
from .spelled import ITEM_IDS


class ModelReward:
    r"""
    The score of any reward model or function.

    Args:
        score (`Callable`): Called as `score(**collate(rows))` without gradients; returns (B, G) or (B * G,) scores, or
            an object with such `rewards` (as our reward models do).
        collate (`Callable[[list[dict]], dict]`): Tensors from B rows, one per **sample**: its own columns, and
            `completion_ids`, the list of its G completions. So the context is encoded once for all completions of a
            sample.
        batch_size (`int`, defaults to 64): Samples per call of `score`.
        catalogue (`Catalogue`, *optional*): The policy's. Then a completion that spells no item, or a session with one
            that does not exist, has no reward (`None`), whatever `score` says of it.

    Completions of one sample are adjacent; where one sample ends and the next begins is seen from their columns.

    Raises:
        ValueError: When a score is NaN or infinite; the message names the first row.
    """

    def __init__(
        self,
        score: Callable,
        collate: Callable,
        batch_size: int = 64,
        catalogue: Catalogue | None = None,
    ):
        self.score, self.collate = score, collate
        self.batch_size, self.catalogue = batch_size, catalogue
        self.__name__ = "reward_model"

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence | None = None,
        completions: Sequence | None = None,
        completion_ids: Sequence[Sequence[int]] = (),
        **columns,
    ) -> Sequence[float | None]:
        total = len(completion_ids)
        if not total:
            return []
        own = {
            name: values for name, values in columns.items() if isinstance(values, Sequence) and len(values) == total
        }
        size = _group_size(own, total)
        rows = [
            {name: values[start] for name, values in own.items()} | {"completion_ids": completion_ids[start:][:size]}
            for start in range(0, total, size)
        ]
        rewards = torch.cat([self._score(rows[i : i + self.batch_size]) for i in range(0, len(rows), self.batch_size)])
        if len(rewards) != total:
            raise ValueError(f"the reward model returned {len(rewards)} scores for {total} completions.")
        judged = torch.ones(total, dtype=torch.bool)
        if self.catalogue is not None:
            judged = is_legal(completion_ids, self.catalogue)
        if len(wrong := (judged & ~rewards.isfinite().cpu()).nonzero()):
            row = int(wrong[0])
            raise ValueError(
                f"the reward model returned {rewards[row].item()} for completion {row}: check its inputs."
            )
        return [reward if real else None for reward, real in zip(rewards.tolist(), judged.tolist())]

    def _score(self, rows: list[dict]) -> torch.Tensor:
        found = self.score(**self.collate(rows))
        return (found.rewards if hasattr(found, "rewards") else found).float().reshape(-1)


_PER_COMPLETION = {ITEM_IDS, "sample_log_probs"}  # all other columns are those of the sample


def _group_size(columns: dict[str, Sequence], total: int) -> int:
    """The largest G for which every G adjacent completions are of one sample: what stands in its columns is the
    same.
    """
    samples = [values for name, values in columns.items() if name not in _PER_COMPLETION]
    starts = [i for i in range(1, total) if not all(_equal(values[i - 1], values[i]) for values in samples)]
    return math.gcd(*(end - start for start, end in zip([0, *starts], [*starts, total])))


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if hasattr(one, "shape") and hasattr(other, "shape"):
        return one.shape == other.shape and bool((one == other).all())
    return bool(one == other)


class CandidateCollator:
    r"""
    Makes a reward model's inputs from samples with `completion_ids`: the `collate` of [`ModelReward`].

    A semantic ID that several items share counts as its most popular one. Item 0 stands in the tensors for what is no
    item; [`ModelReward`] with the catalogue gives such a completion no reward.

    A row without `targets` is taken as the request it was generated for: the last item of its history comes next, so
    the history ends before it, and its time and scenario are the request's. Which columns run parallel to the history
    is the collator's to say: `timestamp`, its `event_features` and its `request_features`. All others stay as they
    are.

    Args:
        collator: The reward model's own: `context(rows)`, the context tensors, and `candidates(rows)`, the tensors of
            the items in each row's `targets` (`RewardCollator`).
        catalogue (`Catalogue`): The policy's, to read items from completions.
        device (`torch.device`, *optional*): Where the tensors shall be.
    """

    def __init__(self, collator: Any, catalogue: Catalogue, device: torch.device | None = None):
        self.collator, self.catalogue, self.device = collator, catalogue, device
        self._request_columns = [f"target_{name}" for name in getattr(collator, "request_features", ())]

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        completions = [ids for row in rows for ids in row["completion_ids"]]
        leaves, owner = completion_leaves(completions, self.catalogue)
        items = self.catalogue.items_of(leaves.to(self.catalogue.device).unsqueeze(1), 1)[:, 0].clamp(min=0).cpu()
        order = owner.argsort(stable=True)
        items = items[order].split(owner.bincount(minlength=len(completions)).tolist())
        requests = [self._request(row) for row in rows]
        samples = [request for request in requests for _ in request["completion_ids"]]
        judged = [self._candidate(request, candidate.tolist()) for request, candidate in zip(samples, items)]
        batch = self.collator.context(requests) | self.collator.candidates(judged)
        return {name: value.to(self.device) for name, value in batch.items()}

    def _candidate(self, row: dict, items: list[int]) -> dict:
        """The row with other items in its request, whose own columns (scenario, hour) are the same for all of them."""
        names = [name for name in self._request_columns if name in row]
        return row | {name: [*row[name][:1]] * len(items) for name in names} | {"targets": items}

    def _request(self, row: dict) -> dict:
        """A row that the policy saw as the request it was generated for."""
        if "targets" in row:
            return row
        parallel = {"timestamp", *self.collator.event_features, *getattr(self.collator, "request_features", ())}
        events = {name: row[name] for name in sorted(parallel) if name in row}
        if wrong := {name: len(values) for name, values in events.items() if len(values) != len(row["history"])}:
            raise ValueError(f"columns {wrong} do not run parallel to the history of {len(row['history'])} items.")
        row = row | {name: values[:-1] for name, values in events.items()} | {"history": row["history"][:-1]}
        row |= {f"target_{name}": values[-1:] for name, values in events.items()}
        return row | ({"session_start": events["timestamp"][-1]} if len(events.get("timestamp", ())) else {})


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
    catalogue: Catalogue | None = None,
    batch_size: int = 64,
) -> ModelReward:
    """
    A reward model as a reward function for the policy's completions; `None` for a completion that is no item.

    Args:
        reward_model: Any module that takes the tensors of `collator` and returns an object with `rewards`, one for
            each completion, or one for each item of it (P-Score), whose mean then counts.
        collator: See [`CandidateCollator`].
        policy: The OneRec model that generates.
        catalogue (`Catalogue`, *optional*): The one that the reward model was trained with, to be compared with the
            policy's beside the fingerprint in the reward model's config.
        batch_size (`int`, defaults to 64): Samples per call of the reward model.

    Raises:
        ValueError: When the reward model knows other semantic IDs than the policy.
    """
    if list(reward_model.config.codebook_sizes) != list(policy.config.codebook_sizes):
        raise ValueError(
            f"the reward model has codebook_sizes={reward_model.config.codebook_sizes}, the policy "
            f"{policy.config.codebook_sizes}: it was trained with other semantic IDs. Train it with the policy's "
            "tokenizer."
        )
    own = policy.catalogue
    known = {reward_model.config.catalogue_fingerprint, catalogue.fingerprint() if catalogue is not None else None}
    if known - {None, own.fingerprint()}:
        raise ValueError(
            f"the reward model was trained with {catalogue or 'another catalogue'}, the policy has {own}: the same "
            "codes mean other items. Train it with the policy's tokenizer."
        )
    reward_model.eval()
    collate = CandidateCollator(collator, own, reward_model.device)
    score = lambda **batch: _score(reward_model, batch)  # noqa: E731
    return ModelReward(score, collate, batch_size, own)


__all__ = ["CandidateCollator", "ModelReward", "reward_of_model"]
