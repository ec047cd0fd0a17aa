"""Lifelong histories, compressed offline: hierarchical k-means per user on item embeddings.

OneRec Technical Report, section 2.2.1 (arXiv:2506.13695), after TWIN-V2 (arXiv:2407.16357). n events, D embedding
width.
"""

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa

from ..item_embeddings.embeddings import check_item_embeddings
from .features import event_column
from .splits import arrow_dataset

# Lloyd iterations of one step: a cluster that has not settled by then is settled enough for a cache of representatives
_NUM_ITERATIONS = 20


def compress_lifelong(
    split: datasets.Dataset,
    item_embeddings: np.ndarray,
    *,
    sparse: Sequence[str] = (),
    averaged: Sequence[str] = ("timestamp", "play_time_ms", "duration_ms"),
    max_cluster_size: int = 200,
    compress_above: int = 2000,
    seed: int = 0,
) -> datasets.Dataset:
    """
    Adds the lifelong pathway to rows with a `history`: one event per cluster of similar events.

    The paper also averages the tag; a category has no average, so features of the item (tag, author) are those of the
    representative here, looked up by the collator.

    Args:
        split: rows of [`session_splits`] (`history="all"`) or of another split; a row is compressed from its own
            history alone, so it sees nothing later.
        item_embeddings (`np.ndarray` of shape (N, D)): finite, in the order of the item indices.
        sparse: event columns that a cluster takes from its representative (`is_like`, ...).
        averaged: event columns that it averages over its events, as float64; NaN and negatives are unknown, -1 if all
            are. Without `timestamp` here, the time is the representative's.
        max_cluster_size: M, see [`hierarchical_kmeans`]. Not in the paper; 200 turned 100,000
            simulated events into about 2,000 clusters, the length of the pathway.
        compress_above: histories with at most so many events stay as they are, every event for itself. Not in the
            paper, which compresses up to 100,000 events to 2,000.
        seed: the same for every row, so a row's result does not depend on the others.

    Returns:
        `datasets.Dataset`: the rows, with `lifelong` (`List(int32)`, item indices) and `lifelong_<column>` for
        `timestamp`, `sparse` and `averaged`, in the order of `lifelong_timestamp`.

    Raises:
        ValueError: a column named twice, one that is not parallel to the history, embeddings that do not fit, M below
            7.
        KeyError: a column that is not there.
    """
    averaged, sparse = list(averaged), list(sparse)
    if "timestamp" not in averaged and "timestamp" not in sparse:
        sparse.append("timestamp")
    if len(set(averaged + sparse)) < len(averaged + sparse):
        raise ValueError(f"sparse={sparse} and averaged={averaged} name a column twice.")
    item_embeddings = check_item_embeddings(item_embeddings, len(item_embeddings)).astype(np.float32, copy=False)
    if absent := [name for name in ["history", *averaged, *sparse] if name not in split.column_names]:
        raise KeyError(f"the rows have no column {absent}; they have {split.column_names}.")
    compressed: dict[str, list] = {name: [] for name in ["lifelong", *averaged, *sparse]}
    for row in split.select_columns(["history", *averaged, *sparse]).with_format("numpy"):
        columns = {name: event_column(row, name) for name in averaged + sparse}
        items = np.asarray(row["history"], dtype=np.int64)
        if len(items) and items.max() >= len(item_embeddings):
            raise ValueError(f"item {items.max()} is beyond the {len(item_embeddings)} rows of item_embeddings.")
        if len(items) <= compress_above:
            cluster = np.arange(len(items))
        else:
            cluster = hierarchical_kmeans(items, item_embeddings, max_cluster_size, np.random.default_rng(seed))
        chosen = representatives(items, item_embeddings, cluster)
        values = {name: columns[name][chosen] for name in sparse}
        values |= {name: cluster_means(columns[name], cluster) for name in averaged}
        order = np.lexsort((chosen, values["timestamp"]))
        compressed["lifelong"].append(items[chosen][order].astype(np.int32))
        for name, column in values.items():
            compressed[name].append(column[order])
    offsets = pa.array(np.cumsum([0, *map(len, compressed["lifelong"])]), pa.int32())
    lists = {
        name if name == "lifelong" else f"lifelong_{name}": pa.ListArray.from_arrays(
            offsets, pa.array(np.concatenate(parts))
        )
        for name, parts in compressed.items()
    }
    return datasets.concatenate_datasets([split, arrow_dataset(lists)], axis=1)


def hierarchical_kmeans(
    items: np.ndarray, item_embeddings: np.ndarray, max_cluster_size: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Clusters of one user's events: k-means with floor(n^(1/3)) clusters, again inside every cluster of more than
    `max_cluster_size`.

    Args:
        items (`np.ndarray` of shape (n,)): item indices; repeated ones are points of their own.
        item_embeddings (`np.ndarray` of shape (N, D)): float32.
        max_cluster_size: M, at least 7, because floor(n^(1/3)) is 1 below 8 events. Only events of equal embeddings,
            which nothing separates, stay together in larger numbers.
        rng: picks the starting centres.

    Returns:
        `np.ndarray` of shape (n,), int64: cluster of each event, 0..C-1, every one of them used.
    """
    if max_cluster_size < 7:
        raise ValueError(
            f"max_cluster_size={max_cluster_size}: at least 7, because a step makes floor(n^(1/3)) clusters of n "
            "events."
        )
    cluster = np.zeros(len(items), dtype=np.int64)
    count, pending = 0, [np.arange(len(items))]
    while pending:
        members = pending.pop()
        if len(members) > max_cluster_size:
            codes = kmeans_step(items[members], item_embeddings, integer_cube_root(len(members)), rng)
            parts = np.split(members[np.argsort(codes, kind="stable")], np.cumsum(np.bincount(codes))[:-1])
            parts = [part for part in parts if len(part)]
            if len(parts) > 1:
                pending += parts
                continue
        cluster[members] = count
        count += bool(len(members))
    return cluster


def kmeans_step(
    items: np.ndarray, item_embeddings: np.ndarray, num_clusters: int, rng: np.random.Generator
) -> np.ndarray:
    """
    Lloyd's algorithm on the events of different items, starting from `num_clusters` of the items at random (all of
    them if there are fewer); codes of shape (n,), of which some may have no event.
    """
    distinct, inverse, weight = np.unique(items, return_inverse=True, return_counts=True)
    points = item_embeddings[distinct]  # equal points move together: one with a weight stands for all views of an item
    centres = points[rng.choice(len(points), size=min(num_clusters, len(points)), replace=False)]
    codes = np.full(len(points), -1)
    for _ in range(_NUM_ITERATIONS):
        previous, codes = codes, (np.square(centres).sum(axis=1) - 2 * points @ centres.T).argmin(axis=1)
        if (codes == previous).all():
            break
        sums, sizes = _sums(points * weight[:, None], codes, len(centres)), np.bincount(codes, weight, len(centres))
        centres = np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres).astype(np.float32)
    return codes[inverse]


def representatives(items: np.ndarray, item_embeddings: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """The event of each cluster that is nearest to the mean of its events, the latest one on ties; (C,) rows of the
    history.
    """
    if not len(items):
        return np.zeros(0, dtype=np.int64)
    size = np.bincount(cluster)
    points = item_embeddings[items]
    means = (_sums(points, cluster, len(size)) / size[:, None]).astype(points.dtype)
    distance = np.square(points - means[cluster]).sum(axis=1)
    order = np.lexsort((-np.arange(len(items)), distance, cluster))
    return order[np.cumsum(size) - size]


def cluster_means(values: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Mean of the known values (neither NaN nor negative) of each cluster, (C,) float64; -1 where none is known."""
    values = values.astype(np.float64)
    known = values >= 0
    size = int(cluster.max(initial=-1)) + 1
    count = np.bincount(cluster, known, size)
    total = np.bincount(cluster, np.where(known, values, 0.0), size)
    return np.where(count > 0, total / np.maximum(count, 1), -1.0)


def integer_cube_root(n: int) -> int:
    """floor(n^(1/3)), exactly."""
    root = round(n ** (1 / 3))
    return root - (root**3 > n)


def _sums(points: np.ndarray, codes: np.ndarray, num_clusters: int) -> np.ndarray:
    """Sums of the points of each cluster, (K, D) float64."""
    order = np.argsort(codes, kind="stable")
    present, starts = np.unique(codes[order], return_index=True)
    sums = np.zeros((num_clusters, points.shape[1]))
    sums[present] = np.add.reduceat(points[order], starts, axis=0, dtype=np.float64)
    return sums
