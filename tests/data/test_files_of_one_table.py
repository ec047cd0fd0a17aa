"""Files of one log with columns of other types: a folder, a pattern, rows and shards give the same ids and columns."""

from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest

from onerec_hf.data import load_interactions, load_shards, read_table

LARGE = [5, 123456, 12345678901234]
NAN = float("nan")


def ints(values, kind=None):
    return pa.array(values, kind or pa.int64())


def day(items, users=None, **columns):
    users = ints([1] * len(items)) if users is None else users
    return pa.table({"user_id": users, "item_id": items, "timestamp": ints(range(len(items))), **columns})


CATEGORY = pa.array(["a", "b"]).dictionary_encode()
# files of a log, its item ids, and its user ids
MIXES = {
    "integers, then text": (
        [day(ints([7, 8]), ints([1, 1])), day(pa.array(["007", "0008"]), pa.array(["1", "01"]))],
        ["0008", "007", "7", "8"],
        ["01", "1"],
    ),
    "text, then integers": ([day(pa.array(["007"])), day(ints([7]))], ["007", "7"], [1]),
    "integers, then floats with a gap": ([day(ints(LARGE)), day(pa.array([*map(float, LARGE), NAN]))], LARGE, [1]),
    "floats with a gap, then text": (
        [day(pa.array([12345678901234.0, None])), day(pa.array(["12345678901234", "a"]))],
        ["12345678901234", "a"],
        [1],
    ),
    "integers of 32 and of 64 bits": ([day(ints([5, 6], pa.int32())), day(ints(LARGE))], sorted([6, *LARGE]), [1]),
    "integers with and without a sign": ([day(ints([2**60 + 1])), day(ints([9], pa.uint64()))], [9, 2**60 + 1], [1]),
    "decimals and floats": ([day(pa.array([Decimal("7")])), day(pa.array([7.0, 8.0]))], [7, 8], [1]),
    "categories and text": ([day(CATEGORY), day(pa.array(["b", "c"]))], ["a", "b", "c"], [1]),
    "categories and integers": ([day(ints([7])), day(CATEGORY)], ["7", "a", "b"], [1]),
    "a day without events": ([day(pa.array([], pa.string()), pa.array([], pa.float64())), day(ints([7]))], [7], [1]),
    "a day of nulls": ([day(pa.nulls(2)), day(ints([7]))], [7], [1]),
    "columns in another order": ([day(ints([7])), day(ints([8])).select([2, 1, 0])], [7, 8], [1]),
    "row numbers of pandas": ([day(ints([7]), __index_level_0__=ints([3])), day(ints([8]))], [7, 8], [1]),
}


def write(parts, folder):
    folder.mkdir()
    for i, part in enumerate(parts):
        pyarrow.parquet.write_table(part, folder / f"day{i}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["folder", "pattern", "shards of a folder", "shards of a pattern", "rows"])
@pytest.mark.parametrize("mix", MIXES)
def test_ids_keep_their_spelling_whatever_the_files(kind, mix, tmp_path):
    parts, items, users = MIXES[mix]
    source = write(parts, tmp_path / "log")
    if "pattern" in kind:
        source = f"{source}/*.parquet"
    if kind == "rows":  # Arrow makes one column of integers and floats, and of nothing else that differs
        source = [row for part in parts for row in part.select(["user_id", "item_id", "timestamp"]).to_pylist()]
        if len({type(row["item_id"]) for row in source} & {int, float, str, Decimal}) > 1 and items != LARGE:
            with pytest.raises(ValueError, match="each column needs values of one type"):
                load_interactions(source, drop_nulls=True)
            return
    if "shards" in kind:
        found = load_shards(source, tmp_path / "work", num_shards=2, drop_nulls=True)
    else:
        found = load_interactions(source, drop_nulls=True)
    assert found.item_ids.tolist() == items
    assert found.user_ids.tolist() == users


@pytest.mark.parametrize("files", ["log", "log/*.parquet"])
def test_feedback_of_integers_and_of_floats(files, tmp_path):
    write([day(ints([7, 8]), rate=ints([1, 2])), day(ints([7]), rate=pa.array([0.5]))], tmp_path / "log")
    source = str(tmp_path / files)
    x = load_interactions(source, feedback=["rate"])
    assert x.feedback["rate"].dtype == np.float64 and sorted(x.feedback["rate"]) == [0.5, 1, 2]
    ((_, own),) = load_shards(source, tmp_path / "work", num_shards=2, feedback=["rate"])
    assert own.feedback["rate"].tolist() == x.feedback["rate"].tolist()


BROKEN = {
    "a column less": (
        [day(ints([7])), day(ints([8]), is_like=ints([1]))],
        r"day0.parquet has the columns .*, but no 'is_like', which .*day1.parquet has: files of one log need the same",
    ),
    "a column less in the middle": (
        [day(ints([8]), is_like=ints([1])), day(ints([7])), day(ints([8]), is_like=ints([1]))],
        r"day1.parquet has the columns .*, but no 'is_like', which .*day0.parquet has",
    ),
    "ids of another name": (
        [day(ints([7])), day(ints([8])).rename_columns(["user_id", "sku", "timestamp"])],
        r"day1.parquet has the columns .*'sku'.*, but no 'item_id', which .*day0.parquet has",
    ),
    "fractions": (
        [day(ints([7])), day(pa.array([0.5]))],
        r"item_id of .*day1.parquet \(double\) cannot become int64: 0.5 is no whole number up to 2\^53; pass the ids",
    ),
    "large floats": ([day(ints([7])), day(pa.array([2.0**60]))], r"day1.parquet \(double\) cannot become int64"),
    "fractions beside text": ([day(pa.array(["a"])), day(pa.array([0.5]))], r"day1.parquet .* 0.5 is no whole number"),
    "no ids": ([day(ints([7])), day(pa.array([True]))], r"item_id of .*day1.parquet must hold integers or strings"),
    "other types": (
        [day(ints([7]), is_like=ints([1])), day(ints([7]), is_like=pa.array(["yes"]))],
        r"is_like is int64 in .*day0.parquet, string in .*day1.parquet: write the column with one type in all files",
    ),
    "beyond what a float holds": (
        [day(ints([7]), is_like=ints([2**60 + 1])), day(ints([7]), is_like=pa.array([0.5]))],
        r"is_like of .*day0.parquet \(int64\) cannot become double, the type that fits the other files .*one type",
    ),
}


@pytest.mark.parametrize("files", ["log", "log/*.parquet"])
@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_not_of_one_table_are_refused(name, files, tmp_path):
    parts, message = BROKEN[name]
    write(parts, tmp_path / "log")
    source = str(tmp_path / files)
    feedback = ["is_like"] if any("is_like" in part.column_names for part in parts) else []
    with pytest.raises((ValueError, TypeError), match=message) as whole:
        load_interactions(source, feedback=feedback)
    with pytest.raises(whole.type) as cut:
        load_shards(source, tmp_path / "work", num_shards=2, feedback=feedback)
    assert str(cut.value) == str(whole.value)


HUGE = ints([2**60 + 1])
# an unused column of two files
UNUSED = {
    "absent": (None, pa.array(["x"])),
    "text and integers": (pa.array(["x"]), ints([1])),
    "lists and integers": (pa.array([[1]]), ints([1])),
    "what a float does not hold": (HUGE, pa.array([0.5])),
    "categories and integers": (CATEGORY.take(ints([0])), ints([1])),
    "numbers and dates": (ints([1]), pa.array([1], pa.date32())),
}


@pytest.mark.parametrize("files", ["log", "log/*.parquet"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", UNUSED)
def test_columns_that_nobody_asks_for_decide_nothing(name, turned, files, tmp_path):
    parts = [day(ints([i]), **({} if each is None else {"extra": each})) for i, each in enumerate(UNUSED[name])]
    write(parts[::-1] if turned else parts, tmp_path / "log")
    source = str(tmp_path / files)
    assert load_interactions(source).item_ids.tolist() == [0, 1]
    assert load_shards(source, tmp_path / "work", num_shards=2).item_ids.tolist() == [0, 1]
    if name == "absent":  # who does not say what he needs gets all columns
        assert sorted(read_table(source)["extra"].to_pylist(), key=str) == [None, "x"]
    else:
        with pytest.raises(ValueError, match="with one type in all files"):
            read_table(source)


def test_text_files_whose_unused_columns_differ(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp,note\n1,7,1,3\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,timestamp,note,new\n1,8,2,text,1\n")
    assert load_interactions(f"{tmp_path}/*.csv").item_ids.tolist() == [7, 8]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("flags", "numbers", "found"),
    [([True], ints([3], pa.int8()), [1, 3]), ([True], ints([3], pa.uint64()), [1, 3]), ([False], [0.5], [0.0, 0.5])],
)
def test_flags_beside_numbers(flags, numbers, found, turned, tmp_path):
    parts = [day(ints([7]), is_like=pa.array(flags)), day(ints([8]), is_like=pa.array(numbers))]
    folder = write(parts[::-1] if turned else parts, tmp_path / "log")
    x = load_interactions(folder, feedback=["is_like"])
    ((_, own),) = load_shards(folder, tmp_path / "work", num_shards=2, feedback=["is_like"])
    for seen in (x, own):
        assert seen.feedback["is_like"].dtype == pa.array(numbers).to_numpy().dtype
        assert sorted(seen.feedback["is_like"].tolist()) == found


DAY = 86_400_000  # milliseconds
TIMES = {
    "dates and times": (pa.array([1], pa.date32()), pa.array([2 * DAY * 1000], pa.timestamp("us"))),
    "dates and times of a zone": (pa.array([1], pa.date32()), pa.array([2 * DAY], pa.timestamp("ms", "UTC"))),
    "dates of two kinds": (pa.array([1], pa.date32()), pa.array([2 * DAY], pa.date64())),
    "no zone and UTC": (pa.array([DAY], pa.timestamp("ms")), pa.array([2 * DAY], pa.timestamp("ms", "UTC"))),
    "no zone and another": (
        pa.array([DAY // 1000], pa.timestamp("s")),
        pa.array([2 * DAY * 10**6], pa.timestamp("ns", "Europe/Berlin")),
    ),
}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", TIMES)
def test_dates_and_times_of_one_column(name, turned, tmp_path):
    parts = [day(ints([7])).set_column(2, "timestamp", each) for each in TIMES[name]]
    folder = write(parts[::-1] if turned else parts, tmp_path / "log")
    assert load_interactions(folder).timestamp.tolist() == [DAY, 2 * DAY]
    ((_, own),) = load_shards(folder, tmp_path / "work", num_shards=2)
    assert own.timestamp.tolist() == [DAY, 2 * DAY]


def test_text_files_of_a_pattern(tmp_path):
    (tmp_path / "a.csv").write_text("user_id,item_id,timestamp\n1,7,1\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,timestamp\n1,007,2\n")
    write([day(pa.array([12345678901234.0]))], tmp_path / "days")
    (tmp_path / "days" / "day0.parquet").rename(tmp_path / "c.parquet")
    assert load_interactions(tmp_path / "[ab].csv").item_ids.tolist() == ["007", "7"]
    assert load_interactions(f"{tmp_path}/[abc].*").item_ids.tolist() == ["007", "12345678901234", "7"]
    assert load_interactions(f"{tmp_path}/[ac].*").item_ids.tolist() == [7, 12345678901234]


def test_folders_that_are_columns_keep_ids_and_types(tmp_path):
    for name, items in (("user_id=007/day=01", pa.array(["a"])), ("user_id=7/day=02", ints([5], pa.int32()))):
        (tmp_path / "log" / name).mkdir(parents=True)
        pyarrow.parquet.write_table(day(items).drop_columns("user_id"), tmp_path / "log" / name / "a.parquet")
    for seen in (
        load_interactions(tmp_path / "log", feedback=["day"]),
        load_shards(tmp_path / "log", tmp_path / "work", num_shards=2, feedback=["day"]),
    ):
        assert seen.user_ids.tolist() == ["007", "7"] and seen.item_ids.tolist() == ["5", "a"]
    assert read_table(tmp_path / "log", ids=["item_id"])["day"].to_pylist() == [1, 2]
    (tmp_path / "log" / "user_id=007").rename(tmp_path / "log" / "user_id=8")
    assert load_interactions(tmp_path / "log").user_ids.tolist() == [7, 8]


def refused(folder, name, tmp_path):
    for load in (load_interactions, lambda source: load_shards(source, tmp_path / "work", num_shards=2)):
        with pytest.raises(ValueError, match=rf"log holds files that are not named .parquet: \['{name}'\]; move"):
            load(folder)


def test_what_a_folder_holds_beside_its_days(tmp_path):
    folder = write([day(ints([7]))], tmp_path / "log")
    for name in ("_SUCCESS", ".day0.parquet.crc", "_temporary/0/day0.parquet", "_delta_log/0.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of the program that wrote the days")
    assert len(load_interactions(folder)) == 1
    for name in ("README.md", "notes.txt", "manifest.json", "settings.yaml", "LICENSE", "README.md.gz"):
        (folder / name).write_text("no part of the log")
    shards = load_shards(folder, tmp_path / "work", num_shards=2)
    assert len(load_interactions(folder)) == sum(len(own) for _, own in shards) == 1
    for name in ("day1.parq", "day1", "day1.snappy"):
        pyarrow.parquet.write_table(day(ints([8])), folder / name)
        refused(folder, name, tmp_path)
        (folder / name).rename(tmp_path / "day1")
    for name in ("day1.csv", "day1.jsonl", "day1.csv.gz", "day1.json.gz", "day1.TSV"):
        (folder / name).write_text("user_id")
        refused(folder, name, tmp_path)
        (folder / name).unlink()
    (tmp_path / "day1").rename(folder / "day1.parquet")
    assert load_interactions(folder).item_ids.tolist() == [7, 8]
    (folder / "day1.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"cannot read .*day1.parquet: "):
        load_interactions(folder)


def test_a_folder_that_is_a_link_is_read(tmp_path):
    write([day(ints([8]))], tmp_path / "elsewhere")
    folder = write([day(ints([7]))], tmp_path / "log")
    (folder / "older").symlink_to(tmp_path / "elsewhere")
    assert load_interactions(folder).item_ids.tolist() == [7, 8]


def test_a_data_set_of_arrow_that_reads_text_as_integers(tmp_path):
    folder = write([day(ints([7])), day(pa.array(["007"]))], tmp_path / "log")
    made = pyarrow.dataset.dataset(folder)  # with the types of the first file
    for load in (load_interactions, lambda source: load_shards(source, tmp_path / "work", num_shards=2)):
        with pytest.raises(ValueError, match=r"item_id is string in .*day1.parquet and int64 in the data set, which"):
            load(made)


def test_item_tables_of_several_files(tmp_path):
    parts = [pa.table({"item_id": [7], "title": ["x"]}), pa.table({"item_id": ["007"], "title": ["y"]})]
    folder = write(parts, tmp_path / "items")
    log = pd.DataFrame({"user_id": [1, 1], "item_id": ["7", "007"], "timestamp": [1, 2]})
    for source in (folder, f"{folder}/*.parquet"):
        assert load_interactions(log, items=source).items["title"] == ["x", "y"]
