"""Splits on disk: `splits/<split>/part-*.parquet`, the contract between whatever prepares data and whatever trains.

docs/large_data.md describes it, with the SQL that makes the same in a warehouse.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from .event_shards import whole
from .splits import arrow_dataset

SPLITS, CONTRACT = "splits", "contract.json"
VERSION = 1
ROWS_PER_GROUP = 4096  # of a parquet file: what a stream reads at once


class SplitWriter:
    """
    Writes the splits of a data folder shard by shard. They take the place of earlier ones when all are there.

    Args:
        folder: The data folder.
        work: Where they are until then, on the same disk; by default in the data folder itself.
        rows: How many rows of each split an earlier writer with the same `work` has left there, to go on with; by
            default what is there is deleted.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        work: str | os.PathLike | None = None,
        rows: Mapping[str, int] | None = None,
    ):
        self.folder = Path(folder)
        self.partial = Path(work or folder) / f"{SPLITS}.partial"
        self.changed = Path(work or folder) / f"{SPLITS}.changed"
        self.rows = dict(rows or {})
        if rows is None:
            for earlier in (self.partial, self.changed):
                shutil.rmtree(earlier, ignore_errors=True)

    def write(self, splits: Mapping[str, datasets.Dataset], shard: int = 0, num_shards: int = 1) -> None:
        """The rows of one shard, users in increasing order."""
        for name, rows in splits.items():
            path = self.partial / name / f"part-{shard:05d}-of-{num_shards:05d}.parquet"
            write_part(path, rows)
            self.rows[name] = self.rows.get(name, 0) + len(rows)

    def transform(self, change: Callable[[datasets.Dataset], datasets.Dataset]) -> None:
        """Writes every part anew, as `change` makes it from its rows. Parts that an earlier writer has changed are
        not changed again.
        """
        for path in sorted(self.partial.glob("*/part-*.parquet")):
            target = self.changed / path.relative_to(self.partial)
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole(target) as partial:
                write_part(partial, change(read_part(path)))
            path.unlink()  # what is left is what remains to be changed
        shutil.rmtree(self.partial, ignore_errors=True)

    def finish(self) -> None:
        """Puts the splits in their place; nothing is done where an earlier writer has come so far."""
        partial = self.changed if self.changed.is_dir() else self.partial
        if partial.is_dir():
            contract = {"version": VERSION, "rows": self.rows}
            (partial / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
            shutil.rmtree(self.folder / SPLITS, ignore_errors=True)
            partial.rename(self.folder / SPLITS)


def with_users(rows: datasets.Dataset, users: np.ndarray) -> datasets.Dataset:
    """
    Rows of a shard as a data folder has them, with `length`, that of the history.

    Args:
        users (`np.ndarray` of shape (U of the shard,), int64): The number in the whole log of each of its users.
    """
    table = rows.with_format("arrow")[:]
    own = pa.array(users[table["user"].to_numpy()], pa.int32())
    lengths = pc.cast(pc.list_value_length(table["history"]), pa.int64())
    return arrow_dataset(table.set_column(0, "user", own).append_column("length", lengths))


def write_part(path: Path, rows: datasets.Dataset) -> None:
    """
    Writes rows as one parquet file, in groups of 4096 rows, zstd-compressed. A stop in between leaves a broken file.

    Args:
        path: The file; its folders are made, and a file of that name is replaced.
        rows (`datasets.Dataset`): Of a part of a split: `user`, `history`, ... as docs/large_data.md says. Nothing is
            checked here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    table = rows.with_format("arrow")[:]
    pyarrow.parquet.write_table(table, path, row_group_size=ROWS_PER_GROUP, compression="zstd")


def read_part(path: Path) -> datasets.Dataset:
    """
    The rows of one parquet file, in memory.

    Args:
        path: As [`write_part`] writes it, or a warehouse.

    Raises:
        FileNotFoundError: There is no such file. `pyarrow.ArrowInvalid`: It is cut off.
    """
    return arrow_dataset(pyarrow.parquet.read_table(path))


def split_parts(folder: str | os.PathLike) -> dict[str, list[Path]]:
    """
    The files of every split of a data folder, in the order of their names; without those that have no rows, as a
    warehouse leaves them, unless none has any.

    Raises:
        FileNotFoundError: The folder has no splits, or a part is missing.
        ValueError: Splits of a version that this package does not know, or parts with different columns.
    """
    splits = Path(folder) / SPLITS
    advice = f"Make it with `onerec prepare --source LOG --output {folder}`, or name the one that you made."
    if not splits.is_dir():
        raise FileNotFoundError(f"{folder} is no data folder: {splits} is not there. {advice}")
    if (splits / "dataset_dict.json").is_file():
        raise ValueError(
            f"{splits} was written by an earlier version, in one file per split, which can be read but not streamed: "
            "prepare the data again, or leave streaming out."
        )
    if not (splits / CONTRACT).is_file():
        raise FileNotFoundError(
            f"{splits} has no {CONTRACT}: the run that made it was stopped, or files were moved. {advice}"
        )
    contract = json.loads((splits / CONTRACT).read_text(encoding="utf-8"))
    if contract.get("version") != VERSION:
        raise ValueError(
            f"{splits / CONTRACT} has version {contract.get('version')!r}, this package reads {VERSION}: prepare the "
            "data again, or install the package that made them."
        )
    parts = {each.name: sorted(each.glob("part-*.parquet")) for each in sorted(splits.iterdir()) if each.is_dir()}
    parts = {name: parts.pop(name) for name in ("train", "validation", "test") if name in parts} | parts
    for name, files in parts.items():
        counts = _check_parts(splits / name, files, contract.get("rows", {}).get(name))
        parts[name] = [file for file, count in zip(files, counts) if count] or files[:1]
    if absent := [name for name in contract.get("rows", {}) if name not in parts]:
        raise FileNotFoundError(f"{splits} has no {absent}, which its {CONTRACT} names: files were moved. {advice}")
    return parts


def _check_parts(folder: Path, files: list[Path], rows: int | None) -> list[int]:
    """The rows of each file."""
    try:
        found = [pyarrow.parquet.read_metadata(file) for file in files]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{folder} cannot be read ({error}): a file is cut off. Prepare the data again.") from error
    count = sum(each.num_rows for each in found)
    if rows is not None and count != rows:
        raise FileNotFoundError(
            f"{folder} has {count} rows in {len(files)} files, its {CONTRACT} says {rows}: files were moved, or are "
            "of another run. Prepare the data again."
        )
    schemas = [each.schema.to_arrow_schema() for each in found]
    for file, schema in zip(files, schemas):
        if not schema.equals(schemas[0]):
            raise ValueError(
                f"{file} has the columns {dict(zip(schema.names, map(str, schema.types)))}, {files[0]} has "
                f"{dict(zip(schemas[0].names, map(str, schemas[0].types)))}: files of one split need the same ones."
            )
    kinds = dict(zip(schemas[0].names, schemas[0].types)) if schemas else {}
    lists = [kinds.get("history"), *(kinds[name] for name in ("targets",) if name in kinds)]
    if kinds and not (pa.types.is_integer(kinds.get("user", pa.null())) and all(map(_is_list_of_integers, lists))):
        raise ValueError(
            f"{folder} has the columns { {name: str(kind) for name, kind in kinds.items()} }: `user` is an integer, "
            "`history` and `targets` are lists of integers, as docs/large_data.md says."
        )
    return [each.num_rows for each in found]


def _is_list_of_integers(kind: pa.DataType | None) -> bool:
    return kind is not None and pa.types.is_list(kind) and pa.types.is_integer(kind.value_type)


def load_splits(folder: str | os.PathLike, names: Sequence[str] | None = None) -> datasets.DatasetDict:
    """The splits of a data folder, in memory; [`stream_split`] reads those that do not fit. Folders of
    `DatasetDict.save_to_disk`, which earlier versions wrote, are read, too. Nothing is written into the folder, so
    that it may be read-only or shared by several runs.

    Args:
        names: Of the splits to read; default all.

    Raises:
        As [`split_parts`].
    """
    path = Path(folder) / SPLITS
    if (path / "dataset_dict.json").is_file():
        saved: Any = datasets.load_from_disk(str(path))
        # a table that names no file has no folder for caches either
        return datasets.DatasetDict(
            {name: arrow_dataset(saved[name].data.table) for name in saved if names is None or name in names}
        )
    return datasets.DatasetDict(
        {
            name: arrow_dataset(pa.concat_tables(pyarrow.parquet.ParquetFile(file).read() for file in files))
            for name, files in split_parts(folder).items()
            if files and (names is None or name in names)
        }
    )
