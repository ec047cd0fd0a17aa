"""Training rows read from a data folder while a model trains: one part of a split in memory at a time.

The order is a function of the seed and the epoch alone, so a run that is resumed goes on with the very next row.
"""

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from .split_files import split_parts
from .splits import arrow_dataset

CHUNK = 4096  # users whose rows are made, mixed and grouped by length at once


def stream_split(
    folder: str | os.PathLike,
    split: str = "train",
    *,
    rows_of: Callable[[datasets.Dataset], datasets.Dataset] = lambda users: users,
    seed: int = 0,
    group_size: int | None = None,
    num_nodes: int = 1,
) -> datasets.IterableDataset:
    """
    The rows of a split without end, epoch after epoch, each time in another order.

    The parts of the split come in random order, the users of a part are mixed, as many as `CHUNK` at once become
    rows, and these are mixed again. A user's part is a hash of his id, so a part is a sample of all users.

    Args:
        folder: A data folder.
        rows_of: Makes training rows of the users of a chunk; `target_rows` for one, and what leaves rows out.
        seed: Of the order.
        group_size: Rows of similar length come together in groups of this many, a batch or the batches of a step; None
            leaves the order random. The column `length` says how long a row is.
        num_nodes: Processes that train. `split_dataset_by_node`, or accelerate by itself, gives each of them its own
            rows: whole parts where the number of parts allows it, otherwise every n-th user of each.

    Returns:
        `datasets.IterableDataset` of rows of numpy arrays. It has no end, so a trainer needs `max_steps`.
    """
    files = tuple(map(str, split_parts(folder)[split]))
    settings = {"files": files, "rows_of": rows_of, "seed": seed, "group_size": group_size, "num_nodes": num_nodes}
    # a list among the arguments is what `datasets` divides among processes
    return datasets.IterableDataset.from_generator(
        _endless_rows, gen_kwargs={"nodes": list(range(num_nodes)), **settings}
    )


def mapped_split(folder: str | os.PathLike, split: str = "train") -> datasets.Dataset:
    """
    The rows of a split on disk, looked up by number: for trainers that must, as those of preference pairs.

    `datasets` keeps a copy in its cache, in a form that is mapped into memory, and takes it again while the files of
    the split are the same.

    Raises:
        KeyError: A split that the folder does not have. ValueError: It has no rows. Else as `split_parts`.
    """
    first_rows(folder, split, 1)
    files = list(map(str, split_parts(folder)[split]))
    rows: Any = datasets.load_dataset("parquet", data_files={split: files}, split=split)
    return rows


def change_rows(rows: datasets.Dataset, change: Callable[[datasets.Dataset], datasets.Dataset]) -> datasets.Dataset:
    """What `change` makes of rows, such as [`target_rows`]: in memory, or, of rows on disk, `CHUNK` of them at a time
    and in the cache of `datasets`, too.
    """
    if not rows.cache_files:
        return change(rows)
    settings = {"batch_size": CHUNK, "remove_columns": rows.column_names, "fn_kwargs": {"change": change}}
    return rows.with_format("arrow").map(_chunk_rows, batched=True, **settings).with_format(None)


def _chunk_rows(rows: pa.Table, change: Callable[[datasets.Dataset], datasets.Dataset]) -> pa.Table:
    return change(arrow_dataset(rows)).with_format("arrow")[:]


def count_lengths(folder: str | os.PathLike, split: str, count: Callable[[np.ndarray], int]) -> int:
    """
    The sum of `count(lengths)` over the parts of a split; only their column `length` is read.

    Args:
        folder: A data folder.
        split: `"train"`, `"validation"` or `"test"`.
        count: Called once per part with the items of each of its histories, int64 of shape (rows of the part,).

    Raises:
        KeyError: A split that the folder does not have. ValueError: Parts without `length`. Else as `split_parts`.
    """
    return sum(
        count(pyarrow.parquet.read_table(file, columns=["length"])["length"].to_numpy())
        for file in split_parts(folder)[split]
    )


def column_parts(folder: str | os.PathLike, split: str, names: list[str]) -> Iterator[datasets.Dataset]:
    """
    Some columns of a split, one part after another in memory; the others are not read.

    Args:
        folder: A data folder.
        split: `"train"`, `"validation"` or `"test"`.
        names: Of the columns; those that a part does not have are left out, and so is a part that has none.

    Raises:
        KeyError: A split that the folder does not have. Else as `split_parts`.
    """
    for file in split_parts(folder)[split]:
        there = [name for name in names if name in pyarrow.parquet.read_schema(file).names]
        if there:
            yield arrow_dataset(pyarrow.parquet.read_table(file, columns=there))


def longest_list(rows: datasets.Dataset, name: str) -> int:
    """
    Items of the longest list in a column, read without making Python objects of it; 0 where there are no rows.

    Args:
        rows: In memory or on disk.
        name: Of a list column, such as `"history"`.

    Raises:
        KeyError: A column that the rows do not have.
    """
    longest = 0
    for table in rows.select_columns([name]).with_format("arrow").iter(batch_size=100_000):
        longest = max(longest, pc.max(pc.list_value_length(table[name])).as_py() or 0)
    return longest


def first_rows(folder: str | os.PathLike, split: str, count: int = 64) -> datasets.Dataset:
    """
    The first rows of the first part that has rows, in memory: enough to see the columns and to try a batch.

    Args:
        folder: A data folder.
        split: `"train"`, `"validation"` or `"test"`.
        count (`int`, defaults to 64): Rows at most; fewer where the part is smaller.

    Raises:
        KeyError: A split that the folder does not have. Else as `split_parts`.
        ValueError: It has no rows.
    """
    first = pyarrow.parquet.ParquetFile(split_parts(folder)[split][0])
    if not first.metadata.num_rows:  # then no part has any
        raise ValueError(f"the {split} split of {folder} has no rows: prepare the data again, with more of the log.")
    return arrow_dataset(pa.Table.from_batches([next(first.iter_batches(batch_size=count))]))


def _endless_rows(nodes: list[int], num_nodes: int, files: tuple[str, ...], seed: int, **settings: Any) -> Iterator:
    (node,) = nodes if len(nodes) == 1 else (None,)  # None: nobody divided the rows
    for epoch in itertools.count():
        order = np.random.default_rng([seed, epoch])
        places = order.permutation(len(files))
        seeds = order.integers(2**63, size=len(files))  # of every part, whoever reads it
        by_part = node is not None and len(files) % num_nodes == 0
        for place in places[node::num_nodes] if by_part else places:
            own = slice(None) if by_part or node is None else slice(node, None, num_nodes)
            yield from _rows_of_part(Path(files[place]), np.random.default_rng(seeds[place]), own, **settings)


def _rows_of_part(
    file: Path,
    generator: np.random.Generator,
    own: slice,
    rows_of: Callable[[datasets.Dataset], datasets.Dataset],
    group_size: int | None,
) -> Iterator[dict[str, Any]]:
    table = pyarrow.parquet.ParquetFile(file).read()
    users = generator.permutation(len(table))[own]
    for start in range(0, len(users), CHUNK):
        rows = rows_of(arrow_dataset(table.take(pa.array(users[start : start + CHUNK]))))
        chunk = rows.with_format("arrow")[:]
        order = generator.permutation(len(chunk))
        if group_size and len(chunk):
            lengths = chunk["length"].to_numpy()[order]
            order = order[np.argsort(-lengths, kind="stable")]
            starts = np.arange(0, len(order), group_size)
            order = np.concatenate([order[i : i + group_size] for i in generator.permutation(starts)])
        yield from _numpy_rows(chunk, order)


def _numpy_rows(table: pa.Table, order: np.ndarray) -> Iterator[dict[str, Any]]:
    """Rows as `with_format("numpy")` has them; slices of a column, where `datasets` would convert every row."""
    columns: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}
    for name in table.column_names:
        array = table[name].combine_chunks()
        offsets = None
        if pa.types.is_list(array.type):
            offsets, array = array.offsets.to_numpy(), array.values
        columns[name] = array.to_numpy(zero_copy_only=False), offsets
    for row in order:
        yield {
            name: values[row] if offsets is None else values[offsets[row] : offsets[row + 1]]
            for name, (values, offsets) in columns.items()
        }
