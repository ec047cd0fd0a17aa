"""What each item is worth once it is chosen, of a data folder: `onerec rerank --value`."""

from collections.abc import Mapping

import datasets
import numpy as np
import torch

from ..data import DataFolder

SMOOTHING = 20.0  # events of the mean that every item has besides its own
LEAST = 0.01  # of the mean: the logarithm of 0 would forbid an item
_NUMBERS = ("int", "uint", "float", "bool", "decimal")


def item_values(data: DataFolder, column: str) -> torch.Tensor:
    """
    The value of each item relative to the mean of all, float32 (N,), at least a hundredth.

    Of an event column it is the mean over the training events, with 20 events of the mean of all besides; what is
    negative or no number is not known and does not count. Rows of sessions repeat what was before them, so theirs is
    the mean over the targets. Of a column of the item table it is that number, and the mean where there is none.

    Raises:
        ValueError: Where there is no such column of numbers, none of them is above 0, or an item's is below.
    """
    check_value(data, column)
    if column in (events := _event_columns(data.splits["train"])):
        found, mean = _mean_values(data.splits["train"], *events[column], data.num_items)
    else:
        found = np.array(data.items.with_format("pandas")[column], dtype=float)
        known = np.isfinite(found)
        mean = float(found[known].mean()) if known.any() else 0.0
        found = np.where(known, found, mean)
    if not mean > 0 or found.min() < 0:
        raise ValueError(f"value={column!r}: values from 0 on, some above it; got {found.min():g} to {found.max():g}.")
    return torch.from_numpy(np.maximum(found / mean, LEAST)).float()


def check_value(data: DataFolder, column: str) -> None:
    """Refuses what is no column of numbers, before the long work starts."""
    events, items = _event_columns(data.splits["train"]), _numbers(data.items.features, ("item_id",))
    if column not in events and column not in items:
        raise ValueError(
            f"value={column!r}: {data.path} has no such column of numbers. Its events have {list(events)}, its items "
            f"{items}. `onerec prepare --feedback` keeps event columns."
        )


def _event_columns(train: datasets.Dataset) -> dict[str, tuple[str, str]]:
    """By event column, the lists of items and of numbers that belong together and have each event once."""
    lists = {
        name: feature.feature
        for name, feature in train.features.items()
        if isinstance(feature, (datasets.List, datasets.LargeList))
    }
    names = _numbers(lists, ("history", "targets", "timestamp"))
    if "targets" not in train.column_names:
        return {name: ("history", name) for name in names}
    return {name.removeprefix("target_"): ("targets", name) for name in names if name.startswith("target_")}


def _numbers(features: Mapping, others: tuple[str, ...]) -> list[str]:
    return [
        name
        for name, feature in features.items()
        if name not in others and isinstance(feature, datasets.Value) and feature.dtype.startswith(_NUMBERS)
    ]


def _mean_values(train: datasets.Dataset, items: str, numbers: str, num_items: int) -> tuple[np.ndarray, float]:
    """The smoothed means (N,), and the mean of all."""
    total, count = np.zeros(num_items), np.zeros(num_items)
    for batch in train.select_columns([items, numbers]).with_format("arrow").iter(batch_size=10_000):
        rows = batch.filter(batch[numbers].is_valid())
        own, values = (rows[name].combine_chunks().flatten() for name in (items, numbers))
        values = values.to_numpy(zero_copy_only=False).astype(float)
        known = np.isfinite(values) & (values >= 0)
        total += np.bincount(own.to_numpy()[known], values[known], num_items)
        count += np.bincount(own.to_numpy()[known], minlength=num_items)
    mean = float(total.sum() / max(count.sum(), 1))
    return (total + SMOOTHING * mean) / (count + SMOOTHING), mean
