"""`OneRec(...).fit(table)`: from a table of interactions to recommendations, without files of one's own."""

import pandas as pd
import pyarrow as pa
import pytest

from onerec_hf import OneRec
from onerec_hf.onerec import _frame
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
    frames = [_frame(source, {"user_id": "user_id", "item_id": "item_id"}) for source in (arrow, dict(interactions))]
    for frame in frames:
        pd.testing.assert_frame_equal(frame, interactions.reset_index(drop=True), check_dtype=False)


def test_ids_keep_their_spelling_and_their_bits(interactions, tmp_path):
    numbered = interactions.assign(item_id="00" + interactions["item_id"].str[4:])
    numbered.to_csv(tmp_path / "log.csv", index=False)
    frame = _frame(str(tmp_path / "log.csv"), {"user_id": "user_id", "item_id": "item_id"})
    assert frame["item_id"].tolist() == numbered["item_id"].tolist()
    for large in (2**63, 2**70):
        table = pd.DataFrame({"user_id": [1, 2], "item_id": [1, large], "timestamp": [0, 1]})
        with pytest.raises(
            ValueError, match=f"item_id holds {large}, which is beyond 64 bits: pass these ids as strings"
        ):
            OneRec().fit(table)
    with pytest.raises(FileNotFoundError, match=r"absent\.csv"):
        OneRec().fit("absent.csv")
    with pytest.raises(ValueError, match=r"interactions has no column \['user_id'\]"):
        OneRec().fit(pa.table({"item_id": [1], "timestamp": [1]}))
