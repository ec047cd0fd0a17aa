"""Files, folders, patterns of paths and Hub data sets as Arrow tables; ids keep their spelling."""

import glob
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from .column_types import common_schema, integers_of, with_schema, without_blanks
from .parquet_files import ParquetFiles, find_parquet, folder_files

COMPRESSED = (".gz", ".bz2")  # Arrow unpacks these by itself
# what Arrow takes for a missing value in a CSV column of numbers
_CSV_NULLS = pa.array(pyarrow.csv.ConvertOptions().null_values)


def read_files(source: str | Path, split: str, ids: Sequence[str], columns: Sequence[str] | None = None) -> pa.Table:
    """A file, a folder, the files of a pattern such as `logs/*.parquet`, or a data set of the Hub; see
    [`load_interactions`]. `columns` are those that are asked for, see [`common_schema`].
    """
    path = Path(source)
    if glob.has_magic(str(source)) and not path.exists():
        return _read_pattern(str(source), split, ids, columns)
    if path.is_dir():
        return _read_folder(path, split, ids, columns)
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if suffix in FILE_READERS:
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        try:
            return FILE_READERS[suffix](path, ids)
        except OSError as error:  # cut off, or not what its name says
            raise ValueError(f"cannot read {path}: {error}") from error
    if path.exists() or isinstance(source, Path):
        raise ValueError(
            f"cannot read {path}: pass a {', '.join(FILE_READERS)} file (.csv.gz and the like, too), a folder of "
            "parquet files or a folder that datasets.save_to_disk wrote"
        )
    try:
        return datasets.load_dataset(source, split=split).with_format("arrow")[:]
    except (FileNotFoundError, ConnectionError) as error:  # also of a data set that the Hub does not have
        raise FileNotFoundError(f"{source} is no file or folder here and no data set on the Hub: {error}") from error


def _read_pattern(pattern: str, split: str, ids: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    """The files of a pattern, in the order of their names, one below the other."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern}")
    if files := find_parquet(pattern):
        return ParquetFiles(pattern, files, ids, columns).read()
    parts = [read_files(Path(path), split, ids, columns) for path in paths]
    found = [(path, part.schema, part.num_rows) for path, part in zip(paths, parts)]
    schema = common_schema(found, ids, columns)
    return pa.concat_tables(with_schema(part, schema, ids, path, columns) for path, part in zip(paths, parts))


def _read_folder(path: Path, split: str, ids: Sequence[str], columns: Sequence[str] | None) -> pa.Table:
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}; it has {list(saved)}")
        return saved[split].with_format("arrow")[:]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path)).with_format("arrow")[:]
    files, tables = folder_files(path)
    if not files:
        raise ValueError(
            f"{path} holds no parquet file and is no folder of datasets.save_to_disk; name the file itself"
        )
    if tables:  # to leave them out could leave out a day of the log
        others = [str(file.relative_to(path)) for file in tables]
        raise ValueError(
            f"{path} holds files that are not named .parquet: {others[:5]}; move them elsewhere, or name the files "
            f"with a pattern, such as {path / '*.parquet'}"
        )
    return ParquetFiles(path, files, ids, columns).read()


def _read_csv(path: Path, ids: Sequence[str]) -> pa.Table:
    settings = {
        "parse_options": pyarrow.csv.ParseOptions(
            delimiter="\t" if ".tsv" in path.suffixes else ",", newlines_in_values=True
        ),
        "convert_options": pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(ids, pa.large_string())),
    }
    try:
        table = pyarrow.csv.read_csv(path, **settings)
    except pa.ArrowInvalid:  # once more on one thread: then Arrow knows the row
        table = pyarrow.csv.read_csv(path, pyarrow.csv.ReadOptions(use_threads=False), **settings)
    if binary := [field.name for field in table.schema if pa.types.is_binary(field.type)]:
        raise ValueError(f"{path}: the columns {binary} are not UTF-8; save the file as UTF-8")
    for i, name in enumerate(table.column_names):
        if name in ids:
            table = table.set_column(i, name, _csv_ids(table.column(i).combine_chunks()))
    return table


def _csv_ids(array: pa.Array) -> pa.Array:
    """Text as integers if it is integers but for what Arrow takes for null; otherwise text, with null where it is
    blank.
    """
    known = pc.if_else(pc.is_in(array, value_set=_CSV_NULLS.cast(array.type)), pa.scalar(None, array.type), array)
    integers = integers_of(known)
    return without_blanks(array) if integers is known else integers


def _read_json(path: Path, ids: Sequence[str]) -> pa.Table:
    # blocks larger than Arrow's 1 MiB: a line, with a long history in it, must fit into one
    try:
        return pyarrow.json.read_json(path, pyarrow.json.ReadOptions(block_size=1 << 26))
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"cannot read {path}: {error} (counted from 0). Each line must be one object, and a column of one type"
        ) from error


FILE_READERS = {
    ".parquet": lambda path, ids: pyarrow.parquet.read_table(path),
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".jsonl": _read_json,
    ".json": _read_json,
}
