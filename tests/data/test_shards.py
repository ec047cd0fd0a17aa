"""A log in shards on disk is the log in one piece: same numbers bit for bit, same warnings, same errors."""

import hashlib
import json
import logging
import re
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
from transformers import AutoTokenizer

from onerec_hf.data import (
    DataFolder,
    EventShards,
    GlobalTimeSplit,
    LeaveLastOut,
    PastRates,
    SessionConfig,
    SessionSplit,
    SplitWriter,
    global_time_split,
    k_core,
    leave_last_out,
    load_interactions,
    load_shards,
    load_splits,
    log_shards,
    past_rates,
    session_splits,
    stream_split,
    training_events,
    with_users,
)
from onerec_hf.data.log_shards import shard_of
from onerec_hf.scripts import prepare

OFF = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}


def random_log(seed, events=800, users=60, items=40):
    """Few instants and few items: many ties, and some events twice."""
    rng = np.random.default_rng(seed)
    log = {
        "user_id": (users * rng.random(events) ** 2).astype(int) * 3,
        "item_id": (items * rng.random(events) ** 2).astype(int),
        "timestamp": rng.integers(0, 60, events),
        "is_click": rng.integers(0, 2, events).astype(np.int8),
        "Is_Click": rng.integers(0, 4, events) / 4,  # another column, which differs in upper case alone
    }
    log["request"] = log["timestamp"] // 5
    repeated = rng.integers(0, events, 40)
    order = rng.permutation(events + 40)
    return pd.DataFrame({name: np.concatenate([v, v[repeated]])[order] for name, v in log.items()})


def write(frame, folder, files=3):
    """In several files and row groups, as a log is."""
    folder.mkdir()
    for i, part in enumerate(np.array_split(np.arange(len(frame)), files)):
        frame.iloc[part].to_parquet(folder / f"{i}.parquet", row_group_size=100, index=False)
    return str(folder / "*.parquet")


def warnings_of(caplog):
    found = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    caplog.clear()
    return found


def assert_same(x, shards):
    assert isinstance(shards, EventShards) and len(shards) > 1
    assert shards.user_ids.tolist() == x.user_ids.tolist() and shards.user_ids.dtype == x.user_ids.dtype
    assert shards.item_ids.tolist() == x.item_ids.tolist() and shards.item_ids.dtype == x.item_ids.dtype
    for own, other in ((shards.items, x.items), (shards.users, x.users)):
        assert list(own) == list(other)
        for name in own:
            np.testing.assert_array_equal(own[name], other[name])
    parts = [(users[own.user_index], own) for users, own in shards]
    user = np.concatenate([part[0] for part in parts])
    order = np.argsort(user, kind="stable")
    columns = {"user_index": (user, x.user_index)}
    for name in ("item_index", "timestamp"):
        columns[name] = np.concatenate([getattr(own, name) for _, own in parts]), getattr(x, name)
    for name in x.feedback:
        columns[name] = np.concatenate([own.feedback[name] for _, own in parts]), x.feedback[name]
    for name, (found, expected) in columns.items():
        assert found.dtype == expected.dtype, name
        np.testing.assert_array_equal(found[order], expected, err_msg=name)


def as_text(frame):
    return frame.assign(user_id=frame.user_id.astype(str), item_id="i" + frame.item_id.astype(str))


def with_gaps(frame):
    holes = np.random.default_rng(0).permutation(len(frame))
    frame = frame.astype({"is_click": float, "item_id": float})
    frame.loc[holes[:30], "is_click"] = np.nan
    frame.loc[holes[20:50], "item_id"] = np.nan
    return frame


ITEMS = {"item_id": np.arange(35)[::-1], "title": [f"title {i}" for i in range(35)]}
USERS = {"user_id": [str(i) for i in range(0, 150, 3)], "age": np.arange(50) / 7}
ALL = ["is_click", "Is_Click", "request"]


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (None, {"feedback": ALL}),
        (None, {"feedback": ALL, "drop_duplicates": True}),
        (None, {"drop_duplicates": True}),
        (as_text, {"feedback": ["Is_Click"]}),
        (lambda frame: frame.drop(columns="timestamp"), {"columns": {"timestamp": None}, "feedback": ["is_click"]}),
        (lambda frame: frame.assign(timestamp=frame.timestamp / 7), {}),
        (lambda frame: frame.assign(timestamp=pd.to_datetime(frame.timestamp, unit="us")), {"drop_duplicates": True}),
        (lambda frame: frame.assign(timestamp=pd.to_datetime(frame.timestamp, unit="D").astype(str)), {}),
        (lambda frame: frame.assign(request=frame.request.astype(str)), {"feedback": ["request"]}),
        (with_gaps, {"drop_nulls": True, "feedback": ["is_click"]}),
        (None, {"items": ITEMS, "users": USERS, "drop_unknown": True, "feedback": ["is_click"]}),
        (lambda frame: frame.rename(columns={"item_id": "vid"}), {"columns": {"item_id": "vid"}}),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_shards_hold_the_same_events(change, settings, seed, tmp_path, caplog):
    frame = random_log(seed)
    source = write(change(frame) if change else frame, tmp_path / "log")
    x = load_interactions(source, **settings)
    expected = warnings_of(caplog)
    shards = load_shards(source, tmp_path / "work", num_shards=5, **settings)
    assert warnings_of(caplog) == expected
    assert expected or "timestamp" in settings["columns"]
    assert_same(x, shards)
    x, shards = k_core(x, 8), shards.k_core(8)
    assert 0 < len(x) < len(frame) - 20
    assert_same(x, shards)
    assert shards.num_events == len(x)


def test_a_user_is_in_the_shard_that_its_id_says(tmp_path):
    for number, (change, kind) in enumerate([(lambda frame: frame, int), (as_text, str)]):
        source = write(change(random_log(0)), tmp_path / f"log{number}")
        shards = load_shards(source, tmp_path / f"work{number}", num_shards=4)
        for path, (users, _) in zip(shards.shards, shards):
            assert {shard_of(kind(user), 4) for user in shards.user_ids[users]} == {int(path.stem[-5:])}
    digest = hashlib.md5(b"42").hexdigest()
    assert shard_of(42, 7) == shard_of("42", 7) == int(digest[:8], 16) % 7


def test_any_source_can_be_cut_and_a_small_log_is_not(tmp_path):
    frame, settings = random_log(3), {"feedback": ALL}
    x = load_interactions(frame, **settings)
    frame.to_csv(tmp_path / "log.csv", index=False)
    table = pa.Table.from_pandas(frame)
    pa.parquet.write_table(table, tmp_path / "log.parquet")
    data_set = pa.dataset.dataset(tmp_path / "log.parquet")
    for i, source in enumerate((frame, table, data_set, tmp_path / "log.csv", tmp_path / "log.parquet")):
        own = load_interactions(source, **settings)  # a CSV file has wider integers
        assert_same(own, load_shards(source, tmp_path / f"work{i}", num_shards=3, **settings))
    whole = load_shards(tmp_path / "log.parquet", tmp_path / "none", **settings)
    assert len(whole) == 1 and not (tmp_path / "none").exists()
    ((users, own),) = whole
    assert (
        users.tolist() == list(range(x.num_users))
        and own.feedback["is_click"].tolist() == x.feedback["is_click"].tolist()
    )
    with pytest.raises(ValueError, match="num_shards=0: at least 1, or leave it out"):
        load_shards(frame, tmp_path / "work", num_shards=0)


def test_shards_of_an_earlier_call_are_taken_only_if_asked(tmp_path):
    logs = [write(random_log(seed), tmp_path / f"log{seed}") for seed in (0, 1)]
    first, second = (load_interactions(log) for log in logs)
    assert_same(first, load_shards(logs[0], tmp_path / "work", num_shards=5))
    assert_same(second, load_shards(logs[1], tmp_path / "work", num_shards=3))
    assert len(list((tmp_path / "work").glob("events-*"))) == 3
    assert_same(second, load_shards(logs[0], tmp_path / "work", num_shards=5, resume=True))


@pytest.mark.parametrize(
    ("change", "settings"),
    [
        (with_gaps, {"feedback": ["is_click"]}),
        (with_gaps, {}),
        (lambda frame: frame.assign(item_id=np.nan), {"drop_nulls": True}),
        (lambda frame: frame.assign(item_id=frame.item_id + 0.5), {}),
        (lambda frame: frame.assign(timestamp="yesterday"), {}),
        (lambda frame: frame.assign(timestamp=frame.timestamp > 30), {}),
        (lambda frame: frame.rename(columns={"item_id": "itm_id"}), {}),
        (None, {"items": ITEMS}),
        (None, {"items": {"item_id": [f"a{i}" for i in range(9)], "title": list("abcdefghi")}}),
        (None, {"users": {"user_id": [1000, 1000], "age": [1, 2]}}),
        (None, {"feedback": ["target_x"]}),
        (None, {"columns": {"is_like": "like"}}),
        (lambda frame: frame.iloc[:0], {}),
    ],
)
def test_the_same_errors(change, settings, tmp_path):
    frame = random_log(0)
    source = write(change(frame) if change else frame, tmp_path / "log", files=1)
    with pytest.raises((ValueError, TypeError)) as expected:
        load_interactions(source, **settings)
    with pytest.raises(expected.type) as found:
        load_shards(source, tmp_path / "work", num_shards=5, **settings)
    assert str(found.value) == str(expected.value)


SPLITTERS = {
    "leave last out": (LeaveLastOut, leave_last_out),
    "by time": (lambda: GlobalTimeSplit(30, 45, 1), lambda x: global_time_split(x, 30, 45, 1)),
}
CONFIGS = [
    SessionConfig(request="request", interactions={}, min_watched=2, min_watch_time_ms=0, min_interactions=0),
    SessionConfig(max_gap=3, max_events=4, history="all", interactions={"Is_Click": 0.7}, **OFF),
]
for i, config in enumerate(CONFIGS):
    for name, times in (("", (None, None)), (" by time", (30, 45))):
        SPLITTERS[f"sessions {i}{name}"] = (
            lambda c=config, t=times: SessionSplit(c, *t),
            lambda x, c=config, t=times: session_splits(x, c, *t),
        )


def joined(parts):
    """Rows of all shards, by user; a shard keeps the order of its rows."""
    table = pa.concat_tables(part.with_format("arrow")[:] for part in parts)
    return table.take(pa.array(np.argsort(table["user"].to_numpy(), kind="stable")))


@pytest.mark.parametrize("name", SPLITTERS)
@pytest.mark.parametrize("seed", [0, 1])
def test_shards_become_the_same_rows(name, seed, tmp_path, caplog):
    make, function = SPLITTERS[name]
    source = write(random_log(seed), tmp_path / "log")
    x = load_interactions(source, feedback=ALL)
    shards = load_shards(source, tmp_path / "work", num_shards=5, feedback=ALL)
    warnings_of(caplog)
    expected = function(x)
    warned = warnings_of(caplog)
    splitter = make()
    parts, known = [], []
    for users, own in shards:
        splits = splitter.rows(own)
        known.append(with_users(splitter.training_events(own, splits), users))
        parts.append({name: with_users(rows, users) for name, rows in splits.items()})
    splitter.finish()
    assert warnings_of(caplog) == warned
    for split, rows in expected.items():
        assert len(rows) > 0
        found = joined([part[split] for part in parts])
        assert found["length"].to_pylist() == list(map(len, rows["history"]))
        assert found.drop_columns("length").equals(rows.with_format("arrow")[:].combine_chunks()), split
    if isinstance(splitter, SessionSplit):
        events = training_events(x, splitter.config, expected, splitter.boundaries[0])
    else:
        events = expected["train"]
    assert joined(known).drop_columns("length").equals(events.with_format("arrow")[:].combine_chunks())


@pytest.mark.parametrize("settings", [{}, {"k_core": 5, "watched": '{"is_click": 1}'}, {"sessions": '{"max_gap": 3}'}])
def test_prepare_makes_the_same_folder_whatever_the_number_of_shards(settings, tmp_path):
    if "sessions" in settings:
        settings = {"sessions": json.dumps({"max_gap": 3, "interactions": {}, **OFF})}
    source = write(random_log(0, events=1500), tmp_path / "log")
    sizes = {"collaborative_dim": 8, "codebook_size": 4, "num_levels": 3, "feedback": ["is_click"]}
    for shards in (1, 4):
        prepare.main(
            prepare.PrepareArguments(source, str(tmp_path / str(shards)), num_shards=shards, **sizes, **settings)
        )
    one, four = (DataFolder(tmp_path / name) for name in ("1", "4"))
    assert len(list((tmp_path / "4" / "splits" / "train").iterdir())) == 4
    assert sorted(path.name for path in (tmp_path / "4").iterdir()) == sorted(
        path.name for path in (tmp_path / "1").iterdir()
    )
    for name, rows in one.splits.items():
        assert joined([four.splits[name]]).equals(joined([rows])), name
    assert four.items[:] == one.items[:] and four.users[:] == one.users[:]
    np.testing.assert_array_equal(four.item_embeddings, one.item_embeddings)
    catalogues = [AutoTokenizer.from_pretrained(tmp_path / name / "tokenizer").catalogue for name in ("1", "4")]
    assert catalogues[0].fingerprint() == catalogues[1].fingerprint()
    assert catalogues[0].popularity.tolist() == catalogues[1].popularity.tolist()


def rows_of(users, kind=np.int32):
    histories = [np.arange(user + 1, dtype=kind) for user in users]
    return datasets.Dataset(pa.table({"user": pa.array(users, pa.int32()), "history": pa.array(histories)}))


def test_the_contract(tmp_path):
    folder = tmp_path / "data"
    writer = SplitWriter(folder)
    for shard, users in enumerate(([0, 3], [1, 2])):
        writer.write({"train": rows_of(users), "test": rows_of(users[:1])}, shard, 2)
    assert not (folder / "splits").exists()
    writer.finish()
    splits = load_splits(folder)
    assert splits["train"]["user"][:] == [0, 3, 1, 2] and splits["test"]["user"][:] == [0, 1]
    assert splits["train"].features["history"] == datasets.List(datasets.Value("int32"))
    contract, parts = folder / "splits" / "contract.json", sorted((folder / "splits" / "train").iterdir())
    assert [path.name for path in parts] == ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"]
    # what a warehouse writes: its own names, any whole numbers, no count
    contract.write_text('{"version": 1}')
    for path in parts:
        path.unlink()
    pa.parquet.write_table(rows_of([5], np.int64).data.table, folder / "splits" / "train" / "part-0-x.snappy.parquet")
    assert load_splits(folder)["train"]["user"][:] == [5]


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda s: (s / "train" / "part-00001-of-00002.parquet").unlink(), r"train has 2 rows in 1 files, its contr"),
        (lambda s: (s / "contract.json").unlink(), r"splits has no contract.json: the run that made it was stopped"),
        (lambda s: (s / "contract.json").write_text('{"version": 2}'), r"has version 2, this package reads 1"),
        (
            lambda s: (s / "train" / "part-00001-of-00002.parquet").write_bytes(b"PAR1 and no more"),
            r"train cannot be read .*a file is cut off. Prepare the data again",
        ),
        (
            lambda s: pa.parquet.write_table(
                pa.table({"user": [1, 2], "history": ["a", "b"]}), s / "train" / "part-00001-of-00002.parquet"
            ),
            r"part-00001-of-00002.parquet has the columns .*files of one split need the same ones",
        ),
        (
            lambda s: [
                pa.parquet.write_table(pa.table({"user": [1, 2], "history": ["a", "b"]}), path)
                for path in (s / "train").iterdir()
            ],
            r"train has the columns .*'history': 'string'\}: `user` is an integer",
        ),
        (lambda s: [path.unlink() for path in (s / "test").iterdir()] and (s / "test").rmdir(), r"has no \['test'\]"),
    ],
)
def test_splits_that_are_not_whole_are_refused(damage, match, tmp_path):
    writer = SplitWriter(tmp_path)
    for shard, users in enumerate(([0, 3], [1, 2])):
        writer.write({"train": rows_of(users), "test": rows_of(users)}, shard, 2)
    writer.finish()
    damage(tmp_path / "splits")
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        load_splits(tmp_path)


def test_splits_of_earlier_versions_are_read(tmp_path):
    rows = rows_of([0, 1, 2])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(str(tmp_path / "splits"))
    assert load_splits(tmp_path)["train"][:] == rows[:]
    with pytest.raises(ValueError, match=r"written by an earlier version, .* can be read but not streamed: prepare"):
        stream_split(tmp_path)


def test_folders_that_are_a_column(tmp_path):
    frame = random_log(0)
    for day, rows in frame.groupby("is_click"):
        (tmp_path / "log" / f"is_click={day}").mkdir(parents=True)
        rows.drop(columns="is_click").to_parquet(tmp_path / "log" / f"is_click={day}" / "log.parquet", index=False)
    x = load_interactions(tmp_path / "log", feedback=["is_click"])
    assert_same(x, load_shards(tmp_path / "log", tmp_path / "work", num_shards=3, feedback=["is_click"]))


@pytest.mark.parametrize("place", ["log.parquet", "day=1/log.parquet"])
def test_what_was_read_of_a_parquet_file_is_not_kept(place, tmp_path):
    """Arrow keeps it until the end of the file by default, and the file may be larger than memory."""
    path = tmp_path / "log" / place
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(pa.table({"user_id": [1], "item_id": [2]}), path)
    opened = log_shards._open(tmp_path / "log", ["item_id"], "train")
    assert opened.format.default_fragment_scan_options.pre_buffer is False
    assert [part["item_id"].to_pylist() for part in opened.batches(["item_id"], 10)] == [[2]]


def test_a_run_that_fails_leaves_an_earlier_folder_as_it_was(tmp_path):
    settings = {"source": random_log(0), "output": str(tmp_path), "codebook_size": 4, "num_shards": 2}
    prepare.main(prepare.PrepareArguments(**settings, collaborative_dim=4, num_levels=3))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="item embeddings must have shape"):
        np.save(tmp_path.parent / "short.npy", np.zeros((3, 4)))
        embeddings = str(tmp_path.parent / "short.npy")
        prepare.main(prepare.PrepareArguments(**settings, embeddings=embeddings, collaborative_dim=0))
    assert sorted(tmp_path.rglob("*")) == before
    assert len(DataFolder(tmp_path).splits["train"]) > 0


def test_the_sql_of_the_documentation_makes_the_same_splits(tmp_path):
    page = (Path(__file__).resolve().parents[2] / "docs" / "large_data.md").read_text(encoding="utf-8")
    (sql,) = re.findall(r"```sql\n(.*?)```", page, re.S)
    frame = random_log(0, events=300)  # some users with one and two events
    database = duckdb.connect()
    database.register("frame", frame.assign(row=np.arange(len(frame))))
    database.execute("CREATE TABLE log AS SELECT user_id, item_id, timestamp, row FROM frame")
    database.execute(sql)
    for name in ("train", "validation", "test"):
        (tmp_path / "warehouse" / "splits" / name).mkdir(parents=True)
        for shard in range(4):
            database.execute(
                f'COPY (SELECT * EXCLUDE (shard) FROM {name} WHERE shard = {shard} ORDER BY "user") TO '
                f"'{tmp_path}/warehouse/splits/{name}/part-{shard}.parquet'"
            )
    (tmp_path / "warehouse" / "splits" / "contract.json").write_text('{"version": 1}', encoding="utf-8")
    sizes = {"collaborative_dim": 4, "codebook_size": 8, "num_levels": 3, "num_shards": 4}
    prepare.main(prepare.PrepareArguments(source=frame, output=str(tmp_path / "ours"), **sizes))
    ours = DataFolder(tmp_path / "ours")
    for name, rows in load_splits(tmp_path / "warehouse").items():
        assert len(rows) == len(ours.splits[name]) > 0
        assert rows[:] == ours.splits[name].select_columns(rows.column_names)[:], name
    parts = {name: getattr(ours, name) for name in ("items", "users", "tokenizer", "quantizer", "item_embeddings")}
    both = DataFolder.save(tmp_path / "warehouse", splits=None, report={}, **parts)
    assert both.splits["test"]["targets"][:] == ours.splits["test"]["targets"][:]
    assert len(next(iter(both.stream("train")))["history"]) > 0


def test_past_rates_of_shards_are_those_of_the_log(tmp_path):
    source = write(random_log(0), tmp_path / "log")
    x = load_interactions(source, feedback=["is_click"])
    expected = past_rates(x.timestamp, x.item_index, x.feedback["is_click"].astype(float), x.num_items, [20, 40])
    counted = PastRates(x.num_items, [20, 40])
    for _, own in load_shards(source, tmp_path / "work", num_shards=4, feedback=["is_click"]):
        counted.add(own.timestamp, own.item_index, own.feedback["is_click"].astype(float))
    for found, whole in zip(counted.rates(), expected):
        np.testing.assert_array_equal(found, whole)  # sums of 0 and 1
