"""One call that scores every recommender, ours and the baselines, on the same users, targets and catalogue.

Source: full ranking, every item is a candidate and no negatives are sampled (Krichene and Rendle 2020, KDD).
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from .metrics import coverage_at_k, diversity_at_k, hit_at_k, match_targets, ndcg_at_k, recall_at_k


class Recommender(Protocol):
    """
    What `evaluate` scores: any object with a method `recommend(examples, k, exclude_seen)`, derived from this class or
    not. A plain function of these three, or of the first two, will do.

    ```python
    def popular(examples, k, exclude_seen=False):  # item indices (B, k), best first
        return np.tile(np.argsort(-counts)[:k], (len(examples["history"]), 1))


    evaluate(popular, splits["test"], num_items=len(counts))
    ```
    """

    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool) -> np.ndarray:
        """Recommends k items to each user of a batch.

        Args:
            examples (`dict[str, list]`): a batch of dataset rows, as `dataset[i:j]` gives them, without `"targets"`.
            k (`int`): number of slots.
            exclude_seen (`bool`): whether items of the user's `history` may not be recommended.

        Returns:
            Integers of shape `(B, k)`: item indices, best first, no item twice in a row; -1 for a slot that is left
            empty or whose generated semantic ID belongs to no item.
        """
        ...


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics over all users, and what they were computed from.

    Attributes:
        metrics (`dict[str, float]`): for every k `recall@k`, `ndcg@k`, `hit@k` (means over users), `coverage@k` and,
            with item embeddings, `diversity@k` (mean over the users with two items or more among the first k slots);
            and `invalid_rate`: the share of slots that are -1 among the U x max(ks) requested ones.
        predictions (`np.ndarray` of shape `(U, max(ks))`, int64): item indices, best first, or -1.
        user (`np.ndarray` of shape `(U,)`, int64): the dataset's `user` column, in its order.
        per_user (`dict[str, np.ndarray]` of shape `(U,)` each): the same metrics per user, but for coverage.
    """

    metrics: dict[str, float]
    predictions: np.ndarray
    user: np.ndarray
    per_user: dict[str, np.ndarray]

    def to_dict(self) -> dict[str, float | int]:
        """The metrics and `num_users`, ready for JSON."""
        return {"num_users": len(self.user), **self.metrics}

    def save(self, path: str | Path) -> None:
        """Writes one parquet row per user: `user`, `predictions` (list) and a column per metric in `per_user`."""
        columns = {"user": self.user, "predictions": list(self.predictions), **self.per_user}
        datasets.Dataset.from_dict(columns).to_parquet(str(path))


def evaluate(
    recommender: Recommender | Callable[..., np.ndarray] | Any,
    dataset: datasets.Dataset,
    *,
    num_items: int | None = None,
    ks: Sequence[int] = (5, 10, 20),
    exclude_seen: bool = False,
    batch_size: int = 256,
    seed: int = 0,
    item_embeddings: np.ndarray | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Scores a recommender on every row of a split, at item level and over the full catalogue.

    Args:
        recommender (`Recommender`): any object with `recommend(examples, k, exclude_seen)`; a function of these (the
            last may be left out); or what serves: the package's served `Recommender`, its pipeline, a fitted `OneRec`.
            It never sees `"targets"`.
        dataset (`datasets.Dataset`): one row per user with columns `user`, `history` and `targets` (item indices).
        num_items (`int`, *optional*): N, the size of the catalogue; may be left out for what has one.
        ks (`Sequence[int]`, defaults to `(5, 10, 20)`): list lengths; max(ks) slots are requested.
        exclude_seen (`bool`, defaults to `False`): passed on, and checked: a seen item in a list is an error. Say with
            every number which of the two was used: where targets never repeat, True lifts all of them for free.
        batch_size (`int`, defaults to 256): users per call of `recommend`.
        seed (`int`, defaults to 0): torch's global generator is seeded with it for the length of the call and restored
            afterwards, so what a recommender samples (ties, beams) is the same in every call with the same arguments.
        item_embeddings (`np.ndarray` of shape `(N, D)`, *optional*): adds `diversity@k`.
        progress (`bool`, defaults to `True`): whether to show a progress bar.

    Raises:
        ValueError: if the dataset lacks a column or a row lacks targets; if `recommend` returns another shape, a dtype
            that is not an integer, an index outside `-1..N-1`, an item twice in one list, or a seen item where these
            are excluded.
    """
    recommend, num_items = _callable(recommender, num_items)
    ks = sorted(set(ks))
    if not ks or ks[0] < 1:
        raise ValueError(f"ks must hold list lengths of at least 1, got {ks}.")
    missing = {"user", "history", "targets"} - set(dataset.column_names)
    if missing or len(dataset) == 0:
        raise ValueError(
            f"evaluate needs rows with the columns user, history and targets; got {len(dataset)} rows and the columns "
            f"{dataset.column_names}. Use the validation or test split: the train split has no targets."
        )
    if item_embeddings is not None and (item_embeddings.ndim != 2 or len(item_embeddings) != num_items):
        raise ValueError(f"item_embeddings must have shape ({num_items}, D), got {item_embeddings.shape}.")

    lists, targets, users = [], [], []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(dataset), batch_size), desc="evaluate", disable=not progress):
            examples = dict(dataset[start : start + batch_size])
            targets.extend(examples.pop("targets"))
            users.extend(examples["user"])
            history = [list(row) for row in examples["history"]] if exclude_seen else None
            batch = recommend(examples, max(ks), exclude_seen)
            lists.append(_checked(batch, len(targets) - start, max(ks), num_items, history))
    predictions = np.concatenate(lists)
    metrics, per_user = _compute(predictions, targets, num_items, ks, item_embeddings)
    return EvaluationResult(metrics, predictions, np.asarray(users, dtype=np.int64), per_user)


def _callable(recommender: Any, num_items: int | None) -> tuple[Callable[..., Any], int]:
    """`recommend(examples, k, exclude_seen)` of whatever `evaluate` takes, and the number of items."""
    for name in (
        "recommender",
        "ranker",
    ):  # a pipeline or a `OneRec` has a served recommender, which has a ranker of indices
        recommender = getattr(recommender, name, recommender)
    if num_items is None:
        catalogue = getattr(getattr(recommender, "model", None), "catalogue", None)
        if catalogue is None:
            raise ValueError("num_items is missing: say how many items the catalogue has, num_items=...")
        num_items = len(catalogue)
    if hasattr(recommender, "recommend"):
        return recommender.recommend, num_items
    if hasattr(recommender, "recommend_items") or not callable(recommender):
        raise TypeError(
            f"{type(recommender).__name__} has no `recommend(examples, k, exclude_seen)`. Pass a function of these, "
            "or, of a model and its collator, `ItemRanker(model, collator)`; of a saved folder, "
            "`Recommender.from_pretrained(folder)`."
        )
    try:
        inspect.signature(recommender).bind({}, 1, False)
    except TypeError:  # a function of two arguments; what it returns is checked for seen items all the same
        return lambda examples, k, exclude_seen: recommender(examples, k), num_items
    return recommender, num_items


def _compute(
    predictions: np.ndarray,
    targets: list[list[int]],
    num_items: int,
    ks: list[int],
    item_embeddings: np.ndarray | None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    hits, num_targets = match_targets(predictions, targets, num_items)
    per_user: dict[str, np.ndarray] = {}
    for k in ks:
        per_user[f"recall@{k}"] = recall_at_k(hits, num_targets, k)
        per_user[f"ndcg@{k}"] = ndcg_at_k(hits, num_targets, k)
        per_user[f"hit@{k}"] = hit_at_k(hits, k)
        if item_embeddings is not None:
            per_user[f"diversity@{k}"] = diversity_at_k(predictions, k, item_embeddings)
    per_user["invalid_rate"] = (predictions < 0).mean(1)
    metrics = {name: _mean(values) for name, values in per_user.items()}
    metrics |= {f"coverage@{k}": coverage_at_k(predictions, k, num_items) for k in ks}
    return metrics, per_user


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if len(defined) else float("nan")


def _checked(
    batch: Any, num_users: int, num_slots: int, num_items: int, history: list[list[int]] | None
) -> np.ndarray:
    """The recommender's answer as int64 `(B, K)`, or a ValueError that says what is wrong with it."""
    batch = np.asarray(batch)
    if batch.shape != (num_users, num_slots) or not np.issubdtype(batch.dtype, np.integer):
        raise ValueError(
            f"recommend() must return integers of shape ({num_users}, {num_slots}) (users of the batch, k), got "
            f"{batch.dtype} of shape {batch.shape}; fill slots without an item with -1."
        )
    batch = batch.astype(np.int64)
    if batch.min() < -1 or batch.max() >= num_items:
        raise ValueError(
            f"recommend() must return item indices in 0..{num_items - 1}, or -1 for an empty slot, got values in "
            f"{batch.min()}..{batch.max()}."
        )
    ordered = np.sort(batch, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row = int(np.flatnonzero(twice.any(1))[0])
        raise ValueError(f"recommend() returned an item twice in one list: row {row} of the batch is {batch[row]}.")
    if history is not None:
        for row, seen in zip(batch, history):
            if not set(row.tolist()).isdisjoint(seen):
                raise ValueError(
                    f"recommend() was called with exclude_seen=True but returned items of the user's history: "
                    f"{sorted(set(row.tolist()) & set(seen))}."
                )
    return batch
