"""Features of the papers that are off by default, from the log on: OneRecV1's lifelong pathway, the industrial
reward.
"""

import json
import shutil

import datasets
import numpy as np
import pytest
import yaml
from transformers import AutoModel

from onerec_hf.data import DataFolder, compress_lifelong
from onerec_hf.recommender import Recommender
from onerec_hf.scripts import grpo, prepare, sft
from onerec_hf.scripts.parser import CONFIGS, ScriptParser
from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.trainers import OneRecGRPOConfig, OneRecSFTConfig

from .test_recipe_dpo import policy  # noqa: F401  fixtures
from .test_recipe_reward import data, trained  # noqa: F401

SMALL = {"compress_above": 12, "max_cluster_size": 7, "averaged": ["timestamp", "play_time_ms"], "sparse": ["is_like"]}


def of_package(name: str, **changes) -> dict:
    """The settings of a config of the package, with changes that make it small enough for a test."""
    return yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8")) | changes


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lifelong")
    world = ShortVideoWorld(num_users=40, num_items=80, num_days=10, mean_events=40, seed=3)
    world.logs().rename(columns={"video_id": "item_id", "time_ms": "timestamp"}).to_parquet(folder / "log.parquet")
    return folder / "log.parquet"


def prepare_lifelong(log, output, **changes):
    settings = of_package("mydata/lifelong_prepare.yaml", codebook_size=16, collaborative_dim=16) | changes
    prepare.main(prepare.PrepareArguments(source=str(log), output=str(output), **settings))
    return DataFolder(output)


@pytest.fixture(scope="module")
def lifelong(log):
    return prepare_lifelong(log, log.parent / "data", lifelong=SMALL)


def test_prepare_compresses_what_is_long(lifelong):
    for name in ("train", "test"):
        rows = lifelong.splits[name]
        long = np.array([len(history) > SMALL["compress_above"] for history in rows["history"]])
        lengths = np.array([[len(row["history"]), len(row["lifelong"])] for row in rows])
        assert long.any() and (lengths[long, 1] < lengths[long, 0]).all()
        assert (lengths[~long, 1] == lengths[~long, 0]).all()
    rows = lifelong.splits["test"]
    plain = rows.remove_columns([column for column in rows.column_names if column.startswith("lifelong")])
    again = compress_lifelong(plain, lifelong.item_embeddings, seed=0, **SMALL)
    for column in ("lifelong", "lifelong_timestamp", "lifelong_play_time_ms", "lifelong_is_like"):
        assert again[column][:] == rows[column][:]


def test_a_model_of_four_pathways_trains_on_it_and_is_served(lifelong, tmp_path):
    settings = of_package("mydata/lifelong_sft.yaml", num_train_epochs=1, eval_users=20)
    settings["model"] |= {
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_lifelong_queries": 4,
        "intermediate_size": 24,
    }
    config = tmp_path / "sft.yaml"
    config.write_text(yaml.safe_dump(settings), encoding="utf-8")
    argv = ["--config", str(config), "--data", str(lifelong.path), "--output_dir", str(tmp_path / "model")]
    parser = ScriptParser("sft", None, [sft.ModelArguments, OneRecSFTConfig])
    report = sft.main(*parser.parse([*argv, "--num_beams", "20", "--use_cpu", "true"]))
    assert report["test"]["invalid_rate"] == 0
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.config.pathway_lengths == {"short_term": 20, "positive": 64, "lifelong": 2000}
    recommender = Recommender.from_pretrained(tmp_path / "model", num_beams=20)
    assert recommender.ranker.collator.settings["lifelong"] == "lifelong"
    history = recommender.model.catalogue.item_ids[:5].tolist()
    assert len(recommender.recommend([history], k=5, events={"is_like": [[1, 0, 0, 1, 0]]})[0]) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lifelong": {"max_cluster": 9}}, r"lifelong=\['max_cluster'\] is not known; allowed are \['averaged'"),
        ({"sessions": None}, "give sessions, with history: all"),
        ({"lifelong": SMALL | {"sparse": ["is_share"]}}, r"\['is_share'\] are not among those of the rows"),
    ],
)
def test_what_lifelong_needs_is_said_before_the_long_work(log, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr(prepare, "embed", lambda *_: pytest.fail("the long work has begun"))
    with pytest.raises(ValueError, match=message):
        prepare_lifelong(log, tmp_path / "data", **changes)


# ---- the industrial reward


@pytest.fixture(scope="module")
def marked(data, tmp_path_factory):  # noqa: F811
    """A copy of the data folder whose items say whether they are advertisements: every second one."""
    folder = shutil.copytree(data, tmp_path_factory.mktemp("industrial") / "data")
    items = datasets.Dataset.from_parquet(str(data / "items.parquet"))
    items = items.add_column("is_ad", [i % 2 for i in range(len(items))])
    items.to_parquet(str(folder / "items.parquet"))
    return folder


def test_the_industrial_reward_scales_the_class_down_above_its_quota(marked, policy):  # noqa: F811
    folder = DataFolder(marked)
    catalogue = Recommender.from_pretrained(policy).model.catalogue
    tokens = folder.tokenizer.encode_semantic_ids(catalogue.semantic_ids).tolist()

    def reward(completion_ids, **columns):
        return [1.0] * len(completion_ids)

    for quota, expected in ((0.2, [1.0, 0.25, 1.0, 0.25]), (0.5, [1.0] * 4)):
        settings = {"column": "is_ad", "quota": quota, "factor": 0.25}
        scaled = grpo.industrial_reward("hit", reward, settings, folder, catalogue)
        assert scaled(completion_ids=tokens[:4]) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"column": "is_ad", "quota": 0.1}, "give column, quota and factor, and nothing else"),
        ({"column": "ads", "quota": 0.1, "factor": 0.5}, r"items.parquet has no \['ads'\]"),
        ({"column": "author_id", "quota": 0.1, "factor": 0.5}, "'author_id' of items.parquet must be 0 or 1"),
        ({"column": "is_ad", "quota": 2, "factor": 0.5}, r"quota=2 must lie in \[0, 1\]"),
    ],
)
def test_what_the_industrial_reward_refuses(marked, policy, settings, message):  # noqa: F811
    catalogue = Recommender.from_pretrained(policy).model.catalogue
    with pytest.raises(ValueError, match=message):
        grpo.industrial_reward("hit", lambda **_: [], settings, DataFolder(marked), catalogue)


def test_reinforcement_learning_with_the_industrial_reward(marked, policy, trained, tmp_path):  # noqa: F811
    industrial = json.dumps({"column": "is_ad", "quota": 0.0, "factor": 0.5})
    settings = {"data": marked, "policy": policy, "output_dir": tmp_path, "max_steps": 1, "logging_steps": 1}
    settings |= {"num_generations": 8, "per_device_train_batch_size": 32, "save_strategy": "no", "report_to": "none"}
    settings |= {"use_cpu": "true", "num_beams": 20, "reward": trained[0], "seed": 0}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    parser = ScriptParser("grpo", None, [grpo.RLArguments, OneRecGRPOConfig])
    logs = []
    for more in ([], ["--industrial", industrial]):
        logs.append(grpo.main(*parser.parse([*argv, "--rewards", "model", "hit", *more]))["log"][0])
    plain, scaled = logs[0]["rewards/reward_model/mean"], logs[1]["rewards/industrial_model/mean"]
    assert 0.5 * plain < scaled < plain and "rewards/industrial_hit/mean" in logs[1]
