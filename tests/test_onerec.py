"""`OneRec(...).fit(table)`: from a table of interactions to recommendations, without files of one's own."""

import pickle
import shutil

import pandas as pd
import pyarrow as pa
import pytest
from transformers import AutoTokenizer

from onerec_hf import OneRec, onerec
from onerec_hf.recommender import Recommender

FAST = {"num_train_epochs": 1, "use_cpu": True, "eval_users": 20, "eval_strategy": "epoch", "save_strategy": "epoch"}
FAST |= {"model": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}}
FAST["model"] |= {"context_embed_dim": 8, "score_normalization": "valid"}


@pytest.fixture(scope="module")
def interactions():
    """Everyone walks through 40 items in steps of their own; rows are not in time order."""
    rows = [(f"user{u}", f"item{(7 * u + i * (1 + u % 3)) % 40}", i) for u in range(60) for i in range(8)]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"]).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def fitted(interactions):
    return OneRec(**FAST).fit(interactions)


def test_users_of_the_table_get_what_their_histories_get(fitted, interactions, tmp_path):
    found = fitted.recommend(["user3", "user7"], k=4)
    assert list(found.columns) == ["user_id", "rank", "item_id", "score"]
    assert found["user_id"].tolist() == ["user3"] * 4 + ["user7"] * 4 and found["rank"].tolist() == [1, 2, 3, 4] * 2
    histories = [[f"item{(7 * u + i * (1 + u % 3)) % 40}" for i in range(8)] for u in (3, 7)]
    assert fitted.histories["user3"] == histories[0]
    assert not set(found["item_id"][:4]) & set(histories[0])
    fitted.save_pretrained(tmp_path)
    again = OneRec.from_pretrained(tmp_path).recommend(histories=histories, k=4)
    assert again["item_id"].tolist() == found["item_id"].tolist() and again["user_id"].tolist() == [0] * 4 + [1] * 4
    assert len(Recommender.from_pretrained(tmp_path).recommend(histories)) == 2
    assert fitted.metrics["num_users"] == 60 and 0 <= fitted.metrics["recall@10"] <= 1
    assert len(fitted.recommend(k=1)) == 60
    assert fitted.recommend(["user3"], k=3, allow=["item39"])["item_id"].tolist() == ["item39"]


def test_columns_of_other_names_and_rows_in_time_order(interactions, tmp_path):
    """The folder that is named keeps everything, and is a data folder and a model folder as the commands write
    them.
    """
    ordered = interactions.sort_values("timestamp").rename(columns={"user_id": "who", "item_id": "what"})
    names = {"user_id": "who", "item_id": "what", "timestamp": None}
    items = pd.DataFrame({"what": [f"item{i}" for i in range(40)], "title": [f"Title {i}" for i in range(40)]})
    model = OneRec(tmp_path, prepare={"codebook_size": 8}, metadata=["title"], **FAST)
    model.fit(ordered.drop(columns="timestamp"), items, columns=names)
    assert (tmp_path / "data" / "splits").is_dir() and (tmp_path / "model" / "config.json").is_file()
    assert model.recommender.model.config.codebook_sizes == [8, 8, 8]
    assert model.recommender.recommend([["item1"]], k=1)[0][0].metadata["title"].startswith("Title ")


def test_what_does_not_fit_is_said_at_once(fitted, interactions):
    with pytest.raises(ValueError, match="num_epochs"):
        OneRec(num_epochs=3)
    with pytest.raises(FileNotFoundError, match=r"small_sft\.yaml"):
        OneRec(config="smal.yaml")
    with pytest.raises(
        ValueError, match=r"interactions has no column \['user_id'\]; it has \['item_id', 'timestamp'\]"
    ):
        OneRec().fit(interactions.drop(columns="user_id"))
    with pytest.raises(ValueError, match="there is no model yet: call `fit`"):
        OneRec().recommend(histories=[[]])
    with pytest.raises(KeyError, match="1 of 2 users have no history here; the first is 'nobody'"):
        fitted.recommend(["user3", "nobody"])
    with pytest.raises(ValueError, match="give users or histories, not both"):
        fitted.recommend(["user3"], histories=[[]])


class Polars:
    """What a polars DataFrame offers: `to_arrow`."""

    def __init__(self, table):
        self.to_arrow = lambda: table


def test_one_s_own_file_and_other_tables(fitted, interactions, tmp_path):
    """The same interactions from a path, of arrow, as a dict: the same model as from pandas."""
    path = tmp_path / "log.csv"
    interactions.to_csv(path, index=False)
    arrow = pa.Table.from_pandas(interactions, preserve_index=False)
    expected = fitted.recommend(["user3"], k=4)["item_id"].tolist()
    for source in (str(path), Polars(arrow)):
        model = OneRec(**FAST).fit(source)
        assert model.histories == fitted.histories
        assert model.recommend(["user3"], k=4)["item_id"].tolist() == expected


def test_ids_keep_their_spelling_and_their_bits(interactions, tmp_path):
    numbered = interactions.assign(item_id="00" + interactions["item_id"].str[4:])
    numbered.to_csv(tmp_path / "log.csv", index=False)
    model = OneRec(**FAST).fit(str(tmp_path / "log.csv"))
    own = numbered.query("user_id == 'user3'").sort_values("timestamp")
    assert model.histories["user3"] == own["item_id"].tolist()
    for large, message in ((2**63, "item_id .* beyond 64 bits .*pass the ids as text"), (2**70, "pass longer ids as")):
        table = pd.DataFrame({"user_id": [1, 2], "item_id": [1, large], "timestamp": [0, 1]})
        with pytest.raises(ValueError, match=message):
            OneRec().fit(table)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        OneRec().fit("absent.csv")
    with pytest.raises(ValueError, match=r"interactions has no column \['user_id'\]"):
        OneRec().fit(pa.table({"item_id": [1], "timestamp": [1]}))


def test_histories_are_those_that_were_prepared(interactions, tmp_path):
    """Not the rows of the table: text that is a time, rows that are left out, events that do not count."""
    noon = pd.Timestamp("2024-05-01T12:00:00Z")
    times = [
        (noon + pd.Timedelta(hours=i)).tz_convert(("Etc/GMT+5", "Etc/GMT-2")[i % 2]).isoformat() for i in range(8)
    ]
    assert times != sorted(times)
    rows = [(f"user{u}", 3 * u % 40 + i, times[i], i % 2) for u in range(60) for i in range(8)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "long_view"])
    log = pd.concat([log, log.tail(5)]).sample(frac=1, random_state=0).set_index("user_id", drop=False)
    settings = {"feedback": ["long_view"], "watched": {"long_view": 1}, "load_options": {"drop_duplicates": True}}
    model = OneRec(prepare=settings, **FAST).fit(log)
    assert model.histories == {f"user{u}": [3 * u % 40 + i for i in (1, 3, 5, 7)] for u in range(60)}
    found = model.recommend(["user3"], k=3)
    assert found["item_id"].tolist() == model.recommend(histories=[model.histories["user3"]], k=3)["item_id"].tolist()


def test_events_that_a_model_reads_come_from_the_table(interactions):
    log = interactions.assign(is_like=interactions["timestamp"] % 2)
    settings = {"event_features": {"is_like": ["category", 3]}, "model": FAST["model"]}
    model = OneRec(prepare={"feedback": ["is_like"]}, **FAST | settings).fit(log)
    found = model.recommend(["user3", "user7"], k=3)
    given = {"histories": [model.histories[user] for user in ("user3", "user7")], "k": 3}
    likes = {"is_like": [[0, 1] * 4] * 2}
    assert found["score"].tolist() == pytest.approx(model.recommend(events=likes, **given)["score"].tolist(), abs=1e-5)
    assert abs(found["score"] - model.recommend(**given)["score"]).max() > 1e-4
    other = model.recommend(["user3", "user7"], k=3, events={"is_like": [[1, 0] * 4] * 2})
    assert abs(found["score"] - other["score"]).max() > 1e-4


def test_many_users_are_searched_in_parts(fitted, monkeypatch):
    users, deny = list(fitted.histories), [[f"item{u % 40}"] for u in range(60)]
    whole = fitted.recommend(users, k=3, deny=deny)
    monkeypatch.setattr(onerec, "BATCH_SIZE", 7)
    parts = fitted.recommend(users, k=3, deny=deny)
    pd.testing.assert_frame_equal(parts, whole, check_exact=False, rtol=1e-4)
    for user, own in parts.groupby("user_id"):
        assert not set(own["item_id"]) & {*deny[users.index(user)], *fitted.histories[user]}
    with pytest.raises(ValueError, match="deny has 59 values for 60 users"):
        fitted.recommend(users, k=3, deny=deny[1:])
    with pytest.raises(ValueError, match="users='user3': a list of user ids, also for one user"):
        fitted.recommend("user3")


def test_a_model_that_was_loaded_or_changed_is_saved(fitted, tmp_path):
    fitted.save_pretrained(tmp_path / "first")
    again = OneRec.from_pretrained(tmp_path / "first")
    again.recommender.remove_items(["item5"])
    again.save_pretrained(tmp_path / "second")
    last = OneRec.from_pretrained(tmp_path / "second")
    assert "item5" not in last.recommender.model.catalogue.item_ids.tolist()
    found = last.recommend(histories=[["item1"]], k=5)
    assert found["item_id"].tolist() == again.recommend(histories=[["item1"]], k=5)["item_id"].tolist()
    assert len(AutoTokenizer.from_pretrained(tmp_path / "second", trust_remote_code=True).catalogue.item_ids) == 39


def test_a_copy_outlives_the_temporary_folder(fitted, tmp_path):
    copied = pickle.loads(pickle.dumps(fitted))
    assert copied.folder != fitted.folder
    expected = fitted.recommend(["user3"], k=3)
    pd.testing.assert_frame_equal(copied.recommend(["user3"], k=3), expected, check_exact=False, rtol=1e-4)
    copied.save_pretrained(tmp_path / "copy")
    log = pd.DataFrame([(u, (u + i) % 30, i) for u in range(40) for i in range(5)])
    copied.fit(log.set_axis(["user_id", "item_id", "timestamp"], axis=1))
    assert copied.recommender.model.catalogue.num_items == 30 and "user3" in fitted.histories
    assert Recommender.from_pretrained(tmp_path / "copy").model.catalogue.num_items == 40


def test_a_second_fit(interactions, tmp_path):
    """A temporary folder is made anew; a model in a folder of one's own is not lost."""
    model = OneRec(**FAST).fit(interactions)
    model.fit(interactions[interactions["user_id"] != "user3"])
    assert "user3" not in model.histories and model.recommender.model.catalogue.num_items == 40
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an earlier run, which a fit would replace: choose another output_dir"):
        OneRec(tmp_path, **FAST).fit(interactions)
    assert not (tmp_path / "data").exists()


def test_a_stopped_fit_goes_on(interactions, tmp_path, capsys):
    settings = FAST | {"num_train_epochs": 2, "load_best_model_at_end": False, "save_total_limit": 5}
    OneRec(tmp_path, **settings).fit(interactions)
    last = max((tmp_path / "model").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(last)
    model = OneRec(tmp_path, **settings, resume_from_checkpoint="true").fit(interactions)
    assert last.is_dir() and model.metrics["num_users"] == 60


@pytest.mark.parametrize("count", [9, 20, 31])
def test_few_items_have_semantic_ids(count):
    log = pd.DataFrame([(u, (u + i) % count, i) for u in range(40) for i in range(5)])
    log.columns = ["user_id", "item_id", "timestamp"]
    extra = pd.DataFrame({"user_id": [1, 1], "item_id": [100, 101], "timestamp": [9, 10]})
    model = OneRec(prepare={"k_core": 2}, **FAST).fit(pd.concat([log, extra]))  # items of one event go
    assert model.recommender.model.catalogue.num_items == count
