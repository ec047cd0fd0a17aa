"""What is wrong is said before the first step; what fails after the last one costs neither the model nor the rest of
the ending.
"""

import datetime
import decimal
import json
import shutil
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, Trainer, TrainingArguments
from trl import TrlParser

from onerec_hf.collators import OneRecCollator
from onerec_hf.data import DataFolder, load_splits
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import Recommender
from onerec_hf.trainers import IPAConfig, OneRecGRPOConfig, OneRecSFTConfig, OneRecSFTTrainer

MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL = json.dumps(MODEL | {"context_embed_dim": 4})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Thirty users, thirty items, and a column of every kind that a table may hold."""
    from onerec_hf.scripts import prepare

    folder, rng = tmp_path_factory.mktemp("checks"), np.random.default_rng(0)
    rows = [(u, int(rng.integers(30)), j, j % 2) for u in range(30) for j in range(6)]
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp", "liked"])
    log.to_parquet(folder / "log.parquet")
    items = pd.DataFrame({"item_id": np.arange(30), "title": [f"t{i}" for i in range(30)], "author": "a"})
    items["released"] = pd.Timestamp("2020-01-01 12:30")
    items["price"], items["tags"] = decimal.Decimal("9.50"), [[{"day": datetime.date(2020, 1, 2)}]] * 30
    items["rating"], items["cover"] = np.where(items.item_id % 2, 0.5, np.nan), b"\xff"
    items.to_parquet(folder / "items.parquet")
    names = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2, "feedback": ["liked"]}
    prepare.main(
        prepare.PrepareArguments(
            str(folder / "log.parquet"), str(folder / "data"), items=str(folder / "items.parquet"), **names
        )
    )
    return folder / "data"


def arguments(data, folder, **settings):
    settings = {"data": data, "output_dir": folder, "report_to": "none", "use_cpu": "true", "num_beams": 20} | settings
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


def sft(data, folder, **settings):
    from onerec_hf.scripts import sft

    settings = {"model": MODEL, "max_steps": 2, "save_strategy": "no"} | settings
    parser = TrlParser((sft.ModelArguments, OneRecSFTConfig))
    return sft.main(*parser.parse_args_and_config(arguments(data, folder, **settings)))


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    sft(data, folder, metadata=["title", "released", "price", "tags", "rating"])
    return folder


@pytest.fixture
def no_training(monkeypatch):
    def train(*args, **kwargs):
        pytest.fail("the training began")

    monkeypatch.setattr(Trainer, "train", train)


@pytest.mark.parametrize("recipe", ["sft", "grpo"])
def test_sharded_weights_and_a_search_in_one_process_are_refused(
    data, policy, tmp_path, no_training, monkeypatch, recipe
):
    """No process group is needed: transformers reads the plugin of accelerate when a trainer is made."""
    make = Trainer.create_accelerator_and_postprocess

    def with_fsdp(trainer):
        make(trainer)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", with_fsdp)
    run = {"sft": partial(sft, data), "grpo": partial(grpo, data, policy=policy)}
    with pytest.raises(ValueError, match=r"under FSDP no process has whole weights.* --score false"):
        run[recipe](tmp_path / "run")
    if recipe != "sft":
        with pytest.raises(ValueError, match=r"under FSDP an adapter cannot be merged: leave out --lora_r"):
            run[recipe](tmp_path / "run", score="false", lora_r=2)
    with pytest.raises(pytest.fail.Exception, match="the training began"):
        run[recipe](tmp_path / "run", score="false")


def test_a_model_that_is_not_scored_is_saved_and_scored_later(data, tmp_path):
    from onerec_hf.scripts import score

    report = sft(data, tmp_path, score="false", eval_strategy="steps", eval_steps=1)
    assert "test" not in report and any("eval_loss" in record for record in report["log"])
    assert not any("eval_recall@10" in record for record in report["log"])
    assert not list(tmp_path.glob("predictions*")) and json.loads((tmp_path / "metrics.json").read_text()) == report
    scored = score.main(score.ScoreArguments(str(tmp_path), str(data)))
    assert scored["log"] == report["log"] and scored["test"]["num_users"] == 30


@pytest.mark.parametrize("given, kept", [("greedy", "greedy"), ("false", False), (False, False), ("true", True)])
def test_prepare_makes_the_clusters_that_were_named(data, tmp_path, given, kept):
    """On the command line a word, in a YAML file a boolean."""
    from onerec_hf.scripts import prepare
    from onerec_hf.scripts.parser import ScriptParser

    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"balanced": given}), encoding="utf-8")
    argv = ["--source", f"{data.parent}/log.parquet", "--output", f"{tmp_path}/data", "--num_levels", "2"]
    argv += [
        "--codebook_size",
        "8",
        "--collaborative_dim",
        "4",
        "--collisions",
        "keep",
        "--config",
        f"{tmp_path}/own.yaml",
    ]
    prepare.main(*ScriptParser("prepare", "", [prepare.PrepareArguments]).parse(argv))
    (written,) = (tmp_path / "data").rglob("quantizer_config.json")
    assert json.loads(written.read_text(encoding="utf-8"))["balanced"] == kept


def test_newest_impressions_are_read_once_in_the_order_of_time(data, tmp_path, monkeypatch):
    """OneRec-V2, section 2.1: by hand, from the histories of all users; every loss is of one event alone."""
    seen = []
    collate = OneRecCollator.__call__

    def watch(self, rows):
        if rows and len(rows[0].get("targets", ())) == 1 and "session_start" in rows[0]:
            seen.extend((int(row["session_start"]), int(row["user"]), int(row["targets"][0])) for row in rows)
            batch = collate(self, rows)
            assert batch["target_ids"].shape[:2] == (len(rows), 1)
            assert all(len(row["history"]) == int(p) for row, p in zip(rows, batch["target_positions"], strict=True))
            assert all(max(row["timestamp"]) <= row["session_start"] for row in rows)
            return batch
        return collate(self, rows)

    monkeypatch.setattr(OneRecCollator, "__call__", watch)
    sft(data, tmp_path, newest_impressions="true", num_train_epochs=1, max_steps=-1, score="false")
    train = DataFolder(data).splits["train"]
    expected = [
        (time, row["user"], item)
        for row in train
        for time, item in list(zip(row["timestamp"], row["history"], strict=True))[1:]
    ]
    seen = seen[-len(expected) :]  # a few rows were looked at before the first step
    assert [time for time, *_ in seen] == sorted(time for time, *_ in expected)
    assert sorted(seen) == sorted(expected)


def test_prepare_refuses_a_word_for_clusters_that_it_does_not_know(data, tmp_path):
    from onerec_hf.scripts import prepare

    with pytest.raises(ValueError, match="balanced='greed': allowed are true, false, greedy"):
        prepare.main(prepare.PrepareArguments(f"{data.parent}/log.parquet", f"{tmp_path}/data", balanced="greed"))


def test_every_kind_of_column_can_be_told_with_an_item(data, policy):
    found = Recommender.from_pretrained(policy).metadata
    assert found[3] == {
        "title": "t3",
        "released": "2020-01-01T12:30:00",
        "price": 9.5,
        "tags": [{"day": "2020-01-02"}],
        "rating": 0.5,
    }
    assert found[4]["rating"] is None  # NaN is no JSON


BEST = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": "true"}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"metadata": ["titel"]}, r"items.parquet has no \['titel'\]; it has \['item_id'"),
        ({"metadata": ["cover"]}, "metadata 'cover' of item 0 is .* which JSON cannot hold"),
        ({"num_beams": 19}, "num_beams=19: the test metrics need lists of 20 items"),
        ({"item_features": ["autor"]}, r"items.parquet has no \['autor'\]; it has"),
        ({"user_features": ["age"]}, r"users.parquet has no \['age'\]; it has"),
        ({"event_features": '{"playtime": ["log", 24]}'}, "no column 'playtime'"),
        ({"event_features": '{"liked": ["logg", 24]}'}, "kind='logg' of an event feature: allowed are"),
        ({"event_features": '{"liked": "log"}'}, "event feature 'liked' is 'log': give a kind and a size"),
        (
            {"event_features": '{"author": ["log", 9]}', "item_features": ["author"]},
            r"\['author'\] are event features and item features at once",
        ),
        ({"model": '{"hiden_size": 16}'}, r"model=\['hiden_size'\]: OneRecV2Config does not know that; it has"),
        ({"model": "{hidden_size: 16}"}, "is no JSON .* with double quotes"),
        ({"model": "[1]"}, "a mapping is needed"),
        (
            BEST | {"metric_for_best_model": "eval_ndgc@10"},
            "metric_for_best_model='eval_ndgc@10': an evaluation returns",
        ),
        ({"report_to": "wandbb"}, "wandbb is not supported"),
        ({"eval_users": 0}, "eval_users=0: at least one user"),
        ({"push_to_hub": "true", "hub_model_id": "a/b/c"}, "'a/b/c' is no name of a repository"),
        (
            {"push_to_hub": "true", "hub_model_id": "org/x"},
            "org/x could not be pushed: .* Log in with `hf auth login`",
        ),
    ],
)
def test_sft_says_it_before_it_trains(data, tmp_path, no_training, settings, message):
    with pytest.raises((ValueError, OSError, KeyError), match=f"(?s){message}"):
        sft(data, tmp_path / "run", **settings)


def test_output_folders_that_cannot_be_written(data, tmp_path, no_training):
    from onerec_hf.scripts import ab_test, baseline, quickstart

    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file"):
            sft(data, folder)
        with pytest.raises(NotADirectoryError, match="file is a file"):
            baseline.main(baseline.BaselineArguments("popularity", str(data), str(folder)))
        with pytest.raises(NotADirectoryError, match="file is a file"):
            quickstart.main(folder)
        with pytest.raises(NotADirectoryError, match="file is a file"):
            ab_test.main("a", "b", "log.parquet", str(folder))
    with pytest.raises(ValueError, match=r"seeds=\[0, 0\]: a seed that is named twice"):
        ab_test.main("a", "b", "log.parquet", str(tmp_path), seeds=[0, 0])


def dpo(data, folder, policy, **settings):
    from onerec_hf.scripts import dpo

    pairs = folder.parent / "pairs"
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokens = tokenizer.encode_items(tokenizer.catalogue.item_ids[:4]).tolist()
    columns = {"row": [0, 1], "chosen": tokens[:2], "rejected": tokens[2:]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(pairs))
    settings = {"policy": policy, "pairs": pairs, "max_steps": 1, "save_strategy": "no", "kl_users": 4} | settings
    parser = TrlParser((dpo.DPOArguments, IPAConfig))
    return dpo.main(*parser.parse_args_and_config(arguments(data, folder, **settings)))


def grpo(data, folder, policy, **settings):
    from onerec_hf.scripts import grpo

    settings = {"policy": policy, "max_steps": 1, "num_generations": 2, "save_strategy": "no"} | settings
    settings = {"per_device_train_batch_size": 4} | settings
    parser = TrlParser((grpo.RLArguments, OneRecGRPOConfig))
    return grpo.main(*parser.parse_args_and_config(arguments(data, folder, **settings)))


def reward(data, folder, policy, **settings):
    from onerec_hf.scripts import reward

    settings = {"targets": ["lvtr"], "num_train_epochs": 1} | settings
    argv = arguments(data, folder, **settings)
    at = argv.index("--num_beams")
    parser = TrlParser((reward.RewardArguments, TrainingArguments))
    return reward.main(*parser.parse_args_and_config(argv[:at] + argv[at + 2 :]))


@pytest.mark.parametrize("recipe", [dpo, grpo, reward])
def test_the_other_recipes_say_it_before_they_train(data, policy, tmp_path, no_training, recipe):
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"):
        recipe(data, tmp_path / "file", policy)
    with pytest.raises(ValueError, match="'a/b/c' is no name of a repository"):
        recipe(data, tmp_path / "run", policy, push_to_hub="true", hub_model_id="a/b/c")
    with pytest.raises(ValueError, match=r"metric_for_best_model='recal': an evaluation returns \['loss'"):
        recipe(data, tmp_path / "run", policy, metric_for_best_model="recal")
    if recipe is reward:
        with pytest.raises(ValueError, match=r"targets=\['user'\]: the scores have a column of that name"):
            recipe(data, tmp_path / "run", policy, targets=["user"])
        return
    with pytest.raises(ValueError, match="num_beams=10: the test metrics need lists of 20"):
        recipe(data, tmp_path / "run", policy, num_beams=10)
    with pytest.raises(ValueError, match="test_users=0: at least one user"):
        recipe(data, tmp_path / "run", policy, test_users=0)


@pytest.mark.parametrize("recipe", [dpo, grpo])
def test_the_alignments_end_as_the_training_does(data, policy, tmp_path, recipe):
    report = recipe(data, tmp_path / "run", policy)
    assert report == json.loads((tmp_path / "run" / "metrics.json").read_text()) and report["test"]["num_users"] == 30
    assert Recommender.from_pretrained(tmp_path / "run").metadata[3]["title"] == "t3"
    assert "## Training" in ModelCard.load(tmp_path / "run" / "README.md").text


def test_the_names_of_the_validation_metrics_are_those_of_evaluate(data, policy):
    from onerec_hf.scripts import ending

    ranker = Recommender.from_pretrained(policy).ranker
    split = load_splits(data)["validation"].select(range(2))
    assert set(ending.VALIDATION_METRICS) == set(evaluate(ranker, split, num_items=30, ks=(10,)).metrics)


def test_what_fails_after_the_training_costs_nothing_else(data, tmp_path, monkeypatch):
    """A card that cannot be drawn: model, metrics and predictions are there; and the other way round."""
    from onerec_hf.scripts import ending, score

    run = tmp_path / "run"

    def fail(*args, **kwargs):
        raise MemoryError("no room for a picture")

    monkeypatch.setattr(OneRecSFTTrainer, "create_model_card", fail)
    with pytest.raises(
        RuntimeError, match=r"(?s)saved complete in .*run.*- card .*no room for a picture.*onerec publish"
    ):
        sft(data, run, metadata=["title"])
    assert json.loads((run / "metrics.json").read_text())["test"]["num_users"] == 30
    assert Recommender.from_pretrained(run).metadata[3] == {"title": "t3"} and not (run / "README.md").exists()
    monkeypatch.undo()

    monkeypatch.setattr(ending, "score_model", fail)
    with pytest.raises(RuntimeError, match=r"(?s)- metrics .*no room.*`onerec score --model \S+run --data"):
        sft(data, run, metadata=["title"])
    assert (run / "README.md").is_file() and Recommender.from_pretrained(run).metadata
    assert (
        not list(run.glob("predictions*")) and not (run / "metrics.json").exists()
    )  # those of the first run are gone
    monkeypatch.undo()
    report = score.main(score.ScoreArguments(str(run), str(data)))  # as the message says
    assert report == json.loads((run / "metrics.json").read_text()) and {"test", "test_exclude_seen"} < report.keys()
    assert len(datasets.Dataset.from_parquet(str(run / "predictions.parquet"))) == 30


def test_a_run_in_the_folder_of_another_says_so_and_leaves_none_of_its_results(data, tmp_path, caplog):
    from onerec_hf.scripts import checks

    run = tmp_path / "run"
    run.mkdir()
    for name in (
        "metrics.json",
        "predictions.parquet",
        "items.jsonl",
        "val_scores.parquet",
        "recall_by_frequency.png",
    ):
        (run / name).write_text("old")
    (run / "notes.txt").write_text("mine")
    checks.logger.addHandler(caplog.handler)
    sft(data, run)
    assert (
        "holds an earlier run: items.jsonl, metrics.json, predictions.parquet, recall_by_frequency.png" in caplog.text
    )
    old = [path.name for path in run.iterdir() if path.is_file() and path.read_bytes() == b"old"]
    assert not old and (run / "notes.txt").read_text() == "mine" and not (run / "items.jsonl").exists()


# ---- baselines and the leaderboard


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"name": "sasrec", "fit": '{"num_epoch": 1}'},
            r"fit=\['num_epoch'\] is not known; allowed are \['batch_size'",
        ),
        ({"name": "popularity", "fit": {"num_epochs": 1}}, r"fit=\['num_epochs'\] is not known; allowed are none"),
        (
            {"name": "fdsa", "attributes": ["gruop"]},
            r"attributes=\['gruop'\]: the item table has no such column; it has",
        ),
        ({"name": "sasrec", "eval_users": -1}, "eval_users=-1: at least one user"),
        ({"name": "popularity", "test_users": 0}, "test_users=0: at least one user"),
    ],
)
def test_baselines_say_it_before_they_train(data, tmp_path, no_training, settings, message):
    from onerec_hf.scripts import baseline

    with pytest.raises(ValueError, match=message):
        baseline.main(baseline.BaselineArguments(data=str(data), output=str(tmp_path / "run"), **settings))


@pytest.mark.parametrize(
    "entries, message",
    [
        (
            "a: {recipe: baseline, name: popularity}\nb: {recipe: baseline, name: sasrec, fit: {epochs: 1}}",
            r"the entry 'b' cannot run: fit=\['epochs'\] is not known.*Nothing was started",
        ),
        (
            "a: {recipe: baseline, name: popularity}\nb: {recipe: baseline, name: gru4rec}",
            "the entry 'b' cannot run: .*invalid choice: 'gru4rec'",
        ),
        (
            "a: {recipe: baseline, name: popularity}\nb: {recipe: sft, metric_for_best_model: hits}",
            "the entry 'b' cannot run: metric_for_best_model='hits'",
        ),
        (
            "a: {recipe: baseline, name: popularity}\na: {recipe: baseline, name: itemknn}",
            r"several entries named \['a'\]",
        ),
        ("a: {recipe: baselines}", "a has recipe='baselines'; allowed are"),
        ("a: {name: popularity}", r"a has \['name'\]: give one of `recipe: baseline | sft`, `predictions: FILE`"),
        ("a: {recipe: own, python: 'm:f'}", r"a has \['recipe', 'python'\]: give one of"),
        ("a/b: {recipe: baseline}", "'a/b' is no name of a folder"),
        ("a: {recipe: rerank, model: b, scorers: []}", r"a re-ranks \['b'\], which are no entries above it"),
        (
            "p: {recipe: baseline, name: popularity}\nb: {recipe: sft}\na: {recipe: rerank, model: b, scorers: [p]}",
            r"a has the scorers \['p'\], which do not score items: name baselines among cooccurrence",
        ),
        (
            "p: {recipe: baseline, name: sasrec}\na: {recipe: rerank, model: p}",
            "a has model='p', an entry that trains no OneRec",
        ),
        (
            "b: {recipe: sft, seeds: [0, 3]}\na: {recipe: rerank, model: b}",
            r"seed 1 re-ranks b, which has the seeds \[0, 3\]",
        ),
    ],
)
def test_the_leaderboard_checks_every_entry_before_the_first(data, tmp_path, entries, message):
    from onerec_hf.scripts import leaderboard

    (tmp_path / "entries.yaml").write_text(entries)
    arguments = leaderboard.LeaderboardArguments(str(data), str(tmp_path / "out"), str(tmp_path / "entries.yaml"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        leaderboard.main(arguments)
    assert not list(tmp_path.rglob("metrics.json"))


# ---- publish


@pytest.fixture
def desk(data, policy, tmp_path):
    """The model, and three baselines whose folders share names with each other and with the model's title."""
    from onerec_hf.scripts import baseline

    shutil.copytree(policy, tmp_path / "aligned")
    for name in ("mymodel", "x/sasrec", "y/sasrec"):
        kind = "popularity" if name == "x/sasrec" else "cooccurrence"
        baseline.main(baseline.BaselineArguments(kind, str(data), str(tmp_path / name)))
    return tmp_path


def publish(desk, data, *baselines, **settings):
    from onerec_hf.scripts import publish

    settings = {"model": str(desk / "aligned"), "data": str(data)} | settings
    publish.main(publish.PublishArguments(baselines=[str(desk / name) for name in baselines], **settings))
    return ModelCard.load(desk / "aligned" / "README.md")


def test_systems_are_told_apart_by_their_folders(desk, data):
    card = publish(desk, data, "mymodel", "x/sasrec", "y/sasrec", title="mymodel")
    reports = {
        name: json.loads((desk / name / "metrics.json").read_text())["test"]
        for name in ("aligned", "mymodel", "x/sasrec", "y/sasrec")
    }
    value = {result.metric_name: result.metric_value for result in card.data.eval_results}["recall@10"]
    assert value == round(reports["aligned"]["recall@10"], 5) != round(reports["mymodel"]["recall@10"], 5)
    names = {"mymodel": "aligned", f"{desk.name}/mymodel": "mymodel", "x/sasrec": "x/sasrec", "y/sasrec": "y/sasrec"}
    rows = {line.split(" | ")[0][2:]: line for line in card.text.split("\n") if line.startswith("| ")}
    assert names.keys() <= rows.keys()
    for name, folder in names.items():
        assert f"| {name} | {reports[folder]['recall@5']:.4f} / " in rows[name]


def test_what_publish_refuses(desk, data, tmp_path):
    from onerec_hf.scripts import publish as recipe

    with pytest.raises(ValueError, match=r"aligned'\] is named twice among the model and its baselines"):
        publish(desk, data, "aligned")
    with pytest.raises(ValueError, match=r"'a b' is no name of a repository"):
        publish(desk, data, repo="a b")
    (desk / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare has no test metrics.*`onerec score --model \S+bare --data"):
        publish(desk, data, "bare")
    other = shutil.copytree(data, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other / "tokenizer")
    catalogue = tokenizer.catalogue
    tokenizer.catalogue = type(catalogue)(catalogue.semantic_ids.flip(0), catalogue.codebook_sizes, catalogue.item_ids)
    tokenizer.save_pretrained(other / "tokenizer")
    with pytest.raises(
        ValueError, match=r"aligned \(a model\) and \S+other \(a data folder\) do not belong together: the first has"
    ):
        publish(desk, other)
    report = json.loads((desk / "x/sasrec" / "metrics.json").read_text())
    (desk / "x/sasrec" / "metrics.json").write_text(json.dumps(report | {"item_fingerprint": "of others"}))
    with pytest.raises(ValueError, match=r"sasrec knows 30 items, \S+ has as many, and they are others, or the same"):
        publish(desk, data, "y/sasrec", "x/sasrec")
    table = datasets.Dataset.from_parquet(str(desk / "mymodel" / "predictions.parquet"))
    table.select(range(5)).to_parquet(str(desk / "mymodel" / "predictions.parquet"))
    with pytest.raises(ValueError, match=r"mymodel was scored on 5 users"):
        publish(desk, data, "mymodel")
    assert recipe.unique_names("a", [Path("/a"), Path("/b/a"), Path("/c/a")]) == ["//a", "b/a", "c/a"]


def test_publish_on_splits_made_in_python(desk, data, tmp_path, capsys):
    """A folder of `splits` alone is read; it cannot bring codebooks, and says so."""
    made = tmp_path / "made"
    shutil.copytree(data / "splits", made / "splits")
    card = publish(desk, made, "mymodel")
    assert "made has no codebooks" in capsys.readouterr().out and "| mymodel |" in card.text
    (made / "semantic_ids.json").write_text("{}", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="made is no complete data folder"):  # one that prepare did not finish
        publish(desk, made)
    larger = tmp_path / "larger"
    splits = DataFolder(data).splits
    rows = splits["test"].map(lambda row: {"targets": [item + 500 for item in row["targets"]]})
    datasets.DatasetDict({**splits, "test": rows}).save_to_disk(str(larger / "splits"))
    with pytest.raises(ValueError, match=r"larger has at least 5\d\d items, \S+aligned knows 30"):
        publish(desk, larger)
