"""The parquet files of a folder or of a pattern as one table, read in one piece or in batches."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pyarrow.parquet

from .column_types import common_schema, integers_of, is_text, with_schema

TABLE_SUFFIXES = (".parquet", ".parq", ".pq", ".csv", ".tsv", ".jsonl", ".ndjson", ".orc", ".feather", ".arrow")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def folder_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The parquet files below a folder, and other tables, which nobody reads there. What is hidden for Arrow and Spark
    (names that start with `.` or `_`) and what is no table, such as a README, is in neither.
    """
    names = [Path(name) for name in glob.glob("**/*", root_dir=folder, recursive=True)]
    shown = (folder / name for name in names if not any(part[0] in "._" for part in name.parts))
    found = sorted(path for path in shown if not path.is_dir())
    parquet = [path for path in found if path.suffix == ".parquet"]
    return parquet, [path for path in found if path.suffix != ".parquet" and _is_table(path)]


def _is_table(path: Path) -> bool:
    """By its name or by how it begins; `.json` is left to settings and manifests."""
    suffix = path.suffix.lower()
    if suffix in (".gz", ".bz2", ".zst"):
        suffix = Path(path.stem).suffix.lower()
        return suffix in (*TABLE_SUFFIXES, ".json", "")
    if suffix in TABLE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:
        return False


def find_parquet(source: str | Path) -> list[Path]:
    """The files of a source that is parquet and nothing else, in the order in which they are read; empty for any other
    source.
    """
    path = Path(source)
    if glob.has_magic(str(source)) and not path.exists():
        paths = [Path(name) for name in sorted(glob.glob(str(source), recursive=True))]
    elif path.is_dir():
        paths, others = ([], []) if is_saved_dataset(path) else folder_files(path)
        paths = [] if others else paths
    else:
        paths = [path]
    return paths if all(each.suffix == ".parquet" and each.is_file() for each in paths) else []


def check_ids_of_dataset(data_set: pyarrow.dataset.Dataset, ids: Sequence[str]) -> None:
    """Raises a ValueError where a data set, made by Arrow from the types of its first file, reads text as numbers."""
    for fragment in data_set.get_fragments():
        if isinstance(fragment, pyarrow.dataset.ParquetFileFragment):
            own = fragment.physical_schema
            for name in {*ids} & {*own.names} & {*data_set.schema.names}:
                kind, made = own.field(name).type, data_set.schema.field(name).type
                if is_text(kind) and not is_text(made):
                    raise ValueError(
                        f"{name} is {kind} in {fragment.path} and {made} in the data set, which would read 007 as 7; "
                        "pass the folder or the pattern of the files itself, or a data set with schema=..."
                    )


class ParquetFiles:
    """
    Parquet files as one table, of which nothing but the schemas is read before it is asked for.

    No file decides for the others: Arrow would take the columns and the types of the first one, so that the text `007`
    of a later file became the integer 7.

    Args:
        source: What was asked for, a file, a folder or a pattern. Of a folder, names such as `day=2024-01-01` are
            columns.
        files: Its files, of [`find_parquet`].
        ids: Columns of ids, see [`common_schema`].
        columns: What is asked for, see there.

    Attributes:
        schema (`pa.Schema`): Of the table.

    Raises:
        ValueError: A file that cannot be read, or files that do not make one table.
    """

    def __init__(
        self, source: str | Path, files: Sequence[Path], ids: Sequence[str], columns: Sequence[str] | None = None
    ):
        self.files, self.ids, self.columns = list(files), list(ids), columns
        # or Arrow keeps what it has read of a file until the end of that file, which may be larger than memory
        options = pyarrow.dataset.ParquetFragmentScanOptions(pre_buffer=False)
        self.format = pyarrow.dataset.ParquetFileFormat(default_fragment_scan_options=options)
        self._folders = self._folder_columns(Path(source))
        found = []
        for file, folders in zip(self.files, self._folders):
            if file.stat().st_size == 0:
                raise ValueError(f"{file} is empty")
            try:
                metadata = pyarrow.parquet.read_metadata(file)
                schema = metadata.schema.to_arrow_schema()
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"cannot read {file}: {error}") from error
            for name, value in folders.items():
                schema = schema if name in schema.names else schema.append(pa.field(name, value.type))
            found.append((file, schema, metadata.num_rows))
        self.schema = common_schema(found, ids, columns)
        self.num_rows = sum(rows for *_, rows in found)

    def batches(self, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
        """Some columns of all files, at most so many rows at a time."""
        schema = pa.schema([self.schema.field(name) for name in columns])
        for file, folders in zip(self.files, self._folders):
            fragment = self._fragment(file)
            own = [name for name in columns if name in fragment.physical_schema.names]
            scanner = fragment.scanner(columns=own, batch_size=batch_rows, batch_readahead=2)
            batches = scanner.to_batches()
            while True:
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError) as error:
                    raise ValueError(f"cannot read {file}: {error}") from error
                if batch is None:
                    break
                if len(batch):
                    yield self._part(pa.Table.from_batches([batch]), folders, schema, file)

    def read(self) -> pa.Table:
        """All of it."""
        parts = []
        for file, folders in zip(self.files, self._folders):
            try:
                table = self._fragment(file).to_table()
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"cannot read {file}: {error}") from error
            parts.append(self._part(table, folders, self.schema, file))
        return pa.concat_tables(parts)

    def _fragment(self, file: Path) -> pyarrow.dataset.ParquetFileFragment:
        return self.format.make_fragment(str(file), pyarrow.fs.LocalFileSystem())

    def _part(self, table: pa.Table, folders: dict[str, pa.Scalar], schema: pa.Schema, file: Path) -> pa.Table:
        for name, value in folders.items():
            if name in schema.names and name not in table.column_names:
                table = table.append_column(name, pa.repeat(value, len(table)))
        return with_schema(table, schema, self.ids, file, self.columns)

    def _folder_columns(self, source: Path) -> list[dict[str, pa.Scalar]]:
        """Of each file what the names of its folders say."""
        if not source.is_dir() or not any("=" in str(file.relative_to(source).parent) for file in self.files):
            return [{} for _ in self.files]
        paths = [str(file) for file in self.files]
        settings = {"format": self.format, "partition_base_dir": str(source)}
        try:
            schema = pyarrow.dataset.dataset(paths, partitioning="hive", **settings).partitioning.schema
            # Arrow would read the id 007 as 7
            kinds = [field.with_type(pa.string()) if field.name in self.ids else field for field in schema]
            partitioning = pyarrow.dataset.partitioning(pa.schema(kinds), flavor="hive")
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"cannot read {source}: {error}") from error
        keys = [
            pyarrow.dataset.get_partition_keys(partitioning.parse(str(file.relative_to(source))))
            for file in self.files
        ]
        columns = {field.name: pa.array([key.get(field.name) for key in keys], field.type) for field in kinds}
        columns |= {name: integers_of(values) for name, values in columns.items() if name in self.ids}
        return [{name: values[i] for name, values in columns.items()} for i in range(len(self.files))]
