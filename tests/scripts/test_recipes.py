"""The recipes as a person runs them, on a world small enough for a test."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from onerec_hf.data import load_splits
from onerec_hf.recommender import Recommender

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    from onerec_hf.scripts import quickstart

    output = tmp_path_factory.mktemp("quickstart")
    return output, quickstart.main(output, num_users=150, num_items=200, epochs=2)


def test_quickstart_leaves_a_repository(quickstart):
    output, reports = quickstart
    folder = output / "onerec-v2-quickstart"
    for name in (
        "model.safetensors",
        "catalogue.safetensors",
        "tokenizer.json",
        "generation_config.json",
        "README.md",
    ):
        assert (folder / name).is_file(), name
    for name in ("training_curve.png", "recall_by_frequency.png", "codebook_usage.png", "prediction_entropy.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG", name
    ours = {"OneRec-V2, re-ranked", "OneRec-V2, search alone"}
    assert set(reports) == ours | {"popularity", "cooccurrence", "sasrec", "the scorers' sum, without OneRec"}
    assert Recommender.from_pretrained(folder).ranker.reranker.parts == ("codes", "cooccurrence", "sasrec")
    for report in reports.values():
        assert report["test"]["invalid_rate"] == 0
        assert 0 <= report["test"]["recall@10"] <= 1


def test_the_snippet_of_the_card_runs(quickstart):
    card = (quickstart[0] / "onerec-v2-quickstart" / "README.md").read_text()
    assert "model-index" in card
    snippet = card.split("```python")[1].split("```")[0]
    result = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("[") == 11  # ten lists in a list


def test_the_python_of_the_quickstart_page_runs(quickstart, tmp_path, monkeypatch, capsys):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "quickstart").symlink_to(quickstart[0])
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "get_started" / "quickstart.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {})
    first, *served = capsys.readouterr().out.strip().splitlines()[-4:]
    assert len(eval(first)) == 10 and len(served) == 3


def test_checkpoints_hold_everything(quickstart):
    checkpoint = next((quickstart[0] / "onerec-v2-quickstart").glob("checkpoint-*"))
    model = AutoModel.from_pretrained(checkpoint)
    assert model.catalogue is not None
    assert AutoTokenizer.from_pretrained(checkpoint).catalogue.num_items == model.catalogue.num_items


def train(quickstart, folder, *arguments):
    from trl import TrlParser

    from onerec_hf.scripts import sft
    from onerec_hf.trainers import OneRecSFTConfig

    model = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "context_embed_dim": 8,
        "dropout": 0.1,
    }
    argv = ["--data", str(quickstart[0] / "data"), "--output_dir", str(folder), "--model", json.dumps(model)]
    argv += ["--num_train_epochs", "2", "--save_strategy", "epoch", "--report_to", "none", "--eval_strategy", "epoch"]
    argv += ["--event_features", '{"timestamp": ["gap", 20]}', "--item_features", "author_id", "--num_beams", "20"]
    parser = TrlParser((sft.ModelArguments, OneRecSFTConfig))
    return sft.main(*parser.parse_args_and_config([*argv, *arguments]))


def test_sft_with_features_evaluates_by_generation_and_resumes(quickstart, tmp_path):
    whole = train(quickstart, tmp_path / "whole")
    evaluations = [record for record in whole["log"] if "eval_ndcg@10" in record]
    assert len(evaluations) == 2 and any("eval_loss" in record for record in whole["log"])
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert list(config["context_features"]) == ["author_id", "timestamp"]
    first = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    resumed = train(quickstart, tmp_path / "resumed", "--resume_from_checkpoint", str(first))
    last = [report["log"][-1]["train_loss"] for report in (whole, resumed)]
    assert resumed["test"] == whole["test"], last
    weights = [AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("whole", "resumed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


V1 = {
    "model_type": "onerec_v1",
    "short_term_length": 5,
    "positive_length": 0,
    "lifelong_length": 20,
    "num_lifelong_queries": 4,
}
ONE = {"model_type": "onerec", "num_session_items": 1, "context_tokens": "item"}


@pytest.mark.parametrize("system", [V1, ONE], ids=["onerec_v1", "onerec"])
def test_sft_trains_every_system(quickstart, tmp_path, system):
    """With experts, balanced and logged; one row per target; scored by the same search."""
    from onerec_hf.scripts import sft
    from onerec_hf.trainers import OneRecSFTConfig

    model = system | {"hidden_size": 16, "num_hidden_layers": 1, "num_encoder_layers": 1, "num_attention_heads": 2}
    model |= {"num_experts": 4, "moe_intermediate_size": 16}
    arguments = sft.ModelArguments(data=str(quickstart[0] / "data"), model=model, num_beams=20, max_history=10)
    training = OneRecSFTConfig(
        output_dir=str(tmp_path), max_steps=30, logging_steps=10, learning_rate=3e-3, report_to="none"
    )
    report = sft.main(arguments, training)
    assert report["test"]["invalid_rate"] == 0 and report["test"]["recall@20"] > 0
    assert report["log"][0]["expert_load_max"] >= 1 and report["log"][1]["loss"] < report["log"][0]["loss"]
    assert AutoModel.from_pretrained(tmp_path).config.model_type == system["model_type"]


def test_targets_that_are_no_session(quickstart, tmp_path):
    """Validation rows with several next items: rows of their own for sessions of one item, else refused at once."""
    from onerec_hf.scripts import sft
    from onerec_hf.trainers import OneRecSFTConfig

    data = shutil.copytree(quickstart[0] / "data", tmp_path / "data")
    (path,) = (data / "splits" / "validation").glob("*.parquet")
    rows = pq.read_table(path)
    place = rows.column_names.index("targets")
    several = pa.array([[0, 1, 2, 3]] * len(rows), rows.schema.field("targets").type)
    pq.write_table(rows.set_column(place, rows.schema.field("targets"), several), path)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_encoder_layers": 1, "num_attention_heads": 2}

    def train(items):
        model = small | {"model_type": "onerec", "num_session_items": items, "num_experts": 0}
        arguments = sft.ModelArguments(data=str(data), model=model, num_beams=20, max_history=10, score=False)
        training = OneRecSFTConfig(
            output_dir=str(tmp_path / str(items)), max_steps=2, eval_strategy="steps", eval_steps=2, report_to="none"
        )
        return sft.main(arguments, training)

    assert any(record.get("eval_loss", 0) > 1 for record in train(1)["log"])
    with pytest.raises(ValueError, match="a row of the validation split has 4 targets, the model writes sessions of"):
        train(3)


def test_recommend_serves_every_row(quickstart, tmp_path):
    from onerec_hf.scripts import recommend

    rows = [{"history": [int(i)], "user": u} for u, i in enumerate(range(0, 60, 7))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = {"repo": str(quickstart[0] / "onerec-v2-quickstart"), "output": str(tmp_path / "out"), "k": 3}
    path = recommend.main(
        recommend.RecommendArguments(dataset=str(tmp_path / "rows.jsonl"), unknown_items="ignore", **arguments)
    )
    found = datasets.Dataset.from_parquet(str(path))
    assert found["user"][:] == [row["user"] for row in rows] and {len(row) for row in found["item_ids"]} == {3}


def test_averaged_weights_are_what_is_evaluated_saved_and_resumed(quickstart, tmp_path):
    arguments = ["--item_vectors", "true", "--weight_average_decay", "0.9", "--save_total_limit", "2"]
    arguments += [
        "--load_best_model_at_end",
        "true",
        "--metric_for_best_model",
        "eval_loss",
        "--learning_rate",
        "0.01",
    ]
    whole = train(quickstart, tmp_path / "whole", *arguments)
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    averaged, raw = (load_file(checkpoints[-1] / name) for name in ("model.safetensors", "raw_weights.safetensors"))
    assert set(averaged) - set(raw) == {"model.context_processor.embed_features.tables.1.weight"}  # the fixed table
    assert (averaged["lm_head.weight"] != raw["lm_head.weight"]).any()
    losses = [record["eval_loss"] for record in whole["log"] if "eval_loss" in record]
    assert whole["best_metric"] == min(losses)
    best = load_file(checkpoints[int(np.argmin(losses))] / "model.safetensors")
    final = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(torch.equal(best[name], final[name]) for name in best)
    resumed = train(quickstart, tmp_path / "resumed", *arguments, "--resume_from_checkpoint", str(checkpoints[0]))
    assert resumed["test"] == whole["test"]
    assert [r["eval_loss"] for r in resumed["log"] if "eval_loss" in r] == losses
    recommender = Recommender.from_pretrained(tmp_path / "whole")
    items = recommender.model.catalogue.item_ids
    found = recommender.recommend([items[:3], items[5:7]], k=5)
    assert [len(row) for row in found] == [5, 5]
    again = Recommender.from_pretrained(tmp_path / "resumed").recommend([items[:3], items[5:7]], k=5)
    assert [[item.item_id for item in row] for row in again] == [[item.item_id for item in row] for row in found]


def test_prepare_learns_from_the_training_split_alone(quickstart):
    data = quickstart[0] / "data"
    splits = load_splits(data)
    catalogue = AutoTokenizer.from_pretrained(data / "tokenizer").catalogue
    counts = np.bincount(
        np.concatenate(splits["train"].with_format("numpy")["history"]), minlength=catalogue.num_items
    )
    assert (catalogue.popularity == counts).all()
    assert catalogue.num_semantic_ids == catalogue.num_items  # next_free leaves no collision


def train_grpo(quickstart, folder, *arguments):
    from trl import TrlParser

    from onerec_hf.scripts import grpo
    from onerec_hf.trainers import OneRecGRPOConfig

    argv = ["--policy", str(quickstart[0] / "onerec-v2-quickstart"), "--data", str(quickstart[0] / "data")]
    argv += ["--output_dir", str(folder), "--report_to", "none", "--save_strategy", "no", "--logging_steps", "1"]
    argv += [
        "--use_cpu",
        "true",
        "--sft_weight",
        "0.5",
        "--learning_rate",
        "1e-3",
        "--sign_norm_steps",
        "0",
        *arguments,
    ]
    return grpo.main(*TrlParser((grpo.RLArguments, OneRecGRPOConfig)).parse_args_and_config(argv))


@pytest.fixture(scope="module")
def impressions(quickstart, tmp_path_factory):
    """Every impression of the quickstart's world, which keeps only those that were watched."""
    from onerec_hf.simulator import ShortVideoWorld

    path = tmp_path_factory.mktemp("impressions") / "impressions.parquet"
    ShortVideoWorld(num_users=150, num_items=200, seed=0).logs().to_parquet(path)
    return path


WORLD = json.dumps({"num_users": 150, "num_items": 200, "seed": 0})
COLUMNS = json.dumps({"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"})


def test_grpo_from_rollouts_leaves_and_pushes_a_repository(quickstart, hub, tmp_path):
    arguments = ["--rewards", "hit", "format", "--rollout", "sample", "--num_generations", "8"]
    arguments += ["--per_device_train_batch_size", "32", "--max_steps", "3", "--push_to_hub", "true"]
    arguments += ["--hub_model_id", "org/rl", "--hub_private_repo", "true"]
    report = train_grpo(quickstart, tmp_path, *arguments)
    log = report["log"][0]
    assert log["legality"] == log["rewards/format_reward/mean"] == 1
    assert (log["rewards/hit_reward/mean"] > 0) == (log["hit_rate"] > 0)
    assert 0 <= report["test"]["recall@10"] <= 1 and AutoModel.from_pretrained(tmp_path).catalogue.num_items <= 200
    assert hub.repos["org/rl"].private and len(hub.repos["org/rl"].commits) == 1
    pushed = Recommender.from_pretrained("org/rl")
    assert pushed.recommend([[]], k=3)[0][0].metadata["title"] and pushed.quantizer is not None
    card = hub.repos["org/rl"].branches["main"]["README.md"].decode()
    assert "Reinforcement learning" in card and "| `rollout` | sample |" in card and "The training log: " in card


def test_feedback_of_own_exposures_then_an_ab_test(quickstart, impressions, tmp_path):
    """A model against itself: every lift is exactly 0. What it logged is its own probability, so the first ratio is
    1.
    """
    import pandas as pd

    from onerec_hf.scripts import ab_test

    policy = str(quickstart[0] / "onerec-v2-quickstart")
    same = ab_test.main(policy, policy, str(impressions), str(tmp_path / "aa"), WORLD, num_days=3, keep_logs=True)
    assert all(lift == {"value": 0, "low": 0, "high": 0} for lift in same["lifts"].values())
    reported = {"app_stay_time", "watch_time", "views", "likes", "lifetime", "diversity", "cluster_density"}
    assert reported | {"cold_start_views", "new_item_share"} <= set(same["lifts"])
    assert (tmp_path / "aa" / "ab_test.png").read_bytes()[:4] == b"\x89PNG"
    own = pd.read_parquet(tmp_path / "aa" / "exposures_control_0.parquet").assign(
        request_id=lambda log: log.request_id + 10**6
    )
    pd.concat([pd.read_parquet(impressions), own]).to_parquet(tmp_path / "both.parquet")
    logged = ["--exposures", str(tmp_path / "both.parquet"), "--columns", COLUMNS, "--ties", "inclusive"]
    logged += ["--logged_weight", "1", "--max_steps", "1", "--sft", "rsft", "--logged_batch_size", "64"]
    logged += ["--start", str(float(own.time_ms.min())), "--loss_type", "grpo"]
    log = train_grpo(quickstart, tmp_path / "rl", *logged)["log"][0]
    assert log["weight/positive"] == pytest.approx(1, abs=1e-3) and log["clip_fraction"] == 0
    with pytest.raises(ValueError, match="reward='a_folder' would score nothing"):
        train_grpo(quickstart, tmp_path / "unused", *logged, "--rewards", "model", "--reward", "a_folder")
    other = ab_test.main(policy, str(tmp_path / "rl"), str(impressions), str(tmp_path / "ab"), WORLD, num_days=1)
    assert any(lift["value"] != 0 for lift in other["lifts"].values())


def test_exposures_carry_what_the_policy_reads_of_behaviours(quickstart, impressions):
    from onerec_hf.scripts import grpo

    policy, data = (str(quickstart[0] / name) for name in ("onerec-v2-quickstart", "data"))
    recommender = Recommender.from_pretrained(policy)
    collator = recommender.ranker.collator
    collator.event_features = collator.event_features | {"is_click": None}
    args = grpo.RLArguments(policy=policy, data=data, exposures=str(impressions), columns=COLUMNS)
    rows = grpo.load_exposures(args, recommender.model.catalogue, collator)
    assert "is_click" in rows.column_names and {len(row) for row in rows["is_click"]} > {0}


def test_publish_pushes_a_repository_that_can_be_served(quickstart, hub, tmp_path):
    from onerec_hf.scripts import publish

    output, reports = quickstart
    folder = shutil.copytree(output / "onerec-v2-quickstart", tmp_path / "model")
    url = publish.main(
        publish.PublishArguments(
            model=str(folder),
            data=str(output / "data"),
            baselines=[str(output / "sasrec")],
            repo="org/mine",
            private=True,
        )
    )
    repository = hub.repos["org/mine"]
    assert url.startswith(hub.url) and repository.private and len(repository.commits) == 1
    files = set(repository.branches["main"])
    assert {"collator_config.json", "items.jsonl", "quantizer.safetensors", "codebook_usage.png"} < files
    assert not [name for name in files if name.startswith(("predictions", "checkpoint", "training_args"))]
    card = ModelCard(repository.branches["main"]["README.md"].decode())
    found = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert found["recall@10"] == round(reports["OneRec-V2, re-ranked"]["test"]["recall@10"], 5)
    assert "| sasrec |" in card.content and "| mine, search alone |" in card.content
    assert "| codes, of the best |" in card.content and "| learning rate | 0.003, cosine |" in card.content
    assert "scorers/cooccurrence/model.safetensors" in files
    recommender = Recommender.from_pretrained("org/mine")
    history = recommender.model.catalogue.item_ids[:4].tolist()
    assert all(item.metadata["title"] for item in recommender.recommend([history], k=5)[0])


RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py") if "__main__" in path.read_text())


@pytest.mark.parametrize("recipe", RECIPES)
def test_help(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"recipes/{recipe}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"), run_name="__main__")
    assert end.value.code == 0 and f"usage: onerec {recipe}" in capsys.readouterr().out


def test_an_unknown_column_is_named(quickstart, tmp_path):
    with pytest.raises(ValueError, match=r"items.parquet has no \['colour'\]"):
        train(quickstart, tmp_path, "--item_features", "colour")


def test_prepare_writes_sessions(tmp_path):
    from trl import TrlParser

    from onerec_hf.scripts import prepare
    from onerec_hf.simulator import ShortVideoWorld

    log = ShortVideoWorld(num_users=120, num_items=200, request_size=10, mean_events=60).logs()
    log.to_parquet(tmp_path / "log.parquet")
    columns = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
    argv = ["--source", str(tmp_path / "log.parquet"), "--columns", json.dumps(columns), "--output", str(tmp_path)]
    argv += ["--feedback", "request_id", "play_time_ms", "is_click", "is_like", "is_follow", "is_forward"]
    argv += ["--sessions", json.dumps({"request": "request_id", "min_interactions": 0})]
    argv += ["--collaborative_dim", "8", "--codebook_size", "16", "--num_levels", "2"]
    prepare.main(TrlParser(prepare.PrepareArguments).parse_args_and_config(argv)[0])
    splits = load_splits(tmp_path)
    assert all(len(row["targets"]) == 5 and row["length"] == len(row["history"]) for row in splits["train"])
    held_out = np.full(120, np.inf)
    for name in ("validation", "test"):
        for row in splits[name]:
            held_out[row["user"]] = min(held_out[row["user"]], row["session_start"])
    effective = log[["is_click", "is_like", "is_follow", "is_forward"]].any(axis=1)
    users = np.sort(log.user_id.unique())
    known = log[effective & (log.time_ms < held_out[np.searchsorted(users, log.user_id)])]
    catalogue = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").catalogue
    counts = known.video_id.value_counts().reindex(catalogue.item_ids, fill_value=0)
    assert np.isfinite(held_out).any() and (catalogue.popularity == counts).all()
