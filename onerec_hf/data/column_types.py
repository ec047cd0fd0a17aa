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


def common_schema(files: Sequence[tuple[Any, pa.Schema, int]], ids: Iterable[str]) -> pa.Schema:
    """
    The columns of several files of one table, each with a type that keeps what every file says.

    Args:
        files: Of each file its name, its schema and its number of rows. The types of files without rows, and those of
            columns without values, do not count.
        ids: Columns of ids: text if they are text in any file, otherwise int64 where the types differ.

    Returns:
        `pa.Schema`: That of the first file where all files have the same one.

    Raises:
        ValueError: Files with other columns than the first one, a column named twice in a file, or types of a column
            that have nothing in common.
    """
    schemas = [(name, _without_index(schema, [each for _, each, _ in files])) for name, schema, _ in files]
    first_name, first = schemas[0]
    for name, schema in schemas:
        if repeated := sorted({each for each in schema.names if schema.names.count(each) > 1}):
            raise ValueError(f"{name} has more than one column named {repeated}; rename all but one")
        if set(schema.names) != set(first.names):
            raise ValueError(
                f"{name} has the columns {schema.names}, {first_name} has {first.names}: files of one log need the "
                "same ones"
            )
    if all(schema.equals(first) for _, schema in schemas):
        return first
    # a file without rows says nothing of types: pandas writes text as null there
    filled = [own for own, (_, _, rows) in zip(schemas, files) if rows] or schemas
    ids = set(ids)
    fields = []
    for name in first.names:
        kinds: dict[pa.DataType, Any] = {}
        for where, schema in filled:
            if not pa.types.is_null(kind := schema.field(name).type):
                kinds.setdefault(kind, where)
        fields.append(pa.field(name, _common_type(name, kinds, name in ids)))
    return pa.schema(fields)


def with_schema(table: pa.Table, schema: pa.Schema, ids: Iterable[str], where: Any) -> pa.Table:
    """
    The columns of a file in the types of [`common_schema`].

    Args:
        where: Name of the file, for messages.

    Raises:
        ValueError: Values that the type cannot hold, such as ids that are fractions beside integers.
        TypeError: Ids that are neither numbers nor text beside others.
    """
    ids = set(ids)
    columns = []
    for field in schema:
        column, label = table[field.name], f"{field.name} of {where}"
        if column.type == field.type:
            pass
        elif pa.types.is_null(column.type):
            column = column.cast(field.type)
        elif field.name not in ids:
            column = _cast(plain(column), field.type, label)
        elif is_text(_value_type(column.type)):
            column = plain(column).cast(field.type)
        else:  # a float as text is not the integer as text: 1e+13
            column = id_array(column, label).cast(field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=schema)


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
    try:
        schemas = [pa.schema([(name, kind)]) for kind in values]
        return pa.unify_schemas(schemas, promote_options="permissive").field(name).type
    except pa.ArrowException as error:
        found = ", ".join(f"{kind} in {where}" for kind, where in kinds.items())
        raise ValueError(f"{name} is {found}: write the column with one type in all files") from error


def _cast(array: pa.Array, kind: pa.DataType, label: str) -> pa.Array:
    try:
        return array.cast(kind)
    except pa.ArrowException as error:
        raise ValueError(
            f"{label} ({array.type}) cannot become {kind}, the type that fits the other files ({error}); write the "
            "column with one type in all files"
        ) from error
