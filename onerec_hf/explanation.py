"""What each item of a history adds to the score of a recommended item: the history is scored again without it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .collators.histories import check_per_user, history_rows

BATCH_SIZE = 256  # histories that are scored at once


class Contribution(NamedTuple):
    """An item of a history: its id, what it adds to the log-probability of the explained item (nats), what is known
    about it.
    """

    item_id: Any
    contribution: float
    metadata: dict


@torch.no_grad()
def leave_one_out(
    recommender: Any, history: Sequence, item: Any, events: Mapping[str, Sequence], users: Mapping[str, Any]
) -> list[Contribution]:
    """
    As [`Recommender.explain`], which says what the arguments are.

    The histories without one item each, and the whole one, are a batch of one search-free pass. Contributions are no
    shares: two items that say the same add little each.
    """
    model, collator = recommender.model, recommender.ranker.collator
    if model.training:
        raise ValueError("the model is in training mode, with dropout: call `model.eval()` before you explain.")
    catalogue = model.catalogue
    target = catalogue.index_of([item])
    if (unequal := [name for name, column in events.items() if len(column) != len(history)]) or not len(history):
        what = f"events[{unequal[0]!r}] has {len(events[unequal[0]])} values, " if unequal else ""
        raise ValueError(
            f"{what}the history has {len(history)} items: at least one, and one value of an event for each."
        )
    start = max(
        0, len(history) - collator.max_history
    )  # older ones are not read, and would move in where one is left out
    places = [[j for j in range(start, len(history)) if j != left] for left in (None, *range(start, len(history)))]
    histories = [[history[j] for j in own] for own in places]
    columns = {name: [[column[j] for j in own] for own in places] for name, column in events.items()}
    features = {name: [value] * len(places) for name, value in users.items()}
    check_per_user(len(places), users=features)
    collator = collator.for_users(features, len(places))
    rows = history_rows(catalogue, collator, histories, columns)
    scores = []
    for first in range(0, len(rows), BATCH_SIZE):
        part = rows[first : first + BATCH_SIZE]
        batch = collator.context(part) | {"target_ids": collator.pad_targets([target] * len(part))}
        found = model(**{name: tensor.to(model.device) for name, tensor in batch.items()}).target_log_probs
        scores.append(found.sum((1, 2)))
    whole, *without = torch.cat(scores).tolist()
    return [
        Contribution(one, whole - score, recommender.metadata.get(one, {}))
        for one, score in zip(histories[0], without)
    ]


__all__ = ["Contribution", "leave_one_out"]
