"""Tables as a user gives them to the recipes, and a data folder that nobody may write to."""

import importlib
import sys
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from onerec_hf import Catalogue
from onerec_hf.data import OneRecCollator, load_splits

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))


def recipe(name):
    return importlib.import_module(name)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "save_to_disk"])
def test_exposures_of_any_source_and_of_users_that_the_data_folder_lacks(suffix, tmp_path):
    """The log may write ids as text that are integers in the catalogue and in users.parquet; item 9 and user 3 are not in them."""
    grpo = recipe("grpo")
    log = {"uid": list("112233"), "vid": ["0", "1", "2", "9", "0", "1"], "timestamp": [1, 2, 3, 4, 5, 6]}
    log |= {"request_id": ["01", "01", "1", "1", "1", "2"], "play_time_ms": [5000] * 6, "duration_ms": [9000] * 6}
    log |= {
        "is_hate": [0] * 6,
        "long_view": [1] * 6,
        "log_prob_1": [-1.0, None, -2.0, 0.5, -3.0, -4.0],
        "log_prob_2": [-1.0] * 6,
    }
    path = tmp_path / f"log.{suffix}"
    if suffix == "save_to_disk":
        datasets.Dataset.from_dict(log).save_to_disk(str(path))
    else:
        frame = pd.DataFrame(log)
        write = {"parquet": frame.to_parquet, "csv": lambda p: frame.to_csv(p, index=False)}
        write.get(suffix, lambda p: frame.to_json(p, orient="records", lines=True))(path)
    pd.DataFrame({"user_id": [2, 1]}).to_parquet(tmp_path / "users.parquet")
    codes = np.array([[i // 2, i % 2] for i in range(4)])
    args = grpo.RLArguments(policy="", data=str(tmp_path), exposures=str(path))
    args.columns = {"user_id": "uid", "item_id": "vid"}
    rows = grpo.load_exposures(args, Catalogue(codes, [2, 2], item_ids=[3, 2, 1, 0]), OneRecCollator(codes + 4, 5))
    assert rows["user"][:] == [1, 0, -1, -1]
    assert rows["targets"][:] == [[3, 2], [1], [3], [2]] and rows["history"][:] == [[], [], [], [3]]
    np.testing.assert_array_equal(np.concatenate(rows["log_probs"][:])[:, 0], [-1, np.nan, -2, -3, -4])


def test_rows_to_recommend_for_are_of_any_source(tmp_path):
    recommend = recipe("recommend")
    rows = {"history": [[1, 2], [3]], "name": ["a", "b"]}
    datasets.DatasetDict(test=datasets.Dataset.from_dict(rows)).save_to_disk(str(tmp_path / "saved"))
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    pd.DataFrame(rows).to_json(tmp_path / "rows.jsonl.gz", orient="records", lines=True)
    for name in ("saved", "rows.parquet", "rows.jsonl.gz"):
        args = recommend.RecommendArguments(repo="", dataset=str(tmp_path / name), output="", split="test")
        assert recommend.load(args)[:] == rows


def test_what_is_made_of_splits_never_goes_into_the_data_folder(tmp_path):
    rows = datasets.Dataset.from_dict({"user": [0, 1, 2], "history": [[1], [2, 3], [4, 5, 6]], "length": [1, 2, 3]})
    folder = tmp_path / "data"
    datasets.DatasetDict(train=rows, validation=rows).save_to_disk(str(folder / "splits"), max_shard_size="1KB")
    before = sorted(folder.rglob("*"))
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    splits = load_splits(folder)
    assert splits["train"].features == rows.features and splits["train"][:] == rows[:]
    assert splits["train"].filter(lambda length: length >= 2, input_columns="length")["user"][:] == [1, 2]
    assert sorted(splits["validation"].shuffle(seed=0)["user"][:]) == [0, 1, 2]
    assert splits["train"].sort("length", reverse=True)["user"][:] == [2, 1, 0]
    assert splits["train"].map(lambda row: {"first": row["history"][0]})["first"][:] == [1, 2, 4]
    assert sorted(folder.rglob("*")) == before
    for path in before:  # so that they can be deleted
        path.chmod(0o755 if path.is_dir() else 0o644)
