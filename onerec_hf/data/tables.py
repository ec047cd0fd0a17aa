"""Reading logs and feature tables from files, data sets and data frames as checked Arrow columns."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from transformers.utils import logging

logger = logging.get_logger(__name__)

FILE_READERS = {
    ".parquet": pyarrow.parquet.read_table,
    ".csv": pyarrow.csv.read_csv,
    ".jsonl": pyarrow.json.read_json,
    ".json": pyarrow.json.read_json,
}


def read_table(source: Any, split: str = "train") -> pa.Table:
    """Reads any source that [`load_interactions`] takes (see there) as a `pyarrow.Table`."""
    if isinstance(source, pa.Table):
        table = source
    elif isinstance(source, datasets.Dataset):
        table = source.with_format("arrow")[:]
    elif isinstance(source, (str, Path)):
        table = _read_path_or_hub(source, split)
    elif isinstance(source, Mapping) and not isinstance(source, datasets.DatasetDict):
        table = pa.table({name: pa.array(values, from_pandas=True) for name, values in source.items()})
    elif isinstance(source, pd.DataFrame):
        table = pa.Table.from_pandas(source, preserve_index=False)
    else:
        raise TypeError(
            f"cannot read a table from {type(source).__name__}; pass a path, a Hub data set name, a "
            "datasets.Dataset (of a DatasetDict, one split), a pandas DataFrame, a pyarrow.Table or a dict of arrays"
        )
    if table.num_rows == 0:
        where = source if isinstance(source, (str, Path)) else f"the {type(source).__name__}"
        raise ValueError(f"{where} has no rows; its columns are {table.column_names}")
    return table


def _read_path_or_hub(source: str | Path, split: str) -> pa.Table:
    path = Path(source)
    if path.is_dir():
        return pyarrow.parquet.read_table(path)
    if path.suffix in FILE_READERS:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        return FILE_READERS[path.suffix](path)
    if path.exists() or isinstance(source, Path):
        raise ValueError(f"cannot read {path}: pass a {', '.join(FILE_READERS)} file or a folder of parquet files")
    return datasets.load_dataset(source, split=split).with_format("arrow")[:]


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


def without_nulls(table: pa.Table, drop: bool) -> pa.Table:
    """Raises for null or NaN values, or drops their rows (logged)."""
    masks, counts = {}, {}
    for name in table.column_names:
        mask = pc.is_null(table[name], nan_is_null=True)
        if count := pc.sum(mask).as_py():
            masks[name], counts[name] = mask.to_numpy(), count
    if not counts:
        return table
    if not drop:
        raise ValueError(
            f"null or NaN values per column: {counts}, of {table.num_rows} rows; fill them in, or pass "
            "drop_nulls=True to leave these rows out"
        )
    keep = ~np.logical_or.reduce(list(masks.values()))
    logger.warning(f"dropped {(~keep).sum()} of {table.num_rows} rows with null or NaN values; per column: {counts}")
    if not keep.any():
        raise ValueError(f"no rows are left without null or NaN values; per column: {counts}")
    return table.filter(pa.array(keep))


def id_array(column: pa.ChunkedArray, name: str) -> pa.Array:
    """Ids as one int64 or string array; floats pass where all are whole (pandas' integers with gaps)."""
    array = _plain(column)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        try:
            return array.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"{name} ({array.type}) does not fit int64: {error}; pass the ids as strings") from error
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return array.cast(pa.large_string())
    raise TypeError(f"{name} must hold integers or strings, got {array.type}")


def index_ids(ids: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """Distinct ids in sorted order, and the row of each id in them (int64)."""
    encoded = ids.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return encoded.dictionary.take(pa.array(order)), rank[encoded.indices.to_numpy()]


def timestamp_array(column: pa.ChunkedArray, name: str = "timestamp") -> np.ndarray:
    """Timestamps as int64 or float64; dates and ISO 8601 strings as milliseconds since 1970 UTC."""
    array = _plain(column)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        array = _parse_iso(array, name)
    if pa.types.is_date(array.type) or pa.types.is_timestamp(array.type):
        return array.cast(pa.timestamp("ms"), safe=False).cast(pa.int64()).to_numpy()
    if pa.types.is_integer(array.type):
        return array.cast(pa.int64()).to_numpy()
    if pa.types.is_floating(array.type) or pa.types.is_decimal(array.type):
        return array.cast(pa.float64()).to_numpy()
    raise TypeError(f"{name} must hold numbers, dates or ISO 8601 strings, got {array.type}")


def _parse_iso(array: pa.Array, name: str) -> pa.Array:
    for target in (
        pa.timestamp("ns"),
        pa.timestamp("ns", "UTC"),
    ):  # Arrow wants all strings without, or all with, zone
        try:
            return array.cast(target)
        except pa.ArrowInvalid as error:
            reason = error
    raise ValueError(
        f"{name} holds strings that are not ISO 8601 dates, all with or all without a zone ({reason}); convert them, "
        "or cast digits to integers"
    )


def numpy_values(column: pa.ChunkedArray, name: str) -> np.ndarray:
    """One number, boolean or string per row, in the narrow type of the source."""
    array = _plain(column)
    if pa.types.is_boolean(array.type) or pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return array.to_numpy(zero_copy_only=False)
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        return np.array(array.to_pylist(), dtype=str)
    raise TypeError(f"{name} must hold numbers, booleans or strings, got {array.type}")


def feature_values(column: pa.ChunkedArray) -> np.ndarray | list:
    """Numbers as an array (null becomes NaN), booleans too if none is null; the rest as a list with None for null."""
    array = _plain(column)
    is_number = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    if is_number or (pa.types.is_boolean(array.type) and not array.null_count):
        return array.to_numpy(zero_copy_only=False)
    return array.to_pylist()


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
