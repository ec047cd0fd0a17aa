"""What each item of a history adds to the score of a recommended item: the history is scored again without it."""

import copy
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .collators.histories import check_per_user, history_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH_SIZE = 256  # histories that are scored at once


class Contribution(NamedTuple):
    """An item of a history: its id, what it adds to the log-probability of the explained item (nats), what is known
    about it, and the share of the context attention that it gets (None where a model mixes items first: OneRecV1).
    """

    item_id: Any
    contribution: float
    metadata: dict
    attention: float | None = None


@torch.no_grad()
def leave_one_out(
    recommender: Any, history: Sequence, item: Any, events: Mapping[str, Sequence], users: Mapping[str, Any]
) -> list[Contribution]:
    """
    What each item of a history adds to the score of an item, as [`Recommender.explain`] returns it: the score of the
    history, minus the score without that item.

    The histories without one item each, and the whole one, are scored in batches, without a search. Contributions are
    no shares: two items that say the same add little each.

    Args:
        recommender ([`~recommender.Recommender`]): Its model in evaluation mode.
        history: Item ids, oldest first, at least one; those beyond the model's length are left out.
        item: The id of the item that is explained.
        events: Event column -> a value for each item of the history; what is left out is unknown.
        users: User feature -> the value of this user.

    Returns:
        One [`Contribution`] per item that the model reads, oldest first, in nats.

    Raises:
        KeyError: Unknown item ids. ValueError: A model in training mode, an empty history, events of another length,
            columns or features that the model does not have.
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
    batch = collator.context(rows[:1]) | {"target_ids": collator.pad_targets([target])}
    attention = _attention(model, {name: tensor.to(model.device) for name, tensor in batch.items()}, len(without))
    return [
        Contribution(one, whole - score, recommender.metadata.get(one, {}), share)
        for one, score, share in zip(histories[0], without, attention)
    ]


def _attention(model: Any, batch: dict[str, torch.Tensor], num_items: int) -> list[float] | list[None]:
    """
    The share of the context attention of each item, a mean over layers, heads and the codes of the target.

    The first context position is no item: it stands for the user, so the shares add up to less than 1.
    """
    # a copy that shares the weights: other threads may be recommending with this model, by a faster attention
    shared = [*model.parameters(), *model.buffers(), model.catalogue]
    watched = copy.deepcopy(model, {id(one): one for one in shared})
    watched.set_attn_implementation("eager")
    weights = watched(**batch, output_attentions=True).cross_attentions
    positions = torch.stack([layer.float().mean((0, 1, 2)) for layer in weights]).mean(0)[1:]
    if model.config.model_type == "onerec_v1" or len(positions) % num_items:
        return [None] * num_items
    return positions.view(num_items, -1).sum(1).tolist()  # an encoder may read one position per code


def plot_explanation(
    found: Sequence[Contribution], path: str | os.PathLike | None = None, label: str = "title"
) -> "Figure":
    """
    A bar for each item of the history, oldest on top: what it adds, and its share of the context attention.

    Args:
        found: What [`Recommender.explain`] returned.
        path: Where the picture is saved, as PNG, SVG or PDF; None: it is not.
        label: The metadata that names an item; an item without it is named by its id.

    Returns:
        The `matplotlib.figure.Figure`, which a notebook shows.

    Raises:
        ValueError: Without contributions. ImportError: Without matplotlib.
    """
    if not found:
        raise ValueError("there is nothing to plot: pass what `recommender.explain(history, item)` returned.")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("an explanation is drawn with matplotlib: `pip install matplotlib`.") from error
    columns: list[tuple[str, list]] = [("adds to the score (nats)", [one.contribution for one in found])]
    if all(one.attention is not None for one in found):
        columns.append(("share of the context attention", [one.attention for one in found]))
    height = 1.2 + 0.3 * len(found)
    figure = Figure(figsize=(3.0 + 3.2 * len(columns), height), layout="constrained", dpi=150)
    rows = range(len(found))
    for axes, (name, values) in zip(figure.subplots(1, len(columns), sharey=True, squeeze=False)[0], columns):
        axes.barh(rows, values, color=["tab:blue" if value >= 0 else "tab:red" for value in values])
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(name)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_yticks(rows, [str(one.metadata.get(label, one.item_id)).replace("$", r"\$") for one in found])
    axes.invert_yaxis()  # shared: both at once
    if path is not None:
        figure.savefig(path)
    return figure


__all__ = ["Contribution", "leave_one_out", "plot_explanation"]
