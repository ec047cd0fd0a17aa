"""Reading logs and feature tables from files, data sets and data frames as checked Arrow columns."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
from transformers.utils import logging

from .column_types import id_array, integers_of, is_text, plain
from .parquet_files import check_ids_of_dataset
from .table_files import read_files

logger = logging.get_logger(__name__)

STREAM_ROWS = 10_000  # of a streaming data set that are read at once


def read_table(
    source: Any, split: str = "train", ids: Sequence[str] = (), columns: Sequence[str] | None = None
) -> pa.Table:
    """Reads any source that [`load_interactions`] takes (see there) as a `pyarrow.Table`.

    Args:
        split: which one of a Hub data set, or of a `DatasetDict` saved to disk.
        ids: columns of a CSV file that hold ids. They are read as text, and become integers only where no spelling is
            lost: `7`, but not `007`. All other kinds of sources say themselves what their columns are.
        columns: what is asked for. Of several files all must have these columns, each with types that have something
            in common; other columns become null, or are left out, where files differ in them. By default no type may
            be in conflict, and what a file lacks is null, but for `ids`.

    Raises:
        ValueError: no rows, files that do not make one table, two columns of one name, or a file that cannot be read;
            the message says where.
        TypeError: a source of an unknown kind.
        FileNotFoundError: a path that does not exist.
    """
    where = str(source) if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
    try:
        table = _read(source, split, ids, columns)
    except (pa.ArrowException, OverflowError) as error:
        hint = "; each column needs values of one type, and as many as the others"
        if isinstance(error, OverflowError):
            hint = "; integers have 64 bits at most, pass longer ids as text"
        elif isinstance(source, (str, Path)):
            hint = ""
        raise ValueError(f"cannot read {where}: {error}{hint}") from error
    if repeated := sorted({name for name in table.column_names if table.column_names.count(name) > 1}):
        raise ValueError(f"{where} has more than one column named {repeated}; rename all but one")
    if table.num_rows == 0:
        raise ValueError(f"{where} has no rows; its columns are {table.column_names}")
    return table


def _read(source: Any, split: str, ids: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    if isinstance(source, pa.Table):
        return source
    if isinstance(source, datasets.Dataset):
        return source.with_format("arrow")[:]
    if isinstance(source, datasets.IterableDataset):  # read to its end: a log has one
        batches = list(source.with_format("arrow").iter(batch_size=STREAM_ROWS))
        return pa.concat_tables(batches, promote_options="default")
    if isinstance(source, (str, Path)):
        return read_files(source, split, ids, columns)
    splits = isinstance(source, (datasets.DatasetDict, datasets.IterableDatasetDict))
    if isinstance(source, Mapping) and not splits:
        return pa.table({name: pa.array(values, from_pandas=True) for name, values in source.items()})
    if isinstance(source, list) and source and all(isinstance(row, Mapping) for row in source):
        return pa.Table.from_pylist(source)
    if isinstance(source, pd.DataFrame):
        return pa.Table.from_pandas(source, preserve_index=False)
    if hasattr(source, "__arrow_c_stream__"):  # a polars DataFrame, a pyarrow.RecordBatchReader, a DuckDB relation
        return pa.table(source)
    if isinstance(source, pyarrow.dataset.Dataset):
        check_ids_of_dataset(source, ids)
        return source.to_table()
    hint = ""
    if splits:
        hint = f"; it has the splits {list(source)}: pass one of them, such as data[{next(iter(source), '')!r}]"
    elif hasattr(source, "collect"):  # of polars or Spark
        hint = "; it is a query: pass what its `collect()` returns"
    raise TypeError(
        f"cannot read a table from {type(source).__name__}{hint}. Allowed are a path, a pattern of paths "
        "('logs/*.parquet'), a Hub data set name, a datasets.Dataset or IterableDataset, a DataFrame of pandas or "
        "polars, a pyarrow.Table, RecordBatchReader or Dataset, a dict of arrays, or a list of rows (dicts)"
    )


def select_columns(table: pa.Table, names: Mapping[str, str], argument: str) -> pa.Table:
    """Columns `names.values()` of a table under our names `names.keys()`; `argument` is what maps them, for errors."""
    for ours, theirs in names.items():
        if theirs not in table.column_names:
            close = difflib.get_close_matches(theirs, table.column_names, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(
                f"no column {theirs!r} for {ours!r}; the table has {table.column_names}.{hint} "
                f"Name the column with {argument}={{{ours!r}: ...}}"
            )
    return pa.table({ours: table[theirs] for ours, theirs in names.items()})


def one_kind(log_ids: pa.Array, table_ids: pa.Array) -> tuple[pa.Array, pa.Array]:
    """Ids of a log and of a table about them, as one type: 7 and '7' are the same id, '007' is another one.

    The log decides: beside its integers, text of integers becomes integers; beside its text, integers become text.
    Where the table has other text ('A7', '007'), the integers of the log become text, too.
    """
    if pa.types.is_integer(log_ids.type) and not pa.types.is_integer(table_ids.type):
        table_ids = integers_of(table_ids)
    if log_ids.type == table_ids.type:
        return log_ids, table_ids
    return log_ids.cast(pa.large_string()), table_ids.cast(pa.large_string())


def match_ids(ids: np.ndarray, known: np.ndarray) -> np.ndarray:
    """
    The row of each id in `known`, compared as in [`one_kind`].

    Args:
        ids (`np.ndarray` of shape (n,)): Integers or text.
        known (`np.ndarray` of shape (m,)): Integers or text, each once.

    Returns:
        `np.ndarray` of shape (n,), int64; -1 where `known` lacks the id.
    """
    left, right = one_kind(id_array(pa.array(ids), "ids"), id_array(pa.array(known), "ids"))
    return pc.fill_null(pc.index_in(left, value_set=right), -1).to_numpy().astype(np.int64)


def index_ids(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Distinct ids in sorted order, and the row of each id in them (int64)."""
    encoded = ids.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)), rank[encoded.indices.to_numpy()]


def time_array(array: pa.Array, name: str = "timestamp") -> tuple[pa.Array, int]:
    """Timestamps as int64 or float64 in their full precision, and how many of their units make one of ours.

    Numbers keep their unit: 1. Dates, UTC where they name no zone, count from 1970 in units of which 1, 1,000 or
    1,000,000 make a millisecond.
    """
    if pa.types.is_date(array.type) or (pa.types.is_timestamp(array.type) and array.type.unit == "s"):
        array = array.cast(pa.timestamp("ms"))
    if pa.types.is_timestamp(array.type):
        return array.cast(pa.int64()), {"ms": 1, "us": 1_000, "ns": 1_000_000}[array.type.unit]
    if pa.types.is_integer(array.type) or (pa.types.is_decimal(array.type) and array.type.scale == 0):
        try:
            return array.cast(pa.int64()), 1
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{name} ({array.type}) does not fit into 64 bits ({error}); use a larger unit"
            ) from error
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        return array.cast(pa.float64()), 1
    raise TypeError(f"{name} must hold numbers, dates or ISO 8601 strings, got {array.type}")


def parse_iso(array: pa.Array, name: str) -> pa.Array:
    """ISO 8601 strings as timestamps, in nanoseconds where all of them fit."""
    # Arrow wants all strings without, or all with, a zone; nanoseconds reach from 1677 to 2262 alone
    for target in (pa.timestamp(unit, zone) for unit in ("ns", "us") for zone in (None, "UTC")):
        try:
            return array.cast(target)
        except pa.ArrowInvalid as error:
            reason = error
    raise ValueError(
        f"{name} holds strings that are not ISO 8601 dates, all with or all without a zone ({reason}); convert them, "
        "or cast digits to integers"
    )


def value_array(column: pa.ChunkedArray, name: str) -> pa.Array:
    """One number, boolean or string per row, in the narrow type of the source; decimals become float64."""
    array = plain(column)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    kind = array.type
    if is_text(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return array
    raise TypeError(f"{name} must hold numbers, booleans or strings, got {kind}")


def numpy_values(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The values of [`value_array`] in numpy's type of that name, text as text."""
    array = plain(column)
    return np.array(array.to_pylist(), dtype=str) if is_text(array.type) else array.to_numpy(zero_copy_only=False)


def feature_values(column: pa.ChunkedArray) -> np.ndarray | list:
    """Floats as an array (null becomes NaN), integers and booleans too if none is null; the rest as a list with None
    for null.
    """
    array = plain(column)
    if pa.types.is_decimal(array.type):
        array = array.cast(pa.float64())
    # with nulls integers would become floats, of which neighbours above 2^53 are one
    whole = pa.types.is_integer(array.type) or pa.types.is_boolean(array.type)
    if pa.types.is_floating(array.type) or (whole and not array.null_count):
        return array.to_numpy(zero_copy_only=False)
    return array.to_pylist()
