"""Weights that no step has changed are never saved as a trained model."""

import datasets
import numpy as np
import pandas as pd
import pytest
from transformers import AutoTokenizer, TrainingArguments

from onerec_hf.scripts import dpo, grpo, prepare, reward, sft
from onerec_hf.scripts.reward_arguments import RewardArguments
from onerec_hf.trainers import IPAConfig, OneRecGRPOConfig, OneRecSFTConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
MODEL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
MODEL |= {"context_embed_dim": 4}
QUIET = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
NO_STEP = "the training made no step, so nothing is saved: .*num_train_epochs=0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four events per user: too few to judge a play time by the earlier ones."""
    folder, rng = tmp_path_factory.mktemp("no_step"), np.random.default_rng(0)
    log = pd.DataFrame({"user_id": np.repeat(np.arange(30), 4), "item_id": rng.integers(0, 20, 120)})
    log["timestamp"], log["request_id"] = np.tile(np.arange(4), 30) + log.user_id, np.arange(120)
    log = log.assign(long_view=1, is_hate=0, play_time_ms=rng.integers(1, 9000, 120), duration_ms=9000)
    log.to_parquet(folder / "log.parquet")
    sizes = {"collaborative_dim": 8, "codebook_size": 8, "num_levels": 2, "feedback": ["long_view"]}
    source = str(folder / "log.parquet")
    prepare.main(prepare.PrepareArguments(source, str(folder / "data"), **sizes))
    sessions = {"max_gap": 0, "max_events": 1, "min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}
    sessions |= {"watched": None, "interactions": {}, "cut": "first"}
    prepare.main(prepare.PrepareArguments(source, str(folder / "exposures"), sessions=sessions, **sizes))
    training = OneRecSFTConfig(str(folder / "policy"), max_steps=1, **QUIET)
    sft.main(sft.ModelArguments(str(folder / "data"), MODEL, score=False), training)
    return folder


def train(recipe, folder, output, **settings):
    data, policy = str(folder / "data"), str(folder / "policy")
    settings = QUIET | {"num_train_epochs": 0} | settings
    if recipe == "sft":
        return sft.main(sft.ModelArguments(data, MODEL, score=False), OneRecSFTConfig(str(output), **settings))
    if recipe == "reward":
        arguments = RewardArguments(str(folder / "exposures"), ["long_view"], {"hidden_size": 8}, period=5, warm_up=1)
        return reward.main(arguments, TrainingArguments(str(output), **settings))
    if recipe == "dpo":
        tokenizer = AutoTokenizer.from_pretrained(policy)
        tokens = tokenizer.encode_items(tokenizer.catalogue.item_ids[:2]).tolist()
        datasets.Dataset.from_dict({"row": [0], "chosen": tokens[:1], "rejected": tokens[1:]}).save_to_disk(
            str(folder / "pairs")
        )
        arguments = dpo.DPOArguments(policy, data, pairs=str(folder / "pairs"), score=False)
        return dpo.main(arguments, IPAConfig(str(output), kl_users=4, **settings))
    arguments = grpo.RLArguments(policy, data, score=False)
    settings |= {"num_generations": 2, "per_device_train_batch_size": 2}
    return grpo.main(arguments, OneRecGRPOConfig(str(output), **settings))


@pytest.mark.parametrize("recipe", ["sft", "reward", "dpo", "grpo"])
def test_a_run_without_a_step_saves_nothing(recipe, folder, tmp_path):
    with pytest.raises(ValueError, match=NO_STEP):
        train(recipe, folder, tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_run_that_is_resumed_at_its_end_is_saved(folder, tmp_path):
    settings = {"num_train_epochs": 1, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    train("sft", folder, tmp_path, **settings)
    (tmp_path / "model.safetensors").unlink()
    train("sft", folder, tmp_path, resume_from_checkpoint="true", **settings)
    assert (tmp_path / "model.safetensors").is_file()


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_exposures_without_a_verdict_are_refused(weight, folder, tmp_path):
    arguments = grpo.RLArguments(
        str(folder / "policy"), str(folder / "data"), exposures=str(folder / "log.parquet"), score=False
    )
    settings = {"logged_weight": weight, "max_steps": 2, "num_generations": 2, "per_device_train_batch_size": 2}
    with pytest.raises(ValueError, match=r"none of \d+ requests has an exposure with a verdict: nobody disliked one"):
        grpo.main(arguments, OneRecGRPOConfig(str(tmp_path), loss_type="gbpo", **QUIET | settings))
    assert not (tmp_path / "model.safetensors").exists()
    arguments.ties = "inclusive"  # as the message says
    assert grpo.main(arguments, OneRecGRPOConfig(str(tmp_path), loss_type="gbpo", **QUIET | settings))["log"]


def test_the_better_half_of_no_exposures_is_refused(folder, tmp_path):
    arguments = grpo.RLArguments(str(folder / "policy"), str(folder / "data"), sft="rsft", score=False)
    with pytest.raises(ValueError, match="sft='rsft' takes the better half of the exposures: give --exposures"):
        grpo.main(arguments, OneRecGRPOConfig(str(tmp_path), sft_weight=1, **QUIET))
