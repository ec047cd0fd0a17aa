"""Re-ranking by what a chosen item is worth: the values against plain loops, the order, the choice of the weight."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from onerec_hf.baselines import CoOccurrence
from onerec_hf.data import DataFolder
from onerec_hf.hub.cards import reranking_text
from onerec_hf.hub.push import repository_files
from onerec_hf.recommender import Recommender
from onerec_hf.reranker import Reranker
from onerec_hf.scripts import baseline, leaderboard, prepare, rerank
from onerec_hf.scripts.item_values import item_values

from .numeric import assert_close
from .test_recommender import HISTORIES, recommender_of
from .tiny import tiny_catalogue

LOGS = [[0, 1, 2, 3], [3, 1, 2, 9], [10, 11, 12, 1], [2, 9, 30]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A data folder whose events have seconds and whose items have prices, and a counter."""
    folder, rng = tmp_path_factory.mktemp("values"), np.random.default_rng(0)
    rows = [(user, int((user + step * (1 + rng.integers(2))) % 30), step) for user in range(60) for step in range(7)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    log["seconds"] = np.where(log.item_id % 2 == 0, 1.0, 3.0) + rng.random(len(log))
    items = pd.DataFrame({"item_id": np.arange(30), "price": np.arange(30.0)})
    items.loc[7, "price"] = np.nan
    items["loss"], items["title"] = -items.price, "a title"
    items.to_parquet(folder / "items.parquet")
    settings = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2, "feedback": ["seconds"]}
    settings |= {"items": str(folder / "items.parquet"), "output": str(folder / "data")}
    prepare.main(prepare.PrepareArguments(source=log, **settings))
    baseline.main(baseline.BaselineArguments("cooccurrence", str(folder / "data"), str(folder / "cooccurrence")))
    return folder


def test_the_value_of_an_item_is_its_mean_over_the_training_events(trained):
    data = DataFolder(trained / "data")
    own: dict[int, list[float]] = {item: [] for item in range(30)}
    for row in data.splits["train"]:
        for item, seconds in zip(row["history"], row["seconds"]):
            own[item].append(seconds)
    mean = np.mean([seconds for many in own.values() for seconds in many])
    wanted = [(sum(many) + 20 * mean) / (len(many) + 20) / mean for many in own.values()]
    assert_close(item_values(data, "seconds"), torch.tensor(wanted, dtype=torch.float))


def test_the_value_of_an_item_may_be_a_column_of_its_table(trained):
    """Relative to the mean, which is what an item without a value gets; never 0, whose logarithm would forbid it."""
    found = item_values(DataFolder(trained / "data"), "price")
    mean = np.mean([price for price in range(30) if price != 7])
    wanted = [1.0 if price == 7 else max(price / mean, 0.01) for price in range(30)]
    assert_close(found, torch.tensor(wanted, dtype=torch.float))


def with_seconds(folder, lists, kind=None):
    """The folder with other `seconds`, and its training rows."""
    (path,) = (folder / "splits" / "train").glob("*.parquet")
    table = pyarrow.parquet.read_table(path)
    changed = pa.array(lists(table["seconds"].to_pylist()), kind or table.schema.field("seconds").type)
    table = table.set_column(table.column_names.index("seconds"), "seconds", changed)
    pyarrow.parquet.write_table(table.replace_schema_metadata(None), path)
    return DataFolder(folder), table.select(["history", "seconds"]).to_pylist()


@pytest.mark.parametrize("unknown", [None, -1.0, float("nan")])
def test_events_without_a_number_do_not_count(trained, tmp_path, unknown):
    """Nor does a user whose events have none at all."""
    shutil.copytree(trained / "data", tmp_path / "data")
    data, rows = with_seconds(tmp_path / "data", lambda lists: [None] + [[unknown, *own[1:]] for own in lists[1:]])
    seconds = [pair for row in rows[1:] for pair in zip(row["history"][1:], row["seconds"][1:])]
    mean = np.mean([number for _, number in seconds])
    own = [number for item, number in seconds if item == 3]
    expected = (sum(own) + 20 * mean) / (len(own) + 20) / mean
    assert float(item_values(data, "seconds")[3]) == pytest.approx(expected, rel=1e-5)


def test_of_sessions_each_target_counts_once(tmp_path):
    """Their rows repeat what was before them."""
    rows = [
        (user, 10 * session + place, session * 10**8 + place)
        for user in range(4)
        for session in range(5)
        for place in range(4)
    ]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    log["seconds"] = np.random.default_rng(0).random(len(log))
    log["view"] = 1
    settings = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2, "feedback": ["seconds", "view"]}
    sessions = {"max_gap": 1000, "min_watched": 1, "min_watch_time_ms": 0, "min_interactions": 0, "interactions": {}}
    settings |= {"sessions": json.dumps(sessions), "watched": '{"view": 1}'}
    prepare.main(prepare.PrepareArguments(source=log, output=str(tmp_path / "data"), **settings))
    data = DataFolder(tmp_path / "data")
    own: dict[int, list[float]] = {item: [] for item in range(data.num_items)}
    for row in data.splits["train"]:
        for item, seconds in zip(row["targets"], row["target_seconds"]):
            own[item].append(seconds)
    assert max(map(len, own.values())) == 4  # once for each user
    mean = np.mean([seconds for many in own.values() for seconds in many])
    wanted = [(sum(many) + 20 * mean) / (len(many) + 20) / mean for many in own.values()]
    assert_close(item_values(data, "seconds"), torch.tensor(wanted, dtype=torch.float))


def test_with_weight_1_the_order_is_by_probability_times_value():
    values = torch.linspace(0.5, 4.0, 65)
    reranker = Reranker({"counter": CoOccurrence(65).fit(LOGS)}, search=False, item_values=values)
    items, features = reranker.candidates(None, [[1], [2, 3]], tiny_catalogue())
    assert_close(features[..., -1][items >= 0], values.log()[items[items >= 0]])
    own = dict.fromkeys(reranker.features, 0.0) | {"counter": 1.0, "value": 1.0}
    reranker.weights = {"kept": own, "masked": own}
    found = reranker.rank(items, features, 3, "kept")
    for row in range(2):
        worth = {
            int(item): float(features[row, place, 0].exp() * values[item])
            for place, item in enumerate(items[row])
            if item >= 0
        }
        best = sorted(worth, key=worth.get, reverse=True)[:3]
        assert found.items[row].tolist() == best
        assert_close(found.scores[row].exp(), torch.tensor([worth[item] for item in best]))
    fitted = reranker.fit(items, features, [[int(own[0])] for own in items], "kept")
    assert fitted["value"] == 0.0  # a choice, not fitted


def test_values_are_saved_and_follow_the_catalogue(tmp_path):
    """A new item, whose value nobody knows, gets the (geometric) mean."""
    recommender = recommender_of()
    values = torch.linspace(0.5, 4.0, 65)
    reranker = Reranker({"counter": CoOccurrence(65).fit(LOGS)}, item_values=values)
    for kind in ("kept", "masked"):
        reranker.weights[kind] = dict.fromkeys(reranker.features, 0.0) | {"codes": 1.0, "value": 3.0}
    recommender.ranker.reranker = reranker
    recommender.save_pretrained(tmp_path)
    again = Recommender.from_pretrained(tmp_path, num_beams=20)
    assert_close(again.ranker.reranker.item_values, values)
    assert again.recommend(HISTORIES, k=3) == recommender.recommend(HISTORIES, k=3)
    plain = [[item.item_id for item in row] for row in recommender.recommend(HISTORIES, k=3, rerank=False)]
    assert plain != [[item.item_id for item in row] for row in again.recommend(HISTORIES, k=3)]
    (tmp_path / "README.md").write_text("a card")
    assert "item_values.safetensors" in repository_files(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "broken")
    (tmp_path / "broken" / "item_values.safetensors").unlink()
    with pytest.raises(ValueError, match=r"item_values.safetensors.*names it, and it is not there"):
        repository_files(tmp_path / "broken")
    reranker.follow(np.array([4, 60]), num_new=1)
    wanted = torch.stack([values[4].log(), values[60].log(), values.log().mean()])
    assert_close(reranker._log_values(torch.tensor([[0, 1, 2]]))[0], wanted)


def test_the_command_takes_the_largest_weight_that_costs_no_recall(trained, tmp_path):
    settings = {"data": str(trained / "data"), "output": str(tmp_path / "sum"), "value": "seconds"}
    settings["scorers"] = [str(trained / "cooccurrence")]
    report = rerank.main(rerank.RerankArguments(**settings))
    for kind in ("kept", "masked"):
        own = report["reranker"][kind]["value"]
        tried = own["validation"]
        assert list(tried) == ["0.0", "0.125", "0.25", "0.5", "1.0"]
        fine = [float(w) for w, got in tried.items() if got["recall@10"] >= tried["0.0"]["recall@10"]]
        assert own["weight"] == max(fine) == report["reranker"][kind]["weights"]["value"]
        worth = [got["mean value"] for got in tried.values()]
        assert worth == sorted(worth) and worth[0] < worth[-1]
    card = reranking_text(report)
    chosen = [report["reranker"][kind]["value"]["weight"] for kind in ("kept", "masked")]
    assert f"Its weight is {chosen[0]:g} with seen items kept (" in card and f", {chosen[1]:g} with seen items" in card
    assert "is worth, its `seconds`" in card and "| value | " in card
    assert "Its weight is 0 with seen items kept (1.00 times" in reranking_text(
        rerank.main(rerank.RerankArguments(**settings, value_weight=0))  # an int, as in a YAML file
    )
    given = rerank.main(rerank.RerankArguments(**settings, value_weight=1.0))
    assert given["reranker"]["kept"]["weights"]["value"] == 1.0
    assert json.loads((tmp_path / "sum" / "metrics.json").read_text())["reranker"]["kept"]["value"]["weight"] == 1.0
    plain = rerank.main(rerank.RerankArguments(**settings | {"value": None}))
    same = given["reranker"]["kept"]["weights"]
    for name, weight in plain["reranker"]["kept"]["weights"].items():  # the others are what they are without a value
        assert weight == pytest.approx(same[name], abs=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"value": "minutes"},
            r"no such column of numbers. Its events have \['seconds'\], its items \['price', 'loss'\]",
        ),
        *[
            ({"value": name}, f"value='{name}': .* no such column")
            for name in ("user", "timestamp", "title", "item_id")
        ],
        ({"value": "loss"}, r"value='loss': values from 0 on, some above it; got -29 to -?0"),
        ({"value": "price", "value_weight": -1.0}, r"value_weight=-1.0 and value='price': 0 or more"),
        ({"value_weight": 1.0}, r"value_weight=1.0 and value=None: 0 or more, of a value"),
    ],
)
def test_wrong_values_are_refused(trained, tmp_path, wrong, message):
    settings = {"data": str(trained / "data"), "output": str(tmp_path), "scorers": [str(trained / "cooccurrence")]}
    with pytest.raises(ValueError, match=message):
        rerank.main(rerank.RerankArguments(**settings, **wrong))


def test_text_events_are_refused(trained, tmp_path):
    shutil.copytree(trained / "data", tmp_path / "data")
    data, _ = with_seconds(tmp_path / "data", lambda lists: [["a"] * len(own) for own in lists], pa.list_(pa.string()))
    with pytest.raises(ValueError, match=r"value='seconds': .* Its events have \[\]"):
        item_values(data, "seconds")


def test_values_are_checked_before_anything_runs(trained, tmp_path):
    """An entry of the leaderboard with a wrong name is found when none has run."""
    entries = tmp_path / "entries.yaml"
    entries.write_text(
        "counter: {recipe: baseline, name: cooccurrence, seeds: [0]}\n"
        "sum: {recipe: rerank, scorers: [counter], value: minutes, seeds: [0]}\n"
    )
    settings = {"data": str(trained / "data"), "entries": str(entries), "output": str(tmp_path / "board")}
    with pytest.raises(ValueError, match="value='minutes'"):
        leaderboard.main(leaderboard.LeaderboardArguments(**settings))
    assert not (tmp_path / "board" / "counter").exists()


def test_values_that_do_not_fit_are_refused():
    counter = {"counter": CoOccurrence(65).fit(LOGS)}
    with pytest.raises(ValueError, match="item_values has values that are not above 0"):
        Reranker(counter, item_values=torch.zeros(65))
    reranker = Reranker(counter, search=False, item_values=torch.ones(64))
    with pytest.raises(ValueError, match="64 item_values, 65 items: one for each"):
        reranker.candidates(None, [[1]], tiny_catalogue())
