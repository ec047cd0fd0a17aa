"""A log that is larger than memory, as shards on disk: DuckDB reads it once, indexes it and cuts it by users.

Only what has a row per user or item is held in memory, and one shard at a time. DuckDB keeps to its memory limit by
spilling into the working folder.
"""

import hashlib
import itertools
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.feather
import pyarrow.parquet
from transformers.utils import logging

from .column_types import is_text
from .event_shards import FEEDBACK, EventShards, whole, write_shard
from .interactions import load_interactions, report_ties, sort_events
from .log_columns import TABLE_IDS, LogColumns
from .parquet_files import ParquetFiles, check_ids_of_dataset, find_parquet
from .tables import numpy_values, read_table

logger = logging.get_logger(__name__)

SHARD_EVENTS = 2_000_000  # of a shard: about 200 MB while it is worked on
BATCH_ROWS = 500_000
MEMORY_LIMIT = "700MB"  # of DuckDB
CUT = "cut.json"  # written last: all files of the cut are there
TIES = b"ties"  # in the metadata of a sorted shard


def shard_of(user_id: int | str, num_shards: int) -> int:
    """
    The shard of a user: the first 32 bits of the MD5 of the id as text, modulo the number of shards. Every warehouse
    has this function; it does not depend on the other users, so a user stays where he is from day to day.
    """
    return int(hashlib.md5(str(user_id).encode(), usedforsecurity=False).hexdigest()[:8], 16) % num_shards


# the same in DuckDB
SHARD_SQL = "CAST('0x' || substr(md5(CAST(users.id AS VARCHAR)), 1, 8) AS BIGINT) % {num_shards}"


def load_shards(
    source: Any,
    folder: str | os.PathLike,
    *,
    num_shards: int | None = None,
    columns: Mapping[str, str | None] | None = None,
    feedback: Sequence[str] = (),
    items: Any = None,
    items_columns: Mapping[str, str] | None = None,
    users: Any = None,
    users_columns: Mapping[str, str] | None = None,
    split: str = "train",
    drop_nulls: bool = False,
    drop_duplicates: bool = False,
    drop_unknown: bool = False,
    resume: bool = False,
) -> EventShards:
    """
    Reads a log as [`load_interactions`] does, whatever its size.

    Parquet (a file, a folder, a pattern, a `pyarrow.dataset.Dataset`) is read in batches. Other sources are read in
    one piece: turn a CSV file that does not fit into memory into parquet first, as docs/large_data.md shows.

    Args:
        source: The log, one row per event, of any kind that [`load_interactions`] takes.
        folder: Where shards and DuckDB's own files go; made, and to be deleted by the caller.
        num_shards: By default one per 2 million events. A log of one shard is kept in memory and nothing is written.
        columns: Our name -> column of the source; a name that is left out is itself the column.
        feedback: Event features to carry, by our name.
        items, users: Tables of item and user features, held in memory. The rows of `items` become the item indices.
        items_columns, users_columns: As `columns`, for these tables.
        split: Of a Hub data set or of a saved `DatasetDict`.
        drop_nulls, drop_duplicates, drop_unknown: Drop events with null, NaN or infinite values; repeats of equal
            events; events of items or users that the tables do not have. Else nulls and unknown ones are errors, and
            repeats are kept.
        resume: Go on with the shards in `folder` of an earlier call with the same arguments and the same log, both of
            which are not checked. Once the log is cut, it is not read again, and sorted shards are not sorted again.

    Returns:
        [`EventShards`]: the users are cut into shards by a hash of their id, events sorted by user and time.

    Raises:
        ValueError: `num_shards` below 1, and as [`load_interactions`]. TypeError, FileNotFoundError: As
            [`load_interactions`].
    """
    settings: dict[str, Any] = {"columns": columns, "feedback": feedback, "split": split}
    settings |= {"drop_nulls": drop_nulls, "drop_unknown": drop_unknown}
    log_columns = LogColumns(**settings)
    if num_shards is not None and num_shards < 1:
        raise ValueError(f"num_shards={num_shards}: at least 1, or leave it out for one per {SHARD_EVENTS:,} events.")
    work = Path(folder)
    if resume and (work / CUT).is_file():
        return _sorted_shards(work, log_columns, drop_duplicates)
    log = _open(source, log_columns.ids, split, log_columns.asked)
    count = log.count_rows() if isinstance(log, pyarrow.dataset.Dataset) else log.num_rows
    num_shards = num_shards or max(1, math.ceil(count / SHARD_EVENTS))
    if num_shards == 1 or not count:
        tables: dict[str, Any] = {
            "items": items,
            "items_columns": items_columns,
            "users": users,
            "users_columns": users_columns,
        }
        # a file by its name: messages name it
        whole = log if isinstance(log, pa.Table) else source
        return EventShards.of(load_interactions(whole, **settings, **tables, drop_duplicates=drop_duplicates))
    log_columns.read_tables(items=(items, items_columns), users=(users, users_columns))
    work.mkdir(parents=True, exist_ok=True)
    _Cutting(log, count, log_columns, work, num_shards).run()
    return _sorted_shards(work, log_columns, drop_duplicates)


def _open(
    source: Any, ids: Sequence[str], split: str, columns: Sequence[str] | None = None
) -> pa.Table | pyarrow.dataset.Dataset | ParquetFiles:
    """Parquet as what is not read yet, everything else as a table."""
    if isinstance(source, pyarrow.dataset.Dataset):
        check_ids_of_dataset(source, ids)
        return source
    if isinstance(source, (str, Path)) and (files := find_parquet(source)):
        return ParquetFiles(source, files, ids, columns)
    return read_table(source, split, ids=ids, columns=columns)


class _Cutting:
    """One log on its way from the source to files that are cut by shards and not sorted yet."""

    def __init__(self, log, count: int, columns: LogColumns, work: Path, num_shards: int):
        import duckdb  # here: only logs of more than one shard need it

        self.log, self.count, self.columns, self.work, self.num_shards = log, count, columns, work, num_shards
        for earlier in (CUT, "log.duckdb", "log.duckdb.wal"):
            (work / earlier).unlink(missing_ok=True)
        for earlier in ("cut", "spilled"):
            shutil.rmtree(work / earlier, ignore_errors=True)
        for path in work.glob("events-*.parquet"):
            path.unlink()
        self.database = duckdb.connect(
            str(work / "log.duckdb"),
            config={
                "memory_limit": MEMORY_LIMIT,
                "threads": os.cpu_count() or 1,
                "temp_directory": str(work / "spilled"),
                "preserve_insertion_order": False,  # there is a column `row`
            },
        )

    def run(self) -> None:
        """Writes the files, what [`_sorted_shards`] needs beside them, and `cut.json` last."""
        try:
            self._read()
            user_ids, item_ids = self._index("user"), self._index("item")
            self._cut()
        finally:
            self.database.close()
            (self.work / "log.duckdb").unlink(missing_ok=True)
        tables = self.columns.tables
        if "users" in tables:
            rows = pc.index_in(user_ids, value_set=tables["users"]["user_id"])
            tables["users"] = {name: column.take(rows) for name, column in tables["users"].items()}
        for name, ids in (("users", user_ids), ("items", item_ids)):
            # one dictionary for all chunks, or Arrow refuses to write them
            table = pa.table(tables.get(name, {}) | {TABLE_IDS[name]: ids}).unify_dictionaries()
            pyarrow.feather.write_feather(table, self.work / f"{name}.arrow", compression="zstd")
        found = {"num_shards": self.num_shards, "units": self.columns.units, "warnings": self.columns.warnings}
        with whole(self.work / CUT) as path:
            path.write_text(json.dumps(found), encoding="utf-8")

    def _read(self) -> None:
        """The log, checked, as a table of DuckDB on disk."""
        errors: list[Exception] = []
        batches = self._batches(errors)
        first = next(batches, None)
        if first is not None:
            reader = pa.RecordBatchReader.from_batches(first.schema, itertools.chain([first], batches))
            self.database.register("source", reader)
            self.database.execute("CREATE TABLE log AS SELECT * FROM source")
        if errors:
            raise errors[0]
        self.columns.check()

    def _batches(self, errors: list[Exception]) -> Iterator[pa.RecordBatch]:
        """What [`LogColumns.convert`] makes; its errors end the batches, or DuckDB would raise others instead."""
        row = 0
        try:
            for table in self._source_batches():
                log = self.columns.convert(table)
                log = log.append_column("row", pa.array(np.arange(row, row + len(log))))
                # DuckDB knows no upper and lower case: columns that differ in it alone would be one
                feedback = {name: f"feedback_{i}" for i, name in enumerate(self.columns.feedback)}
                log = log.rename_columns([feedback.get(name, name) for name in log.column_names])
                row += len(log)
                yield from log.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], log.schema)]
        except Exception as error:
            errors.append(error)

    def _source_batches(self) -> Iterator[pa.Table]:
        names = set(self.columns.asked)
        parts: Iterator[pa.Table]
        with logging.tqdm(total=self.count, desc="reading the log", unit="event", unit_scale=True) as progress:
            if isinstance(self.log, pa.Table):
                parts = (self.log.slice(start, BATCH_ROWS) for start in range(0, self.count, BATCH_ROWS))
            else:
                known = [name for name in self.log.schema.names if name in names]
                if len(known) < len(names):  # no row, but all columns, of which the message has a list
                    parts = iter([self.log.schema.empty_table()])
                elif isinstance(self.log, ParquetFiles):
                    parts = self.log.batches(known, BATCH_ROWS)
                else:
                    batches = self.log.to_batches(columns=known, batch_size=BATCH_ROWS, batch_readahead=2)
                    parts = (pa.Table.from_batches([batch]) for batch in batches if len(batch))
            for part in parts:
                yield part
                progress.update(len(part))

    def _index(self, name: str) -> pa.Array:
        """Numbers the ids of users or items, in sorted order or in that of the items' table; returns them."""
        distinct = f"SELECT DISTINCT {name}_id AS id FROM log"
        if name == "item" and "items" in self.columns.tables:
            ids = self.columns.tables["items"]["item_id"]
            given = pa.table({"id": ids, "index": np.arange(len(ids))})
            self.database.register("given", given)
            self.database.execute("CREATE TABLE items AS SELECT * FROM given")
            return ids
        self.database.execute(
            f'CREATE TABLE {name}s AS SELECT id, row_number() OVER (ORDER BY id) - 1 AS "index" FROM ({distinct})'
        )
        found = self.database.sql(f'SELECT id FROM {name}s ORDER BY "index"').to_arrow_table()["id"]
        ids = found.combine_chunks()
        return ids.cast(pa.large_string()) if is_text(ids.type) else ids

    def _cut(self) -> None:
        """A folder of files per shard, in no order."""
        names = ["row", *(["timestamp"] if self.columns.has_time else [])]
        names += [f"feedback_{i}" for i in range(len(self.columns.feedback))]
        target = str(self.work / "cut").replace("'", "''")
        self.database.execute(f"""
            COPY (
                SELECT {SHARD_SQL.format(num_shards=self.num_shards)} AS shard, users."index" AS user,
                       items."index" AS item, {", ".join(f"log.{name}" for name in names)}
                FROM log JOIN users ON log.user_id = users.id JOIN items ON log.item_id = items.id
            ) TO '{target}' (FORMAT parquet, PARTITION_BY (shard))
        """)


def _sorted_shards(work: Path, columns: LogColumns, drop_duplicates: bool) -> EventShards:
    """Every shard sorted by user and time, equal events counted or dropped. Reads what [`_Cutting`] wrote, whether
    this run has cut the log or an earlier one.
    """
    cut = json.loads((work / CUT).read_text(encoding="utf-8"))
    for message in cut["warnings"]:
        if message not in columns.warnings:  # of an earlier run: nobody may have read them
            logger.warning(message)
    paths, ties = [], Counter[str]()
    for shard in logging.tqdm(range(cut["num_shards"]), desc="sorting", unit="shard"):
        folder, path = work / "cut" / f"shard={shard}", work / f"events-{shard:05d}.parquet"
        if not path.is_file():
            if not folder.is_dir():
                continue  # nobody of so few users
            write_shard(path, _sorted(folder, columns, cut["units"], drop_duplicates))
        shutil.rmtree(folder, ignore_errors=True)
        ties.update(json.loads(pyarrow.parquet.read_schema(path).metadata[TIES]))
        paths.append(path)
    report_ties(ties, drop_duplicates)
    columns.tables = {}
    for name in TABLE_IDS:
        table = pyarrow.feather.read_table(work / f"{name}.arrow", memory_map=False)
        columns.tables[name] = dict(zip(table.column_names, table.columns))
    user_ids, item_ids = (numpy_values(columns.tables[name][TABLE_IDS[name]]) for name in ("users", "items"))
    return EventShards(paths, user_ids, item_ids, columns.features("items"), columns.features("users"))


def _sorted(folder: Path, columns: LogColumns, units: int, drop_duplicates: bool) -> pa.Table:
    """One shard, and in its metadata what `sort_events` counted, as JSON."""
    # a data set of its own: the folder's name would become a column
    table = pa.concat_tables(pyarrow.parquet.ParquetFile(file).read() for file in sorted(folder.iterdir()))
    table = table.take(pa.array(np.argsort(table["row"].to_numpy())))
    user, item = table["user"].to_numpy(), table["item"].to_numpy()
    time = table["timestamp"].to_numpy() if columns.has_time else None
    feedback = {name: numpy_values(table[f"feedback_{i}"]) for i, name in enumerate(columns.feedback)}
    ties = Counter[str]()
    user, item, time, feedback = sort_events(user, item, time, feedback, drop_duplicates, ties)
    time = time // units if units > 1 else time
    values = {"user": user, "item": item, "timestamp": time}
    values |= {f"{FEEDBACK}{name}": column for name, column in feedback.items()}
    return pa.table(values, metadata={TIES: json.dumps(ties).encode()})
