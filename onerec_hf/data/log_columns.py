"""The columns of a log under our names, checked and converted: the whole log at once, or batch by batch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers.utils import logging

from .column_types import id_array, is_text, plain
from .tables import feature_values, one_kind, parse_iso, read_table, select_columns, time_array, value_array

logger = logging.get_logger(__name__)

# columns that the rows of splits, sessions, pathways and exposures have of their own
RESERVED_FEEDBACK = (
    *("user_id", "item_id", "user", "history", "targets", "timestamp", "length", "session_start"),
    *("lifelong", "advantage", "play_time", "log_probs"),
)
RESERVED_PREFIXES = ("target_", "lifelong_")
TABLE_IDS = {"items": "item_id", "users": "user_id"}


def check_feedback_names(names: Iterable[str]) -> None:
    """Raises a ValueError for names that rows of splits have for something else."""
    if reserved := sorted(name for name in names if name in RESERVED_FEEDBACK or name.startswith(RESERVED_PREFIXES)):
        raise ValueError(
            f"feedback may not be named {reserved}: rows of splits have columns of these names; choose another name "
            f"and map it to the column, such as columns={{'my_{reserved[0]}': {reserved[0]!r}}}"
        )


class LogColumns:
    """
    Takes the tables of one log, one after the other, and says at the end what was wrong with all of them.

    Args:
        columns, feedback, drop_nulls: As of [`load_interactions`].
        drop_unknown, split: As well.
    """

    def __init__(
        self,
        columns: Mapping[str, str | None] | None,
        feedback: Sequence[str],
        *,
        split: str = "train",
        drop_nulls: bool = False,
        drop_unknown: bool = False,
    ):
        check_feedback_names(feedback)
        names: dict[str, str | None] = {name: name for name in ("user_id", "item_id", "timestamp", *feedback)}
        if unused := sorted(set(columns or {}) - set(names)):
            raise ValueError(
                f"columns names {unused}; allowed are {list(names)} (add event features to feedback=[...])"
            )
        names |= columns or {}
        if unnamed := [name for name, column in names.items() if column is None and name != "timestamp"]:
            raise ValueError(f"columns maps {unnamed} to None; only the timestamp may be left out")
        self.names, self.feedback, self.split = names, tuple(feedback), split
        self.drop_nulls, self.drop_unknown = drop_nulls, drop_unknown
        self.has_time, self.units = names["timestamp"] is not None, 1
        self.ids = [str(column) for name, column in names.items() if name.endswith("_id")]  # columns of the source
        self.asked = [column for column in names.values() if column is not None]
        self.tables: dict[str, dict[str, pa.Array]] = {}
        self.warnings: list[str] = []  # what was said of the log so far
        self.rows = self._known_rows = self._null_rows = 0
        self._nulls: dict[str, int] = {}
        self._first_null: int | None = None
        self._unknown = {name: _Unknown() for name in TABLE_IDS}
        self._time_type: pa.DataType | None = None

    def read_tables(self, **sources: tuple[Any, Mapping[str, str] | None]) -> None:
        """Reads the tables about items and users, each given as its source and its `..._columns`."""
        for name, (source, columns) in sources.items():
            if source is not None:
                id_name = TABLE_IDS[name]
                renamed = {id_name: str(self.names[id_name])} | dict(columns or {})
                self.tables[name], hidden = _feature_table(source, name, id_name, renamed, self.split)
                if hidden:
                    self._warn(
                        f"{name}: left out its own columns {hidden}, because other columns are mapped to these names: "
                        f"{renamed}; to keep one, map a new name to it in {name}_columns"
                    )

    def convert(self, table: pa.Table) -> pa.Table:
        """
        The columns under our names: ids as int64 or large_string, times as numbers in their full precision, feedback
        in the type of the source. Rows with nulls or unknown ids are left out, and counted for [`check`].
        """
        log = select_columns(table, {k: v for k, v in self.names.items() if v is not None}, "columns")
        for i, name in enumerate(("user_id", "item_id")):
            log = log.set_column(i, name, id_array(log[name], name))
        log = self._without_nulls(log)
        for name in self.tables:
            log = self._known_only(log, name)
        if self.has_time:
            i = log.column_names.index("timestamp")
            log = log.set_column(i, "timestamp", self._times(plain(log["timestamp"])))
        for name in self.feedback:
            log = log.set_column(log.column_names.index(name), name, value_array(log[name], name))
        return log

    def check(self) -> None:
        """
        Says what was left out.

        Raises:
            ValueError: Nulls or unknown ids that were not to be dropped, or no row left.
            TypeError: Ids of a log and of a table that have nothing in common, being numbers here and text there.
        """
        if self._nulls and not self.drop_nulls:
            raise ValueError(
                f"null (empty), NaN or infinite values per column: {self._nulls}, of {self.rows} rows, the first one "
                f"in row {self._first_null}; fill them in, or pass drop_nulls=True to leave these rows out"
            )
        if self._nulls:
            self._warn(
                f"dropped {self._null_rows} of {self.rows} rows with null, NaN or infinite values; per column: "
                f"{self._nulls}"
            )
            if self._null_rows == self.rows:
                raise ValueError(f"no rows are left without null, NaN or infinite values; per column: {self._nulls}")
        for name, unknown in self._unknown.items():
            if unknown.rows:
                self._warn(unknown.check(name, self.drop_unknown))

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        logger.warning(message)

    def features(self, name: str) -> dict[str, np.ndarray | list]:
        """The columns of a table but its ids, as [`Interactions`] has them."""
        table = self.tables.get(name, {})
        return {key: feature_values(column) for key, column in table.items() if key != TABLE_IDS[name]}

    def _without_nulls(self, log: pa.Table) -> pa.Table:
        masks = []
        for name in log.column_names:
            mask = pc.is_null(log[name], nan_is_null=True)
            if pa.types.is_floating(log[name].type):
                mask = pc.or_(mask, pc.fill_null(pc.is_inf(log[name]), False))
            if count := pc.sum(mask).as_py():
                masks.append(mask.to_numpy())
                self._nulls[name] = self._nulls.get(name, 0) + count
        self.rows += log.num_rows
        if not masks:
            return log
        keep = ~np.logical_or.reduce(masks)
        if self._first_null is None:
            self._first_null = self.rows - log.num_rows + int(keep.argmin()) + 1
        self._null_rows += int((~keep).sum())
        return log.filter(pa.array(keep))

    def _known_only(self, log: pa.Table, name: str) -> pa.Table:
        """Events whose id the joined table has. Both get ids of one type."""
        id_name, table, unknown = TABLE_IDS[name], self.tables[name], self._unknown[name]
        own = log[id_name].combine_chunks()
        unknown.types = (
            unknown.types or (own[0].as_py(), own.type, table[id_name][0].as_py(), table[id_name].type)
            if len(own)
            else unknown.types
        )
        ids, table[id_name] = one_kind(own, table[id_name])
        log = log.set_column(log.column_names.index(id_name), id_name, ids)
        known = pc.is_in(ids, value_set=table[id_name])
        unknown.events += len(ids)
        if missing := len(ids) - known.true_count:
            unknown.rows += missing
            unknown.ids = pc.unique(pa.chunked_array([unknown.ids.cast(ids.type), ids.filter(pc.invert(known))]))
            log = log.filter(known)
        return log

    def _times(self, array: pa.Array) -> pa.Array:
        """Numbers as they are; dates and ISO text counted from 1970, in units of which `self.units` are a
        millisecond.
        """
        if is_text(array.type):
            array = parse_iso(array, "timestamp")
            self._time_type = self._time_type or array.type
            if array.type != self._time_type:
                raise ValueError(
                    f"timestamp holds strings that are {self._time_type} in some rows and {array.type} in others: "
                    "convert the column to timestamps of one unit and one zone"
                )
        values, self.units = time_array(array)
        return values


class _Unknown:
    """Events of items, or users, that a table does not have."""

    def __init__(self):
        self.rows = self.events = 0
        self.ids: pa.Array = pa.array([], pa.large_string())
        self.types: tuple | None = None

    def check(self, name: str, drop: bool) -> str:
        """What was dropped, or an error."""
        id_name = TABLE_IDS[name]
        one, kind, other, other_kind = self.types or (None,) * 4
        if self.rows == self.events and kind != other_kind:
            raise TypeError(
                f"{id_name} is {kind} in the log, such as {one!r}, and {other_kind} in {name}, such as {other!r}, and "
                "no id is in both; use one type and one spelling"
            )
        found = f"{self.rows} of {self.events} events have one of {len(self.ids)} {id_name} values that {name} lacks"
        if not drop or self.rows == self.events:
            raise ValueError(
                f"{found}, such as {self.ids[:5].to_pylist()}; add them to {name}, or pass drop_unknown=True to leave "
                "these events out"
            )
        return f"dropped events: {found}"


def _feature_table(
    source: Any, table_name: str, id_name: str, renamed: Mapping[str, str], split: str
) -> tuple[dict[str, pa.Array], list[str]]:
    """The columns under our names, and those of the table that other columns have taken the names of."""
    table = read_table(source, split, ids=[renamed[id_name]])
    rest = [name for name in table.column_names if name not in renamed.values()]
    hidden = [name for name in rest if name in renamed]
    names = dict(renamed) | {name: name for name in rest if name not in renamed}
    columns = dict(zip(names, select_columns(table, names, f"{table_name}_columns").columns))
    columns[id_name] = ids = id_array(columns[id_name], f"{id_name} of {table_name}")
    if nulls := ids.null_count:
        raise ValueError(f"{table_name}: {nulls} of {len(ids)} values of {id_name} are null; remove these rows")
    if repeats := len(ids) - pc.count_distinct(ids).as_py():
        raise ValueError(
            f"{table_name}: {repeats} of {len(ids)} rows repeat an earlier {id_name}; keep one row per id"
        )
    return columns, hidden
