"""A saved reward model, complete by itself: it judges items for histories, and is a reward function for TRL.

OneRec, reward model (arXiv:2502.18965, eq. 5 to 7); OneRec Technical Report, P-Score (arXiv:2506.13695).
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModel

from ..collators import OneRecCollator
from ..collators.histories import check_per_user, history_rows
from ..collators.reward_collator import NOW, RewardCollator
from ..models.catalogue import Catalogue
from .candidates import reward_of_model


class RewardModel:
    r"""
    A reward model with the collator and the catalogue it was trained with.

    ```python
    reward = RewardModel.from_pretrained("org/onerec-reward")
    reward.score([[1003, 1007]], [[1063, 1005]], events={"play_time_ms": [[900, 12000]]})  # one number per item
    OneRecGRPOTrainer(..., reward_funcs=[reward])
    ```

    As a reward function it reads the columns of its training rows (`user`, `history`, event columns), and what it
    knows of a user is what the training log said of `user`. A completion that is no item has no reward (`None`).

    Args:
        model: [`OneRecSessionRewardModel`] or [`OneRecPScoreModel`].
        collator ([`RewardCollator`]): As in training.
        catalogue ([`Catalogue`]): The items, and the semantic IDs by which the model knows them.
        batch_size (`int`, defaults to 64): Users per call of the model.
    """

    def __init__(self, model: Any, collator: RewardCollator, catalogue: Catalogue, batch_size: int = 64):
        trained = model.config.catalogue_fingerprint
        if trained not in (None, catalogue.fingerprint()):
            raise ValueError(
                f"the reward model was trained with the catalogue {trained}, this is {catalogue.fingerprint()}: the "
                "same codes mean other items. Take the one that was saved with it."
            )
        self.model, self.collator, self.catalogue, self.batch_size = model, collator, catalogue, batch_size
        self.__name__ = "reward_model"
        self._function = reward_of_model(model, collator, self, batch_size=batch_size)

    @property
    def config(self) -> Any:
        return self.model.config

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike,
        batch_size: int = 64,
        device: str | torch.device | None = None,
        **hub_kwargs,
    ) -> "RewardModel":
        """
        Load a folder that `onerec reward` wrote, or a Hub repository.

        Args:
            repo: The folder or repository: model, collator and catalogue.
            batch_size (`int`, defaults to 64): Users per call of the model.
            device (*optional*): Where the model runs; default where it is loaded, the CPU.
            hub_kwargs: `revision`, `token`, `cache_dir`, ... as `from_pretrained` takes them.

        Raises:
            OSError: Where the model, `collator_config.json` or `catalogue.safetensors` is missing.
            ValueError: Where they do not belong together.
        """
        model = AutoModel.from_pretrained(repo, **hub_kwargs).eval().to(device)
        catalogue = Catalogue.from_pretrained(repo, **hub_kwargs)
        tokens = catalogue.semantic_ids.long() + torch.tensor(model.config.level_offsets)
        collator = OneRecCollator.from_pretrained(repo, tokens.numpy(), **hub_kwargs)
        if not isinstance(collator, RewardCollator):
            raise ValueError(
                f"{repo} holds the {type(collator).__name__} of a model that recommends: give the folder of a reward "
                "model, as `onerec reward` writes it."
            )
        return cls(model, collator, catalogue, batch_size)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Model, catalogue and collator; the tokenizer is saved by itself."""
        self.model.save_pretrained(folder)
        self.catalogue.save_pretrained(folder)
        self.collator.save_pretrained(folder)

    @torch.no_grad()
    def score(
        self,
        histories: Sequence[Sequence],
        items: Sequence[Sequence],
        *,
        events: Mapping[str, Sequence[Sequence]] | None = None,
        users: Mapping[str, Sequence] | None = None,
        requests: Mapping[str, Sequence] | None = None,
    ) -> list[list[float]] | list[float]:
        """
        What the model thinks of items (P-Score), or of sessions of them.

        Args:
            histories: Per user the ids of the items, oldest first; may be empty.
            items: Per user the ids of the items to judge, at least one; of a session-wise model, the items of one
                session in order.
            events: Feedback on the items of the histories, parallel to them; a column that is left out counts as
                unknown.
            users: User features, one value per user, as [`Recommender.recommend`] takes them.
            requests: What is known of a request before anything is shown (hour, scenario), one value per user; unknown
                if left out.

        Returns:
            Per user one reward for each item, or, of a session-wise model, one reward.

        Raises:
            KeyError: Unknown item ids. ValueError: Columns that the model does not have, or that do not run parallel
                to the users.
        """
        n, requests = len(histories), dict(requests or {})
        if len(items) != n or not all(
            hasattr(own, "__len__") and len(own) and not isinstance(own, str) for own in items
        ):
            raise ValueError(f"items: one list with at least one item id for each of the {n} users.")
        check_per_user(n, events=events, users=users)
        if unknown := sorted(set(requests) - set(self.collator.request_features)):
            raise ValueError(f"requests has {unknown}; the model takes {sorted(self.collator.request_features)}.")
        if wrong := [name for name, values in requests.items() if len(values) != n]:
            raise ValueError(f"requests[{wrong[0]!r}] has {len(requests[wrong[0]])} values for {n} users.")
        collator = self.collator.for_users(users or {}, n)
        rows = history_rows(self.catalogue, collator, histories, events or {})
        for i, (row, own) in enumerate(zip(rows, items)):
            row |= {"targets": self.catalogue.index_of(own), "session_start": NOW}
            for name in self.collator.request_features:
                value = requests[name][i] if name in requests else float("nan")
                row[f"target_{name}"] = [value] * len(own)
        found: list = []
        for start in range(0, n, self.batch_size):
            part = rows[start : start + self.batch_size]
            batch = collator.context(part) | collator.candidates(part)
            rewards = self.model(**{name: v.to(self.model.device) for name, v in batch.items()}).rewards.tolist()
            if not self.collator.session_wise:
                rewards = [own[: len(row["targets"])] for own, row in zip(rewards, part)]
            found += rewards
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Sequence[float | None]:
        """TRL's signature: `prompts`, `completions`, `completion_ids` and columns."""
        return self._function(*args, **kwargs)

    def check_policy(self, policy: Any) -> None:
        """Raises a ValueError unless the policy's codes mean the items that this model judges."""
        if difference := self.catalogue.difference(policy.catalogue):
            raise ValueError(
                f"the reward model and the policy do not know the same items: {difference}. Train both on one data "
                "folder."
            )


__all__ = ["RewardModel"]
