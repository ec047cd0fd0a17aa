"""recipes/reward.py as a person runs it, on a simulated log."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from onerec_hf import OneRecPScoreModel, OneRecSessionRewardModel
from onerec_hf.data import DataFolder, load_splits
from onerec_hf.evaluation import auc
from onerec_hf.scripts.reward_arguments import RewardArguments, make_collator
from onerec_hf.simulator import ShortVideoWorld

ROOT = Path(__file__).resolve().parents[2]
DAY = 86_400_000
START = 1_704_067_200_000


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    from onerec_hf.scripts import prepare

    folder = tmp_path_factory.mktemp("reward")
    world = ShortVideoWorld(num_users=120, num_items=80, num_days=10, mean_events=30, seed=3)
    world.logs().to_parquet(folder / "log.parquet")
    world.items.to_parquet(folder / "items.parquet")
    world.users.to_parquet(folder / "users.parquet")
    names = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
    quality = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "min_history": 0, "cut": "first"}
    prepare.main(
        prepare.PrepareArguments(
            source=str(folder / "log.parquet"),
            output=str(folder / "data"),
            columns=names,
            feedback=["play_time_ms", "duration_ms", "is_click", "long_view", "is_like", "is_follow", "is_forward"],
            items=str(folder / "items.parquet"),
            users=str(folder / "users.parquet"),
            sessions={"max_gap": 0, "max_events": 1, "history": "all", **quality},
            validation_start=START + 6 * DAY,
            test_start=START + 8 * DAY,
            collaborative_dim=16,
            codebook_size=16,
        )
    )
    return folder / "data"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    from transformers import TrainingArguments
    from trl import TrlParser

    from onerec_hf.scripts import reward

    output = tmp_path_factory.mktemp("model")
    argv = ["--data", str(data), "--output_dir", str(output), "--targets", "ctr", "swt", "--watch_cap_ms", "60000"]
    argv += [
        "--item_categories",
        "category",
        "author_id",
        "--item_quantiles",
        "duration_ms",
        "--rates",
        "item",
        "user",
    ]
    argv += [
        "--context_item_features",
        "category",
        "--event_features",
        '{"is_click": ["category", 3]}',
        "--period",
        str(DAY),
    ]
    argv += ["--request_features", '{"timestamp": ["hour", 25]}', "--warm_up", "1", "--user_categories", "activity"]
    argv += [
        "--model",
        '{"hidden_size": 16, "context_embed_dim": 4}',
        "--num_train_epochs",
        "2",
        "--report_to",
        "none",
    ]
    argv += ["--learning_rate", "0.01", "--per_device_train_batch_size", "64", "--eval_strategy", "epoch"]
    parser = TrlParser((reward.RewardArguments, TrainingArguments))
    return output, reward.main(*parser.parse_args_and_config(argv))


def test_it_learns_and_reports(trained):
    output, result = trained
    assert result == json.loads((output / "metrics.json").read_text())
    for split in ("validation", "test"):
        for target in ("ctr", "swt"):
            assert result[split][f"{target}_auc"] > 0.6
            assert 0.7 < result[split][f"{target}_calibration"] < 1.4
            assert result[split][f"p_score_{target}_auc"] > 0.6
    scores = datasets.Dataset.from_parquet(str(output / "test_scores.parquet")).with_format("numpy")[:]
    found = auc(scores["ctr"], scores["predicted_ctr"])
    assert found == pytest.approx(result["test"]["ctr_auc"], abs=1e-6)


def test_the_folder_loads_and_scores_any_candidate(trained, data):
    output, _ = trained
    model = AutoModel.from_pretrained(output)
    assert isinstance(model, OneRecPScoreModel) and model.config.targets == ["ctr", "swt"]
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.catalogue.num_items == 80
    names = model.config.item_features, model.config.item_numbers
    batch = {
        "item_ids": torch.tensor(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids))[None],
        "item_features": torch.ones(1, 80, len(names[0]), dtype=torch.long),
        "item_numbers": torch.zeros(1, 80, len(names[1])),
        "context_ids": torch.zeros(1, 1, tokenizer.catalogue.num_levels, dtype=torch.long),
        "context_mask": torch.zeros(1, 1, dtype=torch.bool),
        "context_features": torch.zeros(1, 1, len(model.config.context_features), dtype=torch.long),
        "user_features": torch.zeros(1, len(model.config.user_features), dtype=torch.long),
    }
    rewards = model(**batch).rewards
    assert rewards.shape == (1, 80) and np.all((0 < rewards.detach().numpy()) & (rewards.detach().numpy() < 1))


def test_the_snippet_of_the_card_runs(trained):
    output, result = trained
    card = (output / "README.md").read_text()
    assert f"| ctr | {result['test']['ctr_auc']:.4f} |" in card and "model-index" in card
    snippet = card.split("```python")[1].split("```")[0]
    found = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("tensor([[")


def test_sessions_are_judged_as_a_whole(tmp_path):
    """Requests of a simulated log, through prepare.py and reward.py; the folder scores sessions of items."""
    from transformers import TrainingArguments

    from onerec_hf.scripts import prepare, reward

    world = ShortVideoWorld(num_users=150, num_items=60, num_days=10, mean_events=40, request_size=5, seed=3)
    world.logs().to_parquet(tmp_path / "log.parquet")
    world.items.to_parquet(tmp_path / "items.parquet")
    quality = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "min_history": 0, "cut": "first"}
    prepare.main(
        prepare.PrepareArguments(
            source=str(tmp_path / "log.parquet"),
            output=str(tmp_path / "data"),
            columns={"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"},
            feedback=["request_id", "play_time_ms", "duration_ms", "is_click", "long_view"],
            items=str(tmp_path / "items.parquet"),
            sessions={"request": "request_id", "history": "all", "interactions": {}, **quality},
            validation_start=START + 6 * DAY,
            test_start=START + 8 * DAY,
            collaborative_dim=16,
            codebook_size=16,
        )
    )
    arguments = reward.RewardArguments(data=str(tmp_path / "data"), targets=["swt", "ctr"])
    arguments.rates, arguments.warm_up, arguments.item_quantiles = ["item", "user"], 1, ["duration_ms"]
    arguments.session_wise, arguments.watch_cap_ms, arguments.session_cap_ms = True, 60_000, 300_000
    arguments.model = {"hidden_size": 16, "context_embed_dim": 4}
    training = TrainingArguments(str(tmp_path / "model"), num_train_epochs=6, learning_rate=0.01, report_to="none")
    result = reward.main(arguments, training)
    assert result["test"]["swt_auc"] > 0.6 and result["test"]["reward_ctr_auc"] > 0.6
    assert "whole session" in (tmp_path / "model" / "README.md").read_text()
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert isinstance(model, OneRecSessionRewardModel)
    rows = load_splits(tmp_path / "data")["test"].with_format("numpy")[:]
    assert len(rows["user"]) == len(datasets.Dataset.from_parquet(str(tmp_path / "model" / "test_scores.parquet")))


def test_it_pushes_itself_with_our_card(trained, data, hub, tmp_path):
    from transformers import TrainingArguments

    from onerec_hf.scripts import reward

    settings = {"push_to_hub": True, "hub_model_id": "org/reward", "hub_private_repo": True, "max_steps": 1}
    training = TrainingArguments(str(tmp_path), report_to="none", save_strategy="no", **settings)
    arguments = reward.RewardArguments(data=str(data), targets=["ctr"], warm_up=1, model={"hidden_size": 8})
    reward.main(arguments, training)
    repository = hub.repos["org/reward"]
    assert repository.private and len(repository.commits) == 1
    files = repository.branches["main"]
    assert {"model.safetensors", "modeling_reward.py", "catalogue.safetensors"} < set(files)
    assert not [name for name in files if name.endswith((".parquet", ".bin"))]
    card = ModelCard(files["README.md"].decode())
    assert "reward-model" in card.data.tags and 'repo = "org/reward"' in card.text
    own = AutoModel.from_pretrained("org/reward").config.catalogue_fingerprint
    assert own == AutoTokenizer.from_pretrained("org/reward").catalogue.fingerprint()


def test_an_unknown_column_is_named(data, tmp_path):
    from transformers import TrainingArguments

    from onerec_hf.scripts import reward

    arguments = reward.RewardArguments(data=str(data), targets=["ctr"], item_categories=["colour"])
    with pytest.raises(ValueError, match=r"items.parquet has no \['colour'\]"):
        reward.main(arguments, TrainingArguments(str(tmp_path), report_to="none"))


def test_rows_on_disk_are_those_in_memory(data, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    from onerec_hf.scripts import reward

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    training = TrainingArguments(str(tmp_path / "run"), report_to="none", remove_unused_columns=False)
    arguments = {"targets": ["ctr"], "rates": ["item", "user"], "period": DAY, "model": '{"hidden_size": 16}'}
    trainers = [
        reward.make_trainer(RewardArguments(str(data), streaming=streaming, **arguments), training)[0]
        for streaming in (False, True)
    ]
    assert [bool(trainer.train_dataset.cache_files) for trainer in trainers] == [False, True]
    batches = [next(iter(trainer.get_train_dataloader())) for trainer in trainers]  # in the order of the same seed
    assert batches[0].keys() == batches[1].keys() and len(trainers[0].train_dataset) == len(trainers[1].train_dataset)
    for name, tensor in batches[0].items():
        assert torch.equal(tensor.nan_to_num(-1), batches[1][name].nan_to_num(-1)), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rates": ["author"]}, r"rates=\['author'\]: allowed are item, user and the item_categories"),
        ({"context_item_features": ["category"]}, r"context_item_features=\['category'\]: they are some of"),
        ({"warm_up": 99}, r"warm_up=99: the log has (\d+) boundaries .*shorter --period, .*or --warm_up \1 at most"),
        ({"item_categories": ["colour"]}, r"items.parquet has no \['colour'\]; it has"),
    ],
)
def test_what_the_tables_do_not_have_is_named(data, settings, message):
    arguments = RewardArguments(str(data), ["ctr"], period=DAY, **settings)
    with pytest.raises(ValueError, match=message):
        make_collator(arguments, DataFolder(data), load_splits(data))


def test_rows_without_sessions_are_refused(data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    splits = load_splits(data)
    shutil.rmtree(other / "splits")
    splits.remove_columns("session_start").save_to_disk(str(other / "splits"))
    with pytest.raises(ValueError, match=r"have no session_start: .*onerec prepare --sessions"):
        make_collator(RewardArguments(str(other), ["ctr"]), DataFolder(other), load_splits(other))
