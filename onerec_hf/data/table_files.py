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

COMPRESSED = (".gz", ".bz2")  # Arrow unpacks these by itself
# what Arrow takes for a missing value in a CSV column of numbers
_CSV_NULLS = pa.array(pyarrow.csv.ConvertOptions().null_values)


def read_files(source: str | Path, split: str, ids: Sequence[str]) -> pa.Table:
    """A file, a folder, the files of a pattern such as `logs/*.parquet`, or a data set of the Hub; see
    [`load_interactions`].
    """
    path = Path(source)
    if glob.has_magic(str(source)) and not path.exists():
        return _read_pattern(str(source), split, ids)
    if path.is_dir():
        return _read_folder(path, split)
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


def parquet_files(source: str | Path) -> list[Path]:
    """The files of a source that is parquet and nothing else, in the order in which [`read_files`] reads them; empty
    for any other source.
    """
    path = Path(source)
    if glob.has_magic(str(source)) and not path.exists():
        paths = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    elif path.is_dir():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        # as Arrow does, without what is hidden
        paths = [] if saved else sorted(each for each in path.rglob("*.parquet") if each.name[0] not in "._")
    else:
        paths = [path]
    return paths if all(each.suffix == ".parquet" and each.is_file() for each in paths) else []


def _read_pattern(pattern: str, split: str, ids: Sequence[str]) -> pa.Table:
    """The files of a pattern, in the order of their names, one below the other."""
    paths = sorted(glob.glob(pattern, recursive=True))
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern}")
    parts = [read_files(Path(path), split, ids) for path in paths]
    for path, part in zip(paths, parts):
        if set(part.column_names) != set(parts[0].column_names):
            raise ValueError(
                f"{path} has the columns {part.column_names}, {paths[0]} has {parts[0].column_names}: files of one "
                "log need the same ones"
            )
    for name in ids:  # where one file has text, all have it
        if len({part.schema.field(name).type for part in parts if name in part.column_names}) > 1:
            parts = [
                part.set_column(part.column_names.index(name), name, part[name].cast(pa.large_string()))
                for part in parts
            ]
    return pa.concat_tables(parts, promote_options="permissive")


def _read_folder(path: Path, split: str) -> pa.Table:
    if (path / "dataset_dict.json").is_file():
        saved = datasets.load_from_disk(str(path))
        if split not in saved:
            raise ValueError(f"{path} has no split {split!r}; it has {list(saved)}")
        return saved[split].with_format("arrow")[:]
    if (path / "state.json").is_file():
        return datasets.load_from_disk(str(path)).with_format("arrow")[:]
    if next(path.rglob("*.parquet"), None) is None:
        raise ValueError(
            f"{path} holds no parquet file and is no folder of datasets.save_to_disk; name the file itself"
        )
    return pyarrow.parquet.read_table(path)


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
