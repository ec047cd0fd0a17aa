"""What the columns of tables hold: ids as integers or text, and one type for a column that several files have."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

# what pandas writes of row numbers; of the frames of one log, some have it and some do not
_PANDAS_INDEX = re.compile(r"__index_level_\d+__")


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is a string, of any kind."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def plain(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """One array without a dictionary."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def integers_of(text: pa.Array) -> pa.Array:
    """Text as int64 if every value is the way to write an integer (`7`, not `007`, `7.0` or `+7`); otherwise as it
    is.
    """
    if not pc.all(pc.match_substring_regex(text, r"^(0|-?[1-9][0-9]*)$")).as_py():
        return text
    try:
        return text.cast(pa.int64())
    except pa.ArrowInvalid:  # beyond 64 bits
        return text


def without_blanks(text: pa.Array) -> pa.Array:
    """Text with null where it is blank."""
    return pc.if_else(pc.equal(pc.utf8_trim_whitespace(text), ""), pa.scalar(None, text.type), text)


def id_array(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """Ids as one int64 or large_string array.

    Integers of any type, whole decimals and whole floats up to 2^53 (pandas' integers with gaps; above, neighbours are
    one float) become int64. NaN and blank text become null.

    Raises:
        ValueError: numbers that are not whole or do not fit.
        TypeError: neither numbers nor text.
    """
    array = plain(column)
    if pa.types.is_null(array.type):
        return array.cast(pa.large_string())
    if is_text(array.type):
        return without_blanks(array.cast(pa.large_string()))
    if pa.types.is_floating(array.type):
        array = array.cast(pa.float64())
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        bad = pc.or_(pc.not_equal(pc.floor(array), array), pc.greater(pc.abs(array), 2.0**53))
        if (lost := array.filter(bad)).is_valid().true_count:
            raise ValueError(
                f"{name} ({column.type}) cannot become int64: {lost[0]} is no whole number up to 2^53; pass the ids "
                "as text"
            )
    elif not (pa.types.is_integer(array.type) or pa.types.is_decimal(array.type)):
        raise TypeError(f"{name} must hold integers or strings, got {array.type}")
    try:
        return array.cast(pa.int64())
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{name} ({array.type}) cannot become int64: not whole, or beyond 64 bits ({error}); pass the ids as text"
        ) from error


def common_schema(
    files: Sequence[tuple[Any, pa.Schema, int]], ids: Iterable[str], columns: Iterable[str] | None = None
) -> pa.Schema:
    """
    The columns of several files of one table, each with a type that keeps what every file says.

    Args:
        files: Of each file its name, its schema and its number of rows. The types of files without rows, and those of
            columns without values, do not count.
        ids: Columns of ids: text if they are text in any file, otherwise int64 where the types differ.
        columns: What is asked for. Others never fail: without a common type they are left out. By default all columns
            are asked for, but only those of `ids` have to be in every file.

    Returns:
        `pa.Schema`: That of the first file where all files have the same one. Columns that only some files have are
        among them.

    Raises:
        ValueError: A file without a column that is asked for, while others have it; a column named twice in a file;
            types of a column that have nothing in common.
    """
    schemas = [(name, _without_index(schema, [each for _, each, _ in files])) for name, schema, _ in files]
    first = schemas[0][1]
    for name, schema in schemas:
        if repeated := sorted({each for each in schema.names if schema.names.count(each) > 1}):
            raise ValueError(f"{name} has more than one column named {repeated}; rename all but one")
    if all(schema.equals(first) for _, schema in schemas):
        return first
    # a file without rows says nothing of types: pandas writes text as null there
    filled = [own for own, (_, _, rows) in zip(schemas, files) if rows] or schemas
    ids, asked = set(ids), None if columns is None else set(columns)
    fields = []
    for name in dict.fromkeys(each for _, schema in schemas for each in schema.names):
        if name in (ids if asked is None else asked | ids):
            _check_in_all(name, schemas, filled)
        kinds: dict[pa.DataType, Any] = {}
        for where, schema in filled:
            if name in schema.names and not pa.types.is_null(kind := schema.field(name).type):
                kinds.setdefault(kind, where)
        try:
            fields.append(pa.field(name, _common_type(name, kinds, name in ids)))
        except ValueError:
            if asked is None or name in asked:
                raise
    return pa.schema(fields)


def with_schema(
    table: pa.Table, schema: pa.Schema, ids: Iterable[str], where: Any, columns: Iterable[str] | None = None
) -> pa.Table:
    """
    The columns of a file in the types of [`common_schema`]; null where the file lacks one.

    Args:
        where: Name of the file, for messages.
        columns: What is asked for, by default all. Other columns become null where their type cannot hold them.

    Raises:
        ValueError: Values that the type cannot hold, such as ids that are fractions beside integers.
        TypeError: Ids that are neither numbers nor text beside others.
    """
    ids, asked = set(ids), None if columns is None else set(columns)
    parts = []
    for field in schema:
        if field.name not in table.column_names:
            parts.append(pa.nulls(len(table), field.type))
            continue
        try:
            parts.append(_with_type(table[field.name], field, field.name in ids, where))
        except (ValueError, TypeError):
            if asked is None or field.name in asked:
                raise
            parts.append(pa.nulls(len(table), field.type))
    return pa.Table.from_arrays(parts, schema=schema)


def _with_type(column: pa.ChunkedArray, field: pa.Field, is_id: bool, where: Any) -> pa.ChunkedArray | pa.Array:
    label = f"{field.name} of {where}"
    if column.type == field.type:
        return column
    if pa.types.is_null(column.type):
        return pa.nulls(len(column), field.type)
    if not is_id:
        return _cast(plain(column), field.type, label)
    if is_text(_value_type(column.type)):
        return plain(column).cast(field.type)
    return id_array(column, label).cast(field.type)  # a float as text is not the integer as text: 1e+13


def _check_in_all(
    name: str, schemas: Sequence[tuple[Any, pa.Schema]], filled: Sequence[tuple[Any, pa.Schema]]
) -> None:
    """Raises a ValueError where a file with rows lacks a column that another file has."""
    having = next(where for where, schema in schemas if name in schema.names)
    for where, schema in filled:
        if name not in schema.names:
            raise ValueError(
                f"{where} has the columns {schema.names}, but no {name!r}, which {having} has: files of one log need "
                "the same ones"
            )


def _without_index(schema: pa.Schema, others: Sequence[pa.Schema]) -> pa.Schema:
    """The schema but for row numbers of pandas that not every file has."""
    for name in filter(_PANDAS_INDEX.fullmatch, schema.names):
        if not all(name in other.names for other in others):
            schema = schema.remove(schema.get_field_index(name))
    return schema


def _value_type(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _common_type(name: str, kinds: dict[pa.DataType, Any], is_id: bool) -> pa.DataType:
    """One type for a column; `kinds` has the file of each type, for the message."""
    if len(kinds) < 2:
        return next(iter(kinds), pa.null())
    values = {_value_type(kind) for kind in kinds}
    if is_id:
        return pa.large_string() if any(map(is_text, values)) else pa.int64()
    if all(map(is_text, values)):
        return pa.large_string()
    if all(pa.types.is_date(kind) or pa.types.is_timestamp(kind) for kind in values):
        return _common_time(values)
    if any(map(_is_number, values)):  # false and true are 0 and 1 beside numbers
        values = {kind for kind in values if not pa.types.is_boolean(kind)}
    try:
        schemas = [pa.schema([(name, kind)]) for kind in values]
        return pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except pa.ArrowException as error:
        found = ", ".join(f"{kind} in {where}" for kind, where in kinds.items())
        raise ValueError(f"{name} is {found}: write the column with one type in all files") from error


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _common_time(kinds: Iterable[pa.DataType]) -> pa.DataType:
    """Dates and times as times of the finest unit, milliseconds for dates alone; no zone is UTC beside others."""
    times = [kind for kind in kinds if pa.types.is_timestamp(kind)]
    zones = {kind.tz for kind in times}
    unit = max((kind.unit for kind in times), key=("s", "ms", "us", "ns").index, default="ms")
    return pa.timestamp(unit, "UTC" if len(zones) > 1 else next(iter(zones), None))


def _cast(array: pa.Array, kind: pa.DataType, label: str) -> pa.Array:
    try:
        if pa.types.is_date(array.type) and pa.types.is_timestamp(kind):  # Arrow has no way to a zone
            array = array.cast(pa.timestamp(kind.unit))
        return array.cast(kind)
    except pa.ArrowException as error:
        raise ValueError(
            f"{label} ({array.type}) cannot become {kind}, the type that fits the other files ({error}); write the "
            "column with one type in all files"
        ) from error
