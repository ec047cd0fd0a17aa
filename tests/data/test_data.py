"""Loading, k-core and splits against literal values and brute force; every kind of bad input; the real data sets."""

import logging
from decimal import Decimal

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from onerec_hf.data import (
    Interactions,
    SessionConfig,
    category_codes,
    category_map,
    compress_lifelong,
    global_time_split,
    k_core,
    leave_last_out,
    load_amazon,
    load_interactions,
    load_kuairand,
    session_splits,
    target_rows,
    training_events,
)
from onerec_hf.data.tables import match_ids

from ..conftest import shared_data

LOG = {
    "uid": [7, 3, 7, 3, 7, 5],
    "vid": ["b", "a", "c", "b", "a", "c"],
    "ts": [30, 10, 10, 20, 20, 5],
    "like": [1, 0, 0, 1, 1, 0],
}
COLUMNS = {"user_id": "uid", "item_id": "vid", "timestamp": "ts", "is_like": "like"}


def load(log, **kwargs):
    return load_interactions(log, **{"columns": COLUMNS, "feedback": ["is_like"], **kwargs})


def order_only(lists):
    """Interactions of lists of item ids, one per user."""
    user = np.repeat(np.arange(len(lists)), [len(items) for items in lists])
    log = {"user_id": user, "item_id": np.concatenate(lists)}
    return load_interactions(log, columns={"timestamp": None})


def random_log(seed, users=40, items=30, events=600):
    rng = np.random.default_rng(seed)
    return {
        "user_id": rng.integers(0, users, events),
        "item_id": rng.integers(0, items, events),
        "timestamp": rng.integers(0, 200, events),
        "play": rng.integers(0, 9, events),
    }


def warnings_of(caplog):
    return " | ".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def test_log_is_indexed_by_sorted_ids_and_sorted_by_user_and_time():
    x = load(LOG)
    assert x.user_ids.tolist() == [3, 5, 7] and x.item_ids.tolist() == ["a", "b", "c"]
    assert x.user_index.tolist() == [0, 0, 1, 2, 2, 2]
    assert x.item_index.tolist() == [0, 1, 2, 2, 0, 1]
    assert x.timestamp.tolist() == [10, 20, 5, 10, 20, 30]
    assert x.feedback["is_like"].tolist() == [0, 1, 0, 0, 1, 1]
    assert x.user_offsets.tolist() == [0, 2, 3, 6] and (x.num_users, x.num_items, len(x)) == (3, 3, 6)


@pytest.mark.parametrize(
    "kind",
    [
        *("parquet", "folder", "csv", "csv.gz", "tsv", "jsonl", "jsonl.gz", "save_to_disk", "saved dict"),
        *("dataset", "shuffled dataset", "pandas", "arrow", "hub"),
    ],
)
def test_all_sources_give_the_same_interactions(kind, tmp_path, monkeypatch):
    frame, settings = pd.DataFrame(LOG), {}
    if kind in ("parquet", "folder"):
        source = tmp_path if kind == "folder" else tmp_path / "log.parquet"
        frame.to_parquet(tmp_path / "log.parquet")
    elif kind in ("csv", "csv.gz", "tsv"):
        source = str(tmp_path / f"log.{kind}")
        frame.to_csv(source, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind in ("jsonl", "jsonl.gz"):
        source = tmp_path / f"log.{kind}"
        frame.to_json(source, orient="records", lines=True)
    elif kind == "save_to_disk":
        source = tmp_path
        datasets.Dataset.from_dict(LOG).select([5, 4, 3, 2, 1, 0]).save_to_disk(str(source))
    elif kind == "saved dict":
        source, settings = str(tmp_path), {"split": "test"}
        datasets.DatasetDict(test=datasets.Dataset.from_dict(LOG)).save_to_disk(source)
    elif kind == "dataset":
        source = datasets.Dataset.from_dict(LOG)
    elif kind == "shuffled dataset":  # an indices mapping over the table
        source = datasets.Dataset.from_dict(LOG).select([5, 4, 3, 2, 1, 0])
    elif kind == "pandas":
        source = frame
    elif kind == "arrow":
        source = pa.table(LOG)
    else:
        source = "someone/clicks"
        calls = []
        monkeypatch.setattr(
            datasets, "load_dataset", lambda *args, **kw: calls.append((args, kw)) or datasets.Dataset.from_dict(LOG)
        )
    x = load(source, **settings)
    assert x.item_index.tolist() == [0, 1, 2, 2, 0, 1]
    assert x.item_ids.tolist() == ["a", "b", "c"] and x.user_ids.tolist() == [3, 5, 7]
    if kind == "hub":
        assert calls == [(("someone/clicks",), {"split": "train"})]


def test_items_table_defines_the_item_indices_and_users_follow_the_log():
    items = {"vid": ["c", "new", "a", "b"], "title": ["C", "New", "A", None], "tags": [[1], [], [2, 3], [4]]}
    users = {"id": [9, 7, 5, 3], "age": [90, 70, None, 30]}
    x = load(LOG, items=items, users=users, users_columns={"user_id": "id"})
    assert x.item_ids.tolist() == ["c", "new", "a", "b"] and x.item_index.tolist() == [2, 3, 0, 0, 2, 3]
    assert x.items == {"title": ["C", "New", "A", None], "tags": [[1], [], [2, 3], [4]]}
    assert x.user_ids.tolist() == [3, 5, 7]
    assert x.users["age"] == [30, None, 70]


def test_integer_features_with_a_gap_keep_their_value():
    """As floats, integers above 2^53 would become one category, and 3 would become 3.0."""
    authors = pd.array([2**60 + i if i else None for i in range(5)], dtype="Int64")
    items = pd.DataFrame(
        {"item_id": range(5), "author": authors, "level": [3, 1, 2, 1, 0], "price": [0.5, np.nan, 2, 1, 1]}
    )
    log = {"user_id": [1] * 5, "item_id": range(5), "timestamp": range(5)}
    for source in (items, pa.Table.from_pandas(items), items.to_dict("list")):
        found = load_interactions(log, items=source).items
        assert list(map(str, found["author"])) == ["None", *(str(2**60 + i) for i in range(1, 5))]
        assert category_codes(found["author"], category_map(found["author"])).tolist() == [0, 1, 2, 3, 4]
        assert found["level"].dtype == np.int64
        np.testing.assert_array_equal(found["price"], [0.5, np.nan, 2, 1, 1])
    core = k_core(load_interactions(log | {"item_id": [0, 1, 1, 3, 3]}, items=items), 2)
    assert core.items["author"] == [2**60 + 1, 2**60 + 3]


def test_a_mapped_column_wins_over_one_that_bears_our_name(caplog):
    log = {
        "uid": [10, 10, 20],
        "vid": [1, 2, 3],
        "ts": [1, 2, 3],
        "item_id": [7, 7, 7],
        "like": [1, 0, 1],
        "is_like": [0, 0, 0],
    }
    items = {"vid": [1, 2, 3], "item_id": [3, 2, 1], "title": ["one", "two", "three"]}
    users = {"uid": [10, 20], "user_id": [20, 10], "age": [33, 44]}
    x = load(log, items=items, users=users)
    assert x.item_ids.tolist() == [1, 2, 3] and x.items == {"title": ["one", "two", "three"]}
    assert x.users["age"].tolist() == [33, 44] and x.feedback["is_like"].tolist() == [1, 0, 1]
    assert "items: left out its own columns ['item_id']" in warnings_of(caplog)
    x = load(log, items=items, items_columns={"item_id": "vid", "other": "item_id"})
    assert x.items["other"].tolist() == [3, 2, 1]


def test_feedback_keeps_its_type_and_may_be_text_or_boolean():
    log = LOG | {
        "like": np.array(LOG["like"], dtype=np.int8),
        "page": list("pqrstu"),
        "ok": np.array(LOG["like"], dtype=bool),
    }
    x = load(log, feedback=["is_like", "page", "ok"])
    assert x.feedback["is_like"].dtype == np.int8 and x.feedback["ok"].dtype == bool
    assert x.feedback["page"].tolist() == ["q", "s", "u", "r", "t", "p"]
    features = leave_last_out(x)["train"].features
    assert features["is_like"] == datasets.List(datasets.Value("int8"))
    assert features["page"].feature.dtype == "string" and features["ok"].feature.dtype == "bool"


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("007,7,12", ["007", "12", "7"]),
        ("7,12,-3", [-3, 7, 12]),
        ("7.0,8.0,9.0", ["7.0", "8.0", "9.0"]),
        ("9223372036854775808,7,8", ["7", "8", "9223372036854775808"]),
        ("9223372036854775807,7,8", [7, 8, 9223372036854775807]),
        ("true,false,2024-01-01", ["2024-01-01", "false", "true"]),
        ("a,NA,null", ["NA", "a", "null"]),  # names like any other, beside other text
    ],
)
def test_ids_of_a_csv_file_are_names(text, ids, tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(
        "\ufeffuser_id,item_id,timestamp\n" + "".join(f"u,{i},1\n" for i in text.split(",")), encoding="utf-8"
    )
    assert load_interactions(path).item_ids.tolist() == ids


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([7, 8], dtype=np.uint8), [7, 8]),
        (np.array([7, 2**63 - 1], dtype=np.uint64), [7, 2**63 - 1]),
        ([Decimal(7), Decimal("12345678901234567")], [7, 12345678901234567]),
        ([7.0, 2.0**53], [7, 2**53]),
        (pd.Categorical(["b", "a"]), ["a", "b"]),
        (pd.Categorical([8, 7]), [7, 8]),
        (np.array(["07", "7"], dtype=object), ["07", "7"]),
        ([7, 2**63], "item_id .*cannot become int64.*pass the ids as text"),
        ([2**64, 1], "cannot read the DataFrame"),
        ([7.0, 2.0**53 + 2], r"9007199254740994\.0 is no whole number up to 2\^53; pass the ids as text"),
        ([7.0, np.inf], "inf is no whole number"),
        ([Decimal("7.5"), Decimal(7)], "not whole"),
        ([True, False], "item_id must hold integers or strings, got bool"),
        (["a", ""], r"null \(empty\).*\{'item_id': 1\}, of 2 rows, the first one in row 2"),
        ([" \t", "a"], r"\{'item_id': 1\}, of 2 rows, the first one in row 1"),
        ([None, None], r"\{'item_id': 2\}"),
        ([7, "a"], "cannot read the DataFrame.*item_id"),
    ],
)
def test_ids_of_any_kind_keep_their_value_or_are_refused(ids, expected):
    log = pd.DataFrame({"user_id": ["u", "u"], "item_id": ids, "timestamp": [1, 2]})
    if isinstance(expected, list):
        assert load_interactions(log).item_ids.tolist() == expected
    else:
        with pytest.raises((ValueError, TypeError), match=expected):
            load_interactions(log)


@pytest.mark.parametrize(
    ("log_ids", "table_ids", "expected"),
    [
        ([7, 8], ["8", "7", "9"], [8, 7, 9]),
        (["7", "8"], [8, 7, 9], ["8", "7", "9"]),
        ([7, 8], ["8", "7", "A9"], ["8", "7", "A9"]),
        ([7, 8], [8.0, 7.0], [8, 7]),
    ],
)
def test_the_same_id_may_be_an_integer_here_and_text_there(log_ids, table_ids, expected):
    log = {"user_id": log_ids, "item_id": log_ids, "timestamp": [1, 2]}
    titles = [f"title {int(i) if i != 'A9' else i}" for i in table_ids]
    x = load_interactions(
        log, items={"item_id": table_ids, "title": titles}, users={"user_id": table_ids, "age": titles}
    )
    assert x.item_ids.tolist() == expected
    assert [f"title {x.item_ids[i]}" for i in x.item_index] == [x.items["title"][i] for i in x.item_index]
    assert [f"title {i}" for i in x.user_ids] == x.users["age"]


def test_another_spelling_is_another_id(tmp_path):
    log = {"user_id": [1, 1], "item_id": [7, 8], "timestamp": [1, 2]}
    (tmp_path / "items.csv").write_text("item_id,title\n007,Bond\n8,Eight\n")
    with pytest.raises(ValueError, match=r"1 of 2 events .* that items lacks, such as \['7'\]"):
        load_interactions(log, items=tmp_path / "items.csv")
    (tmp_path / "items.csv").write_text("item_id,title\n007,Bond\n008,Eight\n")
    with pytest.raises(
        TypeError, match="item_id is int64 in the log, such as 7, and large_string in items, such as '007'"
    ):
        load_interactions(log, items=tmp_path / "items.csv")
    assert match_ids(np.array([7, 8]), np.array(["8", "007", "7"])).tolist() == [2, 0]
    assert match_ids(np.array(["item1", "item10"]), np.array(["item1"])).tolist() == [0, -1]


@pytest.mark.parametrize(
    "stamps",
    [
        ["2024-01-01T00:00:00.000300", "2024-01-01T00:00:00.000100", "2024-01-01T00:00:00.001000"],
        pd.to_datetime(["2024-01-01", "2024-01-01", "2024-01-01"]) + pd.to_timedelta([3, 1, 10], "ns"),
        pd.to_datetime(["1960-01-01", "1960-01-01", "1960-01-01"]).as_unit("us") + pd.to_timedelta([3, 1, 10], "us"),
    ],
    ids=["text", "ns", "us"],
)
def test_events_are_sorted_by_more_than_their_milliseconds(stamps, caplog):
    log = pd.DataFrame({"user_id": 1, "item_id": [1, 1, 2], "timestamp": stamps})
    x = load_interactions(log.assign(n=[2, 1, 3]), feedback=["n"])
    assert x.feedback["n"].tolist() == [1, 2, 3] and x.timestamp.dtype == np.int64
    assert len(load_interactions(log, drop_duplicates=True)) == 3 and not warnings_of(caplog)


def test_times_beyond_nanoseconds_and_before_1970():
    log = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": ["9999-12-31", "1969-12-31T23:59:59.9995"]}
    assert load_interactions(log).timestamp.tolist() == [-1, 253402214400000]
    log["timestamp"] = [Decimal(1700000000123456789), Decimal(1700000000123456788)]  # one number as floats
    assert load_interactions(log).timestamp.tolist() == [1700000000123456788, 1700000000123456789]
    with pytest.raises(ValueError, match=r"timestamp .*does not fit into 64 bits"):
        load_interactions(log | {"timestamp": np.array([1, 2**63], dtype=np.uint64)})


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        (["1970-01-01", "1970-01-02T00:00:01"], [0, 86_401_000]),
        (["1970-01-01 08:00:00+08:00", "1970-01-01 09:00:00.250+08:00"], [0, 3_600_250]),
        (pd.to_datetime(["1970-01-01", "1970-01-02"]), [0, 86_400_000]),
        ([0.5, 1.5], [0.5, 1.5]),
    ],
)
def test_timestamps_become_milliseconds_or_stay_numbers(stamps, expected):
    x = load_interactions(pd.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": stamps}))
    assert x.timestamp.tolist() == expected


def test_order_only_log_counts_the_events_of_each_user():
    x = load_interactions({"user_id": [2, 1, 2, 2], "item_id": [5, 6, 7, 5]}, columns={"timestamp": None})
    assert x.timestamp.tolist() == [0, 0, 1, 2] and x.item_index.tolist() == [1, 0, 2, 0]
    log = {"user_id": np.arange(3000) % 7, "item_id": np.arange(3000)}  # long enough for an unstable sort to show
    assert load_interactions(log, columns={"timestamp": None}).item_index[:429].tolist() == list(range(0, 3000, 7))


def test_whole_floats_are_integer_ids():  # what pandas makes of integers beside a missing value
    log = pd.DataFrame({"user_id": [1.0, 2.0, np.nan], "item_id": [1, 2, 3], "timestamp": [1, 2, 3]})
    assert load_interactions(log, drop_nulls=True).user_ids.tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"user_id .*int64"):
        load_interactions(log.assign(user_id=[0.5, 1.0, 2.0]))


def test_ties_keep_row_order_and_duplicates_are_counted(caplog):
    log = {"user_id": [1, 1, 1, 1, 2], "item_id": [9, 8, 9, 9, 9], "timestamp": [5, 5, 5, 5, 5], "f": [0, 0, 1, 0, 0]}
    x = load_interactions(log, feedback=["f"])
    assert x.item_ids[x.item_index].tolist() == [9, 8, 9, 9, 9] and x.feedback["f"].tolist() == [0, 0, 1, 0, 0]
    assert "3 of 5 events have the user and time" in warnings_of(caplog) and "1 of them repeat" in warnings_of(caplog)
    x = load_interactions(log, feedback=["f"], drop_duplicates=True)  # row 3 repeats row 0
    assert x.item_ids[x.item_index].tolist() == [9, 8, 9, 9] and x.feedback["f"].tolist() == [0, 0, 1, 0]


def test_unknown_column_lists_the_columns_and_guesses():
    with pytest.raises(ValueError, match=r"no column 'vids' for 'item_id'.*'uid', 'vid'.*Did you mean 'vid'\?"):
        load(LOG, columns=COLUMNS | {"item_id": "vids"})
    with pytest.raises(ValueError, match=r"items_columns=\{'item_id'"):
        load(LOG, items={"id": ["a", "b", "c"]})
    with pytest.raises(ValueError, match=r"columns names \['is_like'\].*feedback"):
        load(LOG, feedback=[])
    for name in ("user", "item_id", "length", "session_start", "advantage", "play_time", "log_probs", "lifelong_like"):
        with pytest.raises(ValueError, match=rf"may not be named \['{name}'\].*columns=\{{'my_{name}': '{name}'"):
            load("no such file", feedback=[name])
    with pytest.raises(ValueError, match=r"\['item_id'\] to None"):
        load(LOG, columns=COLUMNS | {"item_id": None})


def test_nulls_raise_with_counts_or_are_dropped(caplog):
    frame = pd.DataFrame(LOG).assign(vid=["b", None, "c", None, "a", "c"], like=[1, 0, np.nan, 1, 1, 0])
    with pytest.raises(ValueError, match=r"\{'item_id': 2, 'is_like': 1\}, of 6 rows.*drop_nulls=True"):
        load(frame)
    x = load(frame, drop_nulls=True)
    assert len(x) == 3 and x.user_ids.tolist() == [5, 7]
    assert "dropped 3 of 6 rows" in warnings_of(caplog)
    with pytest.raises(ValueError, match="no rows are left"):
        load(frame.assign(ts=np.nan), drop_nulls=True)
    infinite = pd.DataFrame(LOG).assign(ts=[1, 2, 3, np.inf, 5, 6], like=[1, 0, -np.inf, 1, 1, 0])
    with pytest.raises(
        ValueError, match=r"infinite values per column: \{'timestamp': 1, 'is_like': 1\}, of 6 rows, .*row 3"
    ):
        load(infinite)
    assert len(load(infinite, drop_nulls=True)) == 4


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"ts": ["yesterday"] * 6}, ValueError, r"not ISO 8601.*yesterday"),
        ({"ts": [True] * 6}, TypeError, "numbers, dates or ISO"),
        ({"vid": [[1]] * 6}, TypeError, "item_id must hold integers or strings"),
        ({"like": [[1]] * 6}, TypeError, "is_like must hold numbers"),
    ],
)
def test_column_of_the_wrong_kind(change, error, match):
    with pytest.raises(error, match=match):
        load(LOG | change)


def test_ids_that_a_joined_table_lacks_or_repeats(caplog):
    with pytest.raises(
        ValueError, match=r"2 of 6 events have one of 1 item_id values that items lacks.*'c'.*drop_unkn"
    ):
        load(LOG, items={"vid": ["a", "b"]})
    x = load(LOG, items={"vid": ["a", "b"]}, drop_unknown=True)
    assert len(x) == 4 and x.user_ids.tolist() == [3, 7] and "2 of 6 events" in warnings_of(caplog)
    with pytest.raises(ValueError, match="user_id values that users lacks"):
        load(LOG, users={"uid": [3, 5]})
    with pytest.raises(ValueError, match="1 of 4 rows repeat an earlier item_id"):
        load(LOG, items={"vid": ["a", "b", "c", "a"]})
    with pytest.raises(ValueError, match="1 of 4 values of item_id are null"):
        load(LOG, items={"vid": ["a", "b", "c", None]})
    with pytest.raises(TypeError, match="one type"):
        load(LOG, items={"vid": [1, 2, 3]})


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.csv").touch()
    (tmp_path / "log.xlsx").touch()
    for name, error in [("empty.csv", ValueError), ("log.xlsx", ValueError), ("no.csv", FileNotFoundError)]:
        with pytest.raises(error, match=name):
            load(tmp_path / name)
    datasets.DatasetDict(test=datasets.Dataset.from_dict(LOG)).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "nothing").mkdir()
    for name, content, match in [
        ("header.csv", b"uid,vid,ts,like\n", r"header.csv has no rows.*'uid'"),
        ("short.csv", b"uid,vid,ts,like\n1,a,1,0\n1,b,2\n", "short.csv: .*Row #3: Expected 4 columns, got 3"),
        ("twice.csv", b"uid,vid,vid,ts,like\n1,a,b,1,0\n", r"more than one column named \['vid'\]"),
        ("latin.csv", "uid,vid,ts,like\n1,\u00e9,1,0\n".encode("latin-1"), "latin.csv.*UTF8"),
        ("note.csv", "uid,vid,ts,like,x\n1,a,1,0,\u00e9\n".encode("latin-1"), r"note.csv: .*\['x'\] are not UTF-8"),
        ("mixed.jsonl", b'{"uid": 1}\n{"uid": "a"}\n', "mixed.jsonl: .*uid.* changed from number to string in row 1"),
        ("array.json", b'[{"uid": 1}]', "array.json: .*Each line must be one object"),
        ("not.parquet", b"uid,vid", "not.parquet: "),
        ("not.csv.gz", b"uid,vid", "cannot read .*not.csv.gz: "),
        ("nothing", None, "nothing holds no parquet file"),
        ("saved", None, r"saved has no split 'train'; it has \['test'\]"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no/such/log is no file or folder here and no data set on the Hub"):
        load("no/such/log")
    with pytest.raises(TypeError, match="pass one of them"):
        load(datasets.DatasetDict(train=datasets.Dataset.from_dict(LOG)))


def test_container_rejects_what_does_not_fit():
    good = {
        "user_index": np.array([0, 0, 1]),
        "item_index": np.array([1, 0, 1]),
        "timestamp": np.array([1, 2, 0]),
        "user_ids": np.array([4, 5]),
        "item_ids": np.array([6, 7]),
    }
    Interactions(**good)
    for change, match in [
        ({"item_index": np.array([1, 0, 2])}, r"item_index must lie in 0..1"),
        ({"item_index": np.array([1, 0, 1], dtype=np.int32)}, "int64"),
        ({"timestamp": np.array([2, 1, 0])}, "sorted by user"),
        ({"user_index": np.array([1, 1, 0])}, "sorted by user"),
        ({"feedback": {"like": np.array([1])}}, "like has 1 values, expected 3, one per event"),
        ({"feedback": {"history": np.zeros(3)}}, r"may not be named \['history'\]"),
        ({"feedback": {"target_like": np.zeros(3)}}, r"may not be named \['target_like'\]"),
        ({"timestamp": np.array([1, np.inf, 0])}, "1 NaN or infinite"),
        ({"items": {"title": ["a"]}}, "one per item"),
        ({"users": {"age": [1]}}, "one per user"),
    ]:
        with pytest.raises(ValueError, match=match):
            Interactions(**good | change)


def test_k_core_by_hand_and_features_follow():
    log = {"user_id": [1, 1, 2, 2, 3, 3], "item_id": [10, 11, 10, 11, 11, 12], "timestamp": [1, 2, 3, 4, 5, 6]}
    items = {"item_id": [12, 11, 10], "name": ["x", "y", "z"], "price": [1, 2, 3]}
    x = k_core(load_interactions(log, items=items, feedback=[]), 2)  # without item 12, user 3 has one event left
    assert x.user_ids.tolist() == [1, 2] and x.item_ids.tolist() == [11, 10]
    assert x.item_index.tolist() == [1, 0, 1, 0] and x.timestamp.tolist() == [1, 2, 3, 4]
    assert x.items["name"] == ["y", "z"] and x.items["price"].tolist() == [2, 3]
    with pytest.raises(ValueError, match=r"the 3-core of .* is empty; lower k"):
        k_core(x, 3)


@pytest.mark.parametrize("seed", range(3))
def test_k_core_against_brute_force(seed):
    log = random_log(seed, users=60, items=60, events=380)
    events = list(zip(*(log[name].tolist() for name in ("user_id", "item_id", "timestamp"))))
    rounds = 0
    while True:
        users, items, _ = (list(column) for column in zip(*events))
        kept = [e for e in events if users.count(e[0]) >= 4 and items.count(e[1]) >= 4]
        if len(kept) == len(events):
            break
        events, rounds = kept, rounds + 1
    x = k_core(load_interactions(log), 4)
    got = zip(x.user_ids[x.user_index].tolist(), x.item_ids[x.item_index].tolist(), x.timestamp.tolist())
    assert sorted(got) == sorted(events) and 0 < len(events) < 380 and rounds > 1


def test_leave_last_out_by_hand(caplog):
    splits = leave_last_out(order_only([[4, 5, 6, 4], [5], [6, 4]]))
    assert splits["train"][:] == {"user": [0, 1, 2], "history": [[0, 1], [1], [2]], "timestamp": [[0, 1], [0], [0]]}
    assert splits["validation"][:] == {"user": [0], "history": [[0, 1]], "timestamp": [[0, 1]], "targets": [[2]]}
    test = {"user": [0, 2], "history": [[0, 1, 2], [2]], "timestamp": [[0, 1, 2], [0]], "targets": [[0], [0]]}
    assert splits["test"][:] == test
    assert "2 of 3 users have fewer than 3 events" in warnings_of(caplog) and "the 1 with one event" in caplog.text
    assert splits["test"].features == datasets.Features(
        user=datasets.Value("int32"),
        history=datasets.List(datasets.Value("int32")),
        timestamp=datasets.List(datasets.Value("int64")),
        targets=datasets.List(datasets.Value("int32")),
    )


def events_per_user(log, users):
    """Events (timestamp, item id, play) of each user, stably sorted by time."""
    rows = list(zip(*(log[name].tolist() for name in ("user_id", "timestamp", "item_id", "play"))))
    return {user: sorted([row[1:] for row in rows if row[0] == user], key=lambda row: row[0]) for user in users}


def rows_per_user(x, split):
    """Split rows as (events, target item ids) by original user id."""
    result = {}
    for row in split:
        items = x.item_ids[row["history"]].tolist()
        events = list(zip(row["timestamp"], items, row["play"]))
        result[int(x.user_ids[row["user"]])] = (events, x.item_ids[row.get("targets", [])].tolist())
    return result


def test_users_without_events_have_no_row(caplog):
    """Those that `where` leaves nothing of: the event after their place belongs to the next user, or to nobody."""
    log = {"user_id": [1, 1, 1, 2, 3, 3, 4], "item_id": [10, 11, 12, 20, 30, 31, 40], "timestamp": range(7)}
    x = load_interactions(log)
    splits = leave_last_out(x.where(np.array([1, 1, 1, 0, 1, 1, 0], dtype=bool)))
    assert splits["train"]["user"][:] == [0, 2] and splits["train"]["history"][:] == [[0], [4]]
    assert splits["test"]["user"][:] == [0, 2] and splits["test"]["history"][:] == [[0, 1], [4]]
    assert "the 2 without events no row at all" in warnings_of(caplog)
    nothing = x.where(np.zeros(7, dtype=bool))
    with pytest.raises(ValueError, match="no events to split"):
        leave_last_out(nothing)
    with pytest.raises(ValueError, match="no events to split"):
        global_time_split(nothing, 1, 2)
    for mask in (np.array([1, 1, 0, 0, 1, 1, 0]), np.ones(3, dtype=bool)):  # 0 and 1 are rows to numpy
        with pytest.raises(ValueError, match=r"a bool mask of shape \(7,\), got"):
            x.where(mask)


def rows_of_all_splits(x):
    """Every function that makes rows of events, by name."""
    splits = leave_last_out(x)
    rows = {f"leave_last_out {name}": split for name, split in splits.items()}
    rows["target_rows"] = target_rows(splits["train"], 3)
    rows |= {f"global_time_split {name}": split for name, split in global_time_split(x, 100, 150).items()}
    everything = {"watched": None, "min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "interactions": {}}
    for way in ({"max_gap": 5}, {"request": "request"}):
        config = SessionConfig(**everything, **way)
        sessions = session_splits(x, config)
        rows |= {f"session_splits {name}": split for name, split in sessions.items()}
        rows["training_events"] = training_events(x, config, sessions)
        rows["compress_lifelong"] = compress_lifelong(sessions["test"], np.eye(x.num_items), averaged=["timestamp"])
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_no_row_holds_an_event_of_another_user(seed):
    """Each user has his own items, so an item says whose event it is."""
    rng = np.random.default_rng(seed)
    log = random_log(seed, users=25)
    log["item_id"] += 1000 * log["user_id"]
    log["request"] = log["timestamp"] // 20
    x = load_interactions(log, feedback=["request"])
    gone = rng.random(25) < 0.3
    gone[[0, 24]] = True
    x = x.where((rng.random(len(x)) < 0.6) & ~gone[x.user_index])
    for name, rows in rows_of_all_splits(x).items():
        assert len(rows), name
        for row in rows:
            items = [*row["history"], *row.get("targets", []), *row.get("lifelong", [])]
            assert set(x.item_ids[items] // 1000) <= {x.user_ids[row["user"]]}, name


def test_leave_last_out_against_brute_force():
    log = random_log(0)
    x = load_interactions(log, feedback=["play"])
    splits = leave_last_out(x)
    for user, events in events_per_user(log, x.user_ids.tolist()).items():
        assert rows_per_user(x, splits["train"])[user] == (events[:-2], [])
        assert rows_per_user(x, splits["validation"])[user] == (events[:-2], [events[-2][1]])
        assert rows_per_user(x, splits["test"])[user] == (events[:-1], [events[-1][1]])


@pytest.mark.parametrize("min_history", [0, 1, 9])
def test_global_time_split_against_brute_force_and_never_leaks(min_history):
    log = random_log(1)
    log["timestamp"][log["user_id"] == 3] += 100  # a user without training events
    x = load_interactions(log, feedback=["play"])
    splits = {
        name: rows_per_user(x, split)
        for name, split in global_time_split(x, 100, 150, min_history=min_history).items()
    }
    expected = {"train": {}, "validation": {}, "test": {}}
    for user, events in events_per_user(log, x.user_ids.tolist()).items():
        if history := [e for e in events if e[0] < 100]:
            expected["train"][user] = (history, [])
        for name, start, stop in (("validation", 100, 150), ("test", 150, 10**9)):
            history = [e for e in events if e[0] < start]
            targets = [e[1] for e in events if start <= e[0] < stop]
            if targets and len(history) >= min_history:
                expected[name][user] = (history, targets)
    assert splits == expected
    assert (3 in splits["validation"]) == (min_history == 0) and 3 not in splits["train"]


def test_global_time_split_counts_cold_users_and_rejects_bad_boundaries(caplog):
    x = load_interactions({"user_id": [1, 1, 2, 1], "item_id": [1, 2, 2, 1], "timestamp": [0, 10, 10, 20]})
    assert global_time_split(x, 10, 20)["validation"]["user"][:] == [0, 1]
    assert "validation: 1 of 2 users have no event before the period" in warnings_of(caplog)
    with pytest.raises(ValueError, match="must lie before"):
        global_time_split(x, 10, 10)
    with pytest.raises(ValueError, match=r"test_start \(None\): give both"):
        global_time_split(x, 10, None)
    with pytest.raises(ValueError, match=r"no rows in \['test'\].*from 0 to 20"):
        global_time_split(x, 10, 21)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "counts", "text"),
    [
        ("amazon_beauty_2014", (22_363, 12_101, 198_502), "title"),
        ("amazon_sports_2014", (35_598, 18_357, 296_337), "keywords"),
    ],
)
def test_amazon_has_the_published_counts_and_targets(name, counts, text):
    folder = shared_data(name)
    x = load_amazon(folder)
    assert (x.num_users, x.num_items, len(x)) == counts and len(x.items[text]) == counts[1]
    k = k_core(x, 5)
    assert (k.num_users, k.num_items, len(k)) == counts
    sequences = pd.read_parquet(folder / "sequences.parquet")["item_ids"]
    splits = leave_last_out(x)
    for split, position in (("validation", -2), ("test", -1)):
        targets = np.array(splits[split].with_format("numpy")["targets"][:])[:, 0]
        assert x.item_ids[targets].tolist() == [items[position] for items in sequences]
    row = splits["test"][100]
    assert x.item_ids[row["history"]].tolist() == sequences[100][:-1].tolist()


def test_another_data_set_than_the_layout_says(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"sequences.parquet does not exist: .* not the data set .*layout logs"
    ):
        load_amazon(tmp_path)
    pd.DataFrame({"user_id": [1], "video_id": [2], "time_ms": [3]}).to_parquet(tmp_path / "interactions.parquet")
    with pytest.raises(
        ValueError, match=r"interactions.parquet has no \['play_time_ms', .*only \['user_id', 'video_id'"
    ):
        load_kuairand(tmp_path)


@pytest.mark.shared_data
def test_kuairand_has_the_counts_of_its_readme():
    folder = shared_data("kuairand_pure_2022")
    x = load_kuairand(folder)
    assert (len(x), x.num_users, x.num_items) == (228_329, 25_156, 7_583)
    assert len(np.unique(x.item_index)) == 6_361
    assert x.feedback["is_like"].sum() == 2_710 + 474 + 731 and x.feedback["is_hate"].sum() == 127 + 30 + 33
    assert (x.feedback["duration_ms"] == 0).sum() == 3_568
    assert len(x.items["tags"]) == 7_583 and x.items["tags"].count([]) == 96

    longer = load_kuairand(folder, history=True)
    assert (len(longer), longer.num_users) == (228_329 + 817_187, 27_077)
    unknown = longer.feedback["is_click"] == -1
    assert unknown.sum() == 817_187 and (longer.feedback["play_time_ms"][~unknown] >= 0).all()
    history = pd.read_parquet(folder / "history.parquet").iloc[1000]
    mine = longer.user_index == np.searchsorted(longer.user_ids, history["user_id"])
    watched = history["watched"].tolist()
    assert longer.item_ids[longer.item_index[mine]][: len(watched)].tolist() == watched
    assert longer.timestamp[mine][len(watched) - 1] == history["last_time_ms"]
    log = pd.read_parquet(folder / "interactions.parquet")
    later = log["video_id"][log["user_id"] == history["user_id"]]  # the file is sorted by time
    assert longer.item_ids[longer.item_index[mine]][len(watched) :].tolist() == later.tolist()


@pytest.mark.shared_data
def test_target_rows_are_every_event_with_the_events_before_it():
    train = datasets.Dataset.from_dict(
        {"user": [3, 5, 9], "history": [[7, 8, 9, 7], [1], [4, 2]], "play": [[1.0, 2.0, 3.0, 4.0], [5.0], [6.0, 7.0]]}
    )
    rows = target_rows(train, max_history=2)
    assert rows["user"][:] == [3, 3, 3, 9]
    assert rows["history"][:] == [[7], [7, 8], [8, 9], [4]]
    assert rows["play"][:] == [[1.0], [1.0, 2.0], [2.0, 3.0], [6.0]]
    assert rows["targets"][:] == [[8], [9], [7], [2]]
    assert rows["length"][:] == [1, 2, 2, 1]
    assert target_rows(train.select([2, 0]), max_history=9)["history"][:] == [[4], [7], [7, 8], [7, 8, 9]]
