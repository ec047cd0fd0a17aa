"""Tables as a user gives them to the recipes, and a data folder that nobody may write to."""

import importlib

import datasets
import numpy as np
import pandas as pd
import pytest

from onerec_hf import Catalogue
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import DataFolder, load_splits
from onerec_hf.semantic_ids import RQVAE
from onerec_hf.trainers import load_pairs

from ..item_embeddings.test_embeddings import WORDS, save_tiny


def recipe(name):
    return importlib.import_module(f"onerec_hf.scripts.{name}")


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "save_to_disk"])
def test_exposures_of_any_source_and_of_users_that_the_data_folder_lacks(suffix, tmp_path):
    """The log may write ids as text that are integers in the catalogue and in users.parquet; item 9 and user 3 are not
    in them.
    """
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
    codes = np.array([[i // 2, i % 2] for i in range(4)])
    args = grpo.RLArguments(policy="", data=str(tmp_path), exposures=str(path))
    args.columns = {"user_id": "uid", "item_id": "vid"}
    datasets.Dataset.from_dict({"user_id": [2, 1]}).to_parquet(str(tmp_path / "users.parquet"))
    catalogue = Catalogue(codes, [2, 2], item_ids=[3, 2, 1, 0])
    rows = grpo.load_exposures(args, catalogue, OneRecCollator(codes + 4, 5))
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


def test_a_log_without_a_column_is_refused_before_a_model_is_loaded(tmp_path):
    log = {"user_id": [1], "video_id": [2], "time_ms": [3.0], "play_time_ms": [4.0]}
    pd.DataFrame(log).to_csv(tmp_path / "log.csv", index=False)
    with pytest.raises(
        ValueError, match=r"--log \S+log.csv has no columns \['duration_ms'.*'long_view'.*it has \['user_id'"
    ):
        recipe("ab_test").main("no_model", "no_model", str(tmp_path / "log.csv"), str(tmp_path / "out"))
    recommend = recipe("recommend")
    args = recommend.RecommendArguments("no_model", str(tmp_path / "log.csv"), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"--dataset \S+log.csv has no columns \['history'\]; it has \['user_id'"):
        recommend.main(args)
    assert not (tmp_path / "out").exists()


PAIRS = {"row": [1, 0], "chosen": [[4, 6], [5, 7]], "rejected": [[4, 7], [5, 6]]}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl", "save_to_disk"])
def test_pairs_of_any_table(suffix, tmp_path):
    path, catalogue = tmp_path / f"pairs.{suffix}", Catalogue([[0, 0], [0, 1], [1, 0], [1, 1]], [2, 2])
    frame = pd.DataFrame(PAIRS)
    write = {"parquet": frame.to_parquet, "csv": lambda p: frame.to_csv(p, index=False)}
    write |= {"jsonl": lambda p: frame.to_json(p, orient="records", lines=True)}
    write |= {"save_to_disk": lambda p: datasets.Dataset.from_dict(PAIRS).save_to_disk(str(p))}
    write[suffix](path)
    assert load_pairs(str(path), 2, catalogue)[:] == PAIRS
    frame.drop(columns="chosen").to_parquet(tmp_path / "lacking.parquet")
    with pytest.raises(
        ValueError, match=r"lacking.parquet have no columns \['chosen'\]; they have \['row', 'rejected'\]"
    ):
        load_pairs(tmp_path / "lacking.parquet", 2, catalogue)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"validation_start": 5.0}, r"validation_start=5.0 and test_start=None: give both"),
        ({"test_start": 5.0}, r"validation_start=None and test_start=5.0: give both"),
        ({"validation_start": 6.0, "test_start": 5.0}, "the earlier one first"),
        ({"layout": "amazon", "feedback": ["is_like"]}, r"layout='amazon' has its own columns.*\['feedback'\]"),
        ({"shown_before": True}, "shown_before is for the layout kuairand"),
        ({"load_options": {"drop_null": True}}, r"load_options has \['drop_null'\]; allowed are .*'drop_nulls'"),
        ({"sessions": {"max_gap": 5, "min_length": 2}}, r"sessions has \['min_length'\].*'max_gap'"),
        ({"collaborative_dim": 0}, "no embedding: give --embeddings"),
        ({"embeddings": "no/such.npy"}, "embeddings='no/such.npy' is not there"),
        ({"text_model": "encoder"}, "name columns of the items in text_fields"),
        ({"text_fields": ["title"]}, r"text_fields=\['title'\] would do nothing: .*Give --text_model"),
        ({"align": True}, "align adapts embeddings"),
        ({"codebook_size": 1}, "codebook_size=1: at least 2"),
        ({"output": __file__}, "is a file: name a folder"),
    ],
)
def test_prepare_checks_its_arguments_before_it_reads(change, match, tmp_path):
    prepare = recipe("prepare")
    arguments = {"source": "no/such/log.parquet", "output": str(tmp_path / "out")} | change
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        prepare.main(prepare.PrepareArguments(**arguments))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"text_fields": ["title"], "text_model": "x"}, r"text_fields=\['title'\]: the items have only \[\]"),
        ({"collaborative_dim": 128}, "20 items are too few for collaborative_dim=128. Give --collaborative_dim 20"),
        (
            {"collaborative_dim": 21, "codebook_size": 21},
            "too few for collaborative_dim=21 and codebook_size=21. Give --collaborative_dim 20 --codebook_size 3",
        ),
        ({"num_levels": 2}, "num_levels=2 of codebook_size=4 make 16 semantic IDs for 20 items"),
        ({"watched": {"is_like": 9}, "feedback": ["is_like"]}, "no events to split"),
        ({"watched": {"is_like": 1}, "feedback": ["is_like"]}, r"no rows in \['validation'\]"),
    ],
)
def test_prepare_checks_the_items_before_it_embeds(change, match, tmp_path, monkeypatch):
    prepare = recipe("prepare")
    monkeypatch.setattr(prepare, "embed", lambda *_: pytest.fail("the long work has begun"))
    log = {
        "user_id": np.repeat(range(5), 4),
        "item_id": range(20),
        "timestamp": range(20),
        "is_like": [1, 1, 0, 0] * 5,
    }
    pd.DataFrame(log).to_parquet(tmp_path / "log.parquet")
    arguments = {"source": str(tmp_path / "log.parquet"), "output": str(tmp_path / "out")}
    arguments |= {"num_levels": 3, "codebook_size": 4, "collaborative_dim": 8} | change
    with pytest.raises(ValueError, match=match):
        prepare.main(prepare.PrepareArguments(**arguments))


def test_prepare_passes_load_options_on_and_keeps_the_spelling_of_ids(tmp_path):
    prepare = recipe("prepare")
    rows = [f"u{user},{'00' if item else ''}{item or ''},{user + item}" for user in range(8) for item in range(5)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    arguments = {
        "source": str(tmp_path / "log.csv"),
        "output": str(tmp_path / "out"),
        "load_options": {"drop_nulls": True},
    }
    prepare.main(prepare.PrepareArguments(**arguments, collaborative_dim=2, codebook_size=2))
    assert pd.read_parquet(tmp_path / "out" / "items.parquet")["item_id"].tolist() == ["001", "002", "003", "004"]
    assert len(load_splits(tmp_path / "out")["train"]) == 8


@pytest.mark.parametrize("quantizer", ["residual_kmeans", "rqvae"])
def test_many_texts_are_embedded_in_files_that_processes_share(quantizer, tmp_path, monkeypatch):
    """Two shards, then the rest: the folder that a run in memory makes, up to rounding."""
    prepare, draw = recipe("prepare"), np.random.default_rng(0)
    save_tiny("bert", tmp_path / "encoder")
    items = pd.DataFrame({"item_id": np.arange(60), "title": [" ".join(draw.choice(WORDS[2:], 4)) for _ in range(60)]})
    log = pd.DataFrame({"user_id": np.repeat(np.arange(40), 6), "item_id": draw.integers(0, 60, 240), "timestamp": 1})
    settings = {"source": log, "items": items, "text_model": str(tmp_path / "encoder"), "text_fields": ["title"]}
    settings |= {"collaborative_dim": 0, "codebook_size": 4, "num_levels": 4, "quantizer": quantizer}
    settings["collisions"] = "keep"

    def run(name, **more):
        return prepare.main(prepare.PrepareArguments(output=str(tmp_path / name), **settings, **more))

    fit = RQVAE.fit

    def fit_shortly(self, *args):  # 200 epochs of an autoencoder would make of rounding what another seed does
        self.num_epochs = 3
        return fit(self, *args)

    monkeypatch.setattr(RQVAE, "fit", fit_shortly)
    expected = run("memory")
    monkeypatch.setattr(prepare, "TEXTS_PER_FILE", 20)
    assert run("files", text_shard="1/2") == {}
    files = tmp_path / "files" / "text_embeddings"
    assert [path.name for path in files.glob("*.npy")] == ["part-00001-of-00003.npy"]
    found = run("files")
    assert len(list(files.glob("*.npy"))) == 3
    one, other = (DataFolder(tmp_path / name) for name in ("memory", "files"))
    np.testing.assert_allclose(other.item_embeddings, one.item_embeddings, atol=1e-5)
    np.testing.assert_allclose(other.quantizer.embedding_mean, one.quantizer.embedding_mean, atol=1e-5)
    key = "reconstruction_relative"
    assert found["before collisions"][key] == pytest.approx(expected["before collisions"][key], rel=0.01)
    with pytest.raises(ValueError, match="text_shard='2/2': write 0/4"):
        run("files", text_shard="2/2")
