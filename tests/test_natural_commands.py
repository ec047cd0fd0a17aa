"""What a user types first with the commands, on a log of one's own: each call is right, or says what to type in its
place.
"""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset
import pytest

from onerec_hf import OneRec
from onerec_hf.data import DataFolder, load_interactions, load_splits, read_table
from onerec_hf.scripts import leaderboard, prepare, sft

from .test_onerec import FAST, interactions  # noqa: F401  a fixture


@pytest.fixture(scope="module")
def data(interactions, tmp_path_factory) -> Path:  # noqa: F811
    """A data folder of 60 users and 40 items."""
    folder = tmp_path_factory.mktemp("commands") / "data"
    settings = {"codebook_size": 8, "collaborative_dim": 16}
    prepare.main(prepare.PrepareArguments(source=interactions, output=str(folder), **settings))
    return folder


# ---- sft without a config
# ----------------------------------------------------------------------------------------------


def test_sft_without_a_config_is_small_and_says_how_long_it_takes(data, tmp_path, capsys):
    command = ["--data", str(data), "--output_dir", str(tmp_path), "--max_steps", "20", "--use_cpu", "true"]
    sft.run([*command, "--report_to", "none", "--per_device_train_batch_size", "4", "--num_beams", "20"])
    printed = capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] == 64 and config["num_hidden_layers"] == 2
    parameters = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))["num_parameters"]
    assert parameters < 10**6
    assert "seconds per step: about " in printed and " seconds left, evaluations apart" in printed


@pytest.mark.parametrize("system", ["onerec", "onerec_v1", "onerec_v2"])
def test_every_system_is_small_unless_a_width_is_named(data, system):
    def config(**given):
        return sft.make_config(sft.ModelArguments(data=str(data), **given), sft.DataFolder(str(data)))

    small = config(model={"model_type": system, "dropout": 0.1})
    assert (small.model_type, small.hidden_size, small.num_experts, small.dropout) == (system, 64, 0, 0.1)
    own = config(model={"model_type": system, "hidden_size": 32, "num_attention_heads": 2})
    assert own.hidden_size == 32 and own.num_hidden_layers == type(own)().num_hidden_layers
    if system == "onerec_v2":
        assert config(model_config="models/onerec_v2_0.1b.yaml").hidden_size == 640


# ---- sources of a log
# -------------------------------------------------------------------------------------------------


class Stream:
    """What a polars DataFrame, a DuckDB relation and others offer: the stream of the Arrow C interface."""

    def __init__(self, table):
        self.table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class Query:
    """A polars LazyFrame."""

    def collect(self):
        raise AssertionError("a query is not run behind one's back")


@pytest.fixture(scope="module")
def log(interactions, tmp_path_factory):  # noqa: F811
    """Ids with zeros in front, ISO times, and a folder of halves."""
    rows = interactions.assign(
        item_id="0" + interactions["item_id"].str[4:],
        timestamp=pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(interactions["timestamp"], unit="h"),
    )
    rows["timestamp"] = rows["timestamp"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")
    folder = tmp_path_factory.mktemp("logs")
    for name, part in (("a", rows[:200]), ("b", rows[200:])):
        part.to_parquet(folder / f"{name}.parquet", index=False)
        part.to_csv(folder / f"{name}.csv.gz", index=False)
    return rows, folder


SOURCES = {
    "a pattern of parquet files": lambda rows, folder: str(folder / "*.parquet"),
    "a pattern of csv.gz": lambda rows, folder: str(folder / "*.csv.gz"),
    "every folder below": lambda rows, folder: str(folder.parent / folder.name / "**" / "*.parquet"),
    "a pyarrow stream": lambda rows, folder: pa.Table.from_pandas(rows).to_reader(max_chunksize=64),
    "a pyarrow data set": lambda rows, folder: pyarrow.dataset.dataset(str(folder / "a.parquet")),
    "polars": lambda rows, folder: Stream(pa.Table.from_pandas(rows)),
    "a streaming data set": lambda rows, folder: datasets.load_dataset(
        "parquet", data_files=str(folder / "*.parquet"), split="train", streaming=True
    ),
    "a generator's data set": lambda rows, folder: datasets.IterableDataset.from_generator(
        lambda: iter(rows.to_dict("records"))
    ),
    "a list of rows": lambda rows, folder: rows.to_dict("records"),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_log_is_read_from(kind, log):
    rows, folder = log
    expected = load_interactions(rows[:200] if kind == "a pyarrow data set" else rows)
    found = load_interactions(SOURCES[kind](rows, folder))
    for name in ("user_index", "item_index", "timestamp"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert list(found.item_ids) == list(expected.item_ids) and "00" in list(found.item_ids)


def test_fit_and_prepare_take_patterns_and_streams(log, tmp_path):
    rows, folder = log
    parquet = str(folder / "*.parquet")
    model = OneRec(**FAST).fit(datasets.load_dataset("parquet", data_files=parquet, split="train", streaming=True))
    assert model.histories["user3"] == rows[rows["user_id"] == "user3"].sort_values("timestamp")["item_id"].tolist()
    assert len(model.recommend(["user3"], k=3)) == 3
    command = ["--source", str(folder / "*.csv.gz"), "--output", str(tmp_path), "--codebook_size", "8"]
    prepare.run([*command, "--collaborative_dim", "16"])
    assert len(load_splits(tmp_path)["test"]) == 60


def test_one_text_id_makes_text_of_the_others(tmp_path):
    """In a pattern the files are one column: 7 of one file and 007 of the other are two items."""
    for name, items in (("a", ["7", "8"]), ("b", ["007", "9"])):
        rows = {"user_id": ["u", "v"], "item_id": items, "timestamp": [1, 2]}
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False)
    found = read_table(str(tmp_path / "*.csv"), ids=["user_id", "item_id"])
    assert found["item_id"].to_pylist() == ["7", "8", "007", "9"]


def test_what_is_no_log_is_said(log, tmp_path):
    rows, folder = log
    splits = datasets.load_dataset("parquet", data_files=str(folder / "*.parquet"))
    with pytest.raises(TypeError, match=r"DatasetDict; it has the splits \['train'\]: pass one.*data\['train'\]"):
        OneRec().fit(splits)
    streams = datasets.IterableDatasetDict({"train": splits["train"].to_iterable_dataset()})
    with pytest.raises(TypeError, match=r"IterableDatasetDict; it has the splits"):
        load_interactions(streams)
    with pytest.raises(TypeError, match=r"Query; it is a query: pass what its `collect\(\)` returns"):
        OneRec().fit(Query())
    with pytest.raises(FileNotFoundError, match=r"no file matches .*\*\.csv"):
        OneRec().fit(str(folder / "*.csv"))
    rows.rename(columns={"item_id": "sku"}).to_parquet(tmp_path / "b.parquet")
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet has the columns .*'sku'.*files of one log need the same ones"):
        load_interactions(str(tmp_path / "*.parquet"))


# ---- one's own model in the leaderboard
# -------------------------------------------------------------------------------


def popular(histories, k):
    """As somebody's own code: item ids in, item ids out."""
    assert all(isinstance(item, str) for history in histories for item in history)
    return [[f"item{i}" for i in range(40)][:k]] * len(histories)


@pytest.fixture
def own(data, tmp_path, monkeypatch):
    """A folder with one's own code, and a command that runs the entries."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])

    def run(entries):
        Path("entries.yaml").write_text(
            "popularity: {recipe: baseline, name: popularity}\n" + entries, encoding="utf-8"
        )
        leaderboard.run(["--dataset", str(data), "--entries", "entries.yaml", "--output", "out", "--seeds", "0"])
        return json.loads(Path("out/leaderboard.json").read_text(encoding="utf-8"))["results"]

    return run


def test_one_s_own_model_in_the_leaderboard(data, own, capsys):
    split = DataFolder(str(data))
    item_ids = split.catalogue.item_ids
    rows = {"user_id": [split.users[user]["user_id"] for user in split.splits["test"]["user"]]}
    rows["item_ids"] = [[f"item{i}" for i in range(40)]] * len(rows["user_id"])
    pd.DataFrame(rows).to_parquet("mine.parquet")
    Path("own_model.py").write_text("from tests.test_natural_commands import popular as recommend", encoding="utf-8")
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    found = own("mine: {predictions: mine.parquet}\nlive: {python: 'own_model:recommend'}\n")
    assert "| mine | 1 |" in capsys.readouterr().out
    order = [np.flatnonzero(item_ids == f"item{i}")[0] for i in range(40)]
    expected = {"test": [], "test_exclude_seen": []}
    for row in split.splits["test"]:
        for kind, left in (("test", order), ("test_exclude_seen", [i for i in order if i not in row["history"]])):
            expected[kind].append(len(set(left[:10]) & set(row["targets"])) / len(set(row["targets"])))
    for name in ("mine", "live"):
        for kind, recalls in expected.items():
            assert found[name][kind]["recall@10"][0] == pytest.approx(np.mean(recalls))
    assert found["popularity"]["interval"]["test"] == [0.0, 0.0]
    # a file that has changed is scored anew
    rows["item_ids"] = [["no item of the log", f"item{u}"] for u in range(len(rows["user_id"]))]
    rows["item_ids"][0] = []
    pd.DataFrame(rows).iloc[:40].to_parquet("mine.parquet")
    with pytest.raises(ValueError, match=r"mine.parquet has no row for 20 of the 60 test users; the first is 'user"):
        own("mine: {predictions: mine.parquet}")
    rows["item_ids"] = [items if len(items) < 2 else [items[0], "item1"] for items in rows["item_ids"]]
    pd.DataFrame(rows).to_parquet("mine.parquet")
    assert own("mine: {predictions: mine.parquet}")["mine"]["test"] != found["mine"]["test"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{python: own_model}", "python='own_model': write module:function"),
        ("{python: 'no_such_module:f'}", "No module named 'no_such_module'"),
        ("{python: 'json:nothing'}", "has no attribute 'nothing'"),
        ("{python: 'json:__name__'}", "is a str: name a function"),
        ("{python: 'wrong:short'}", "wrong:short returned 1 lists for 2 histories"),
        ("{python: 'wrong:twice'}", "a list of wrong:twice has an item twice"),
        ("{python: 'wrong:foreign'}", r"wrong:foreign has no item id of .*; the first is .*'x'"),
        ("{predictions: absent.parquet}", "absent.parquet does not exist"),
        ("{predictions: mine.csv}", r"mine.csv has no columns \['item_ids'\]"),
    ],
)
def test_one_s_own_model_is_checked_before_anything_runs(own, entry, message):
    code = ["short = lambda histories, k: [['item1']]", "twice = lambda histories, k: [['item1', 'item1']] * 2"]
    Path("wrong.py").write_text("\n".join([*code, "foreign = lambda histories, k: [['x']] * 2"]), encoding="utf-8")
    Path("mine.csv").write_text("user_id,items\nuser1,item1\n", encoding="utf-8")
    sys.modules.pop("wrong", None)
    with pytest.raises(ValueError, match=f"(?s)the entry 'mine' cannot run: .*{message}.*Nothing was started"):
        own(f"mine: {entry}")
    assert not list(Path("out").glob("*/*/metrics.json"))


def test_an_entry_of_before_the_commands_is_the_same_run(tmp_path):
    (tmp_path / "old.yaml").write_text("a: {recipe: baseline.py, name: popularity}", encoding="utf-8")
    (tmp_path / "new.yaml").write_text("a: {recipe: baseline, name: popularity}", encoding="utf-8")
    old, new = (leaderboard.load_entries(str(tmp_path / f"{name}.yaml")) for name in ("old", "new"))
    assert old == new == {"a": {"recipe": "baseline", "name": "popularity"}}
    (tmp_path / "command.json").write_text('["baseline.py", "--seed", "0"]', encoding="utf-8")
    assert leaderboard.same_run(["baseline", "--seed", "0"], tmp_path)
    assert not leaderboard.same_run(["baseline", "--seed", "1"], tmp_path)


# ---- the first recommendations
# ----------------------------------------------------------------------------------------


def test_the_page_shows_what_is_timed(tmp_path):
    """The program and the commands of docs/natural_calls.md are those of the benchmark; they find the columns."""
    from benchmarks.first_recommendations import COMMANDS, PYTHON, write_log

    page = (Path(__file__).resolve().parents[1] / "docs" / "natural_calls.md").read_text(encoding="utf-8")
    for line in [*PYTHON.split("\n"), *COMMANDS]:
        assert not line or f"    {line}\n" in page, line
    write_log(tmp_path / "log.csv", num_users=50, num_items=30, events_per_user=10)
    log = load_interactions(str(tmp_path / "log.csv"))
    assert (len(log.timestamp), log.num_users) == (500, 50) and list(log.user_ids)[:2] == ["user-00000", "user-00001"]
    assert log.timestamp.max() > pd.Timestamp("2026-01-09", tz="UTC").timestamp() * 1000
