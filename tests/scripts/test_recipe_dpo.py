"""recipes/dpo.py as a person runs it, with the reward model that recipes/reward.py trained."""

import json
import shutil

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.recommender import ItemRanker, Recommender
from onerec_hf.semantic_ids import load_quantizer
from onerec_hf.trainers.pair_files import save_rows

from .test_recipe_reward import DAY, data, trained  # noqa: F401  fixtures


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "context_embed_dim": 8}
    torch.manual_seed(0)
    model = OneRecV2ForCausalLM(
        OneRecV2Config(codebook_sizes=tokenizer.codebook_sizes, user_features={"activity": 4}, **sizes)
    )
    model.catalogue = tokenizer.catalogue
    folder = tmp_path_factory.mktemp("policy")
    collator = OneRecCollator(
        tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids), user_features={"activity": np.arange(4)}
    )
    Recommender(ItemRanker(model, collator), quantizer=load_quantizer(data / "tokenizer")).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def align(data, policy, folder, *arguments):  # noqa: F811
    from trl import TrlParser

    from onerec_hf.scripts import dpo
    from onerec_hf.trainers import IPAConfig

    settings = {"data": data, "policy": policy, "output_dir": folder, "num_train_epochs": 1, "report_to": "none"}
    settings |= {"per_device_train_batch_size": 64, "max_steps": 6, "save_strategy": "no", "logging_steps": 2}
    settings |= {"dpo_ratio": 0.03, "num_candidates": 16, "kl_users": 8, "num_beams": 20}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    parser = TrlParser((dpo.DPOArguments, IPAConfig))
    return dpo.main(*parser.parse_args_and_config([*argv, *arguments]))


def test_it_mines_with_a_reward_model_and_takes_its_pairs_again(data, trained, policy, hub, tmp_path):  # noqa: F811
    report = align(data, policy, tmp_path / "ipa", "--reward", str(trained[0]))
    mined = [record for record in report["log"] if "ipa/pairs" in record]
    assert len(mined) == 1 and 1 > mined[0]["ipa/reward_chosen"] > mined[0]["ipa/reward_rejected"] + 0.01
    assert report["test"]["invalid_rate"] == 0
    aligned, before = (AutoModel.from_pretrained(folder) for folder in (tmp_path / "ipa", policy))
    assert aligned.catalogue is not None and AutoTokenizer.from_pretrained(tmp_path / "ipa").catalogue is not None
    assert not torch.equal(aligned.lm_head.weight, before.lm_head.weight)
    pairs = str(tmp_path / "ipa" / "pairs" / "iteration_000")
    push = ("--push_to_hub", "true", "--hub_model_id", "org/aligned")
    report = align(data, policy, tmp_path / "dpo", "--pairs", pairs, "--loss_type", "simpo", "--lora_r", "4", *push)
    assert any("preference_loss" in record for record in report["log"])
    adapted = AutoModel.from_pretrained(tmp_path / "dpo").state_dict()  # merged: no adapter is left
    assert adapted.keys() == before.state_dict().keys()
    assert torch.equal(adapted["lm_head.weight"], before.lm_head.weight)
    assert any(not torch.equal(adapted[name], tensor) for name, tensor in before.state_dict().items())
    assert len(hub.repos["org/aligned"].commits) == 1
    pushed = Recommender.from_pretrained("org/aligned", num_beams=20)  # complete
    assert all(torch.equal(pushed.model.state_dict()[name], tensor) for name, tensor in adapted.items())
    assert len(pushed.recommend([[]], k=3)[0]) == 3 and pushed.quantizer is not None
    card = ModelCard(hub.repos["org/aligned"].branches["main"]["README.md"].decode())
    assert card.data.library_name == "transformers" and "Iterative Preference Alignment" in card.text
    assert "| `loss_type` | simpo |" in card.text


@pytest.mark.parametrize("recipe", ["dpo", "grpo"])
def test_rows_on_disk_train_the_same_model(recipe, data, trained, policy, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    make = {"dpo": align, "grpo": reinforce}[recipe]
    own = ("--reward", str(trained[0])) if recipe == "dpo" else ()
    for streaming in ("false", "true"):
        more = ("--streaming", streaming, "--score", "false", "--max_steps", "2", *own)
        make(data, policy, tmp_path / streaming, *more)
    assert list((tmp_path / "cache").rglob("*.arrow"))
    one, two = (AutoModel.from_pretrained(tmp_path / name).state_dict() for name in ("false", "true"))
    assert all(torch.equal(one[name], tensor) for name, tensor in two.items())


def test_data_folders_of_two_logs_are_refused(data, trained, policy, tmp_path):  # noqa: F811
    other = shutil.copytree(data, tmp_path / "other")
    users = datasets.Dataset.from_parquet(str(data / "users.parquet"))
    users.select(range(len(users) - 1, -1, -1)).to_parquet(str(other / "users.parquet"))
    with pytest.raises(ValueError, match="hold other users: prepare both from one log"):
        align(other, policy, tmp_path / "ipa", "--reward", str(trained[0]))


CHANGES = {  # of the same size, so nothing else notices
    "1 items are in the first alone, 1 in the second alone": lambda codes, ids: (codes, np.r_[ids[:-1], 10**6]),
    "the same items in another order": lambda codes, ids: (codes, ids[::-1].copy()),
    "their items are the same and have other semantic IDs": lambda codes, ids: (codes.flip(0), ids),
}


def with_other_items(folder, output, change):
    """A copy of a data folder (its tokenizer) or of a model, whose catalogue means other items."""
    shutil.copytree(folder, output)
    path = output / "tokenizer" if (output / "tokenizer").is_dir() else output
    old = Catalogue.from_pretrained(path)
    codes, ids = CHANGES[change](old.semantic_ids, old.item_ids)
    new = Catalogue(codes, old.codebook_sizes, ids, old.popularity)
    new.save_pretrained(path)
    if (path / "config.json").exists():
        text = (path / "config.json").read_text()
        (path / "config.json").write_text(text.replace(old.fingerprint(), new.fingerprint()))
    return output


def reinforce(data, policy, folder, *arguments):  # noqa: F811
    from trl import TrlParser

    from onerec_hf.scripts import grpo
    from onerec_hf.trainers import OneRecGRPOConfig

    argv = ["--data", str(data), "--policy", str(policy), "--output_dir", str(folder), "--max_steps", "1"]
    argv += ["--num_generations", "8", "--per_device_train_batch_size", "32", "--use_cpu", "true", *arguments]
    return grpo.main(*TrlParser((grpo.RLArguments, OneRecGRPOConfig)).parse_args_and_config(argv))


@pytest.mark.parametrize("change", CHANGES)
def test_a_data_folder_of_other_items_is_refused(change, data, trained, policy, tmp_path):  # noqa: F811
    other = with_other_items(data, tmp_path / "other", change)
    for run in (align, reinforce):
        with pytest.raises(ValueError, match=change) as error:
            run(other, policy, tmp_path / "out")
        assert str(other) in str(error.value) and str(policy) in str(error.value)
        judge = with_other_items(trained[0], tmp_path / f"judge_{run.__name__}", change)
        with pytest.raises(ValueError, match=change) as error:  # a reward model of other items
            arguments = ["--rewards", "model"] if run is reinforce else []
            run(data, policy, tmp_path / "out", "--reward", str(judge), *arguments)
        assert str(data) in str(error.value) and str(judge) in str(error.value)
    with pytest.raises(
        ValueError, match=f"the pairs in {tmp_path / 'pairs'} do not fit this run: catalogue_fingerprint"
    ):
        changed = with_other_items(policy, tmp_path / "changed", change)
        pair = {"row": 0, "chosen": [4, 20, 36], "rejected": [5, 20, 36]}
        metadata = {"catalogue_fingerprint": Catalogue.from_pretrained(changed).fingerprint()}
        save_rows([pair], tmp_path / "pairs", metadata)
        align(data, policy, tmp_path / "out", "--pairs", str(tmp_path / "pairs"))
    assert not (tmp_path / "out").exists()


def test_an_ab_test_of_other_items_or_of_another_world_is_refused(data, policy, tmp_path):  # noqa: F811
    from onerec_hf.scripts import ab_test

    log = str(data.parent / "log.parquet")
    world = json.dumps({"num_users": 120, "num_items": 80, "num_days": 10, "mean_events": 30, "seed": 3})
    other = with_other_items(policy, tmp_path / "other", next(iter(CHANGES)))
    with pytest.raises(
        ValueError, match="do not serve the same items: 1 items are in the first alone, 1 in the second"
    ):
        ab_test.main(str(policy), str(other), log, str(tmp_path / "ab"), world)
    with pytest.raises(ValueError, match=r"no videos of the world of 80, such as 1000000: give in --world"):
        ab_test.main(str(other), str(other), log, str(tmp_path / "ab"), world)
    assert not (tmp_path / "ab").exists()


def test_an_ab_test_of_selection_by_a_reward_model(data, trained, policy, tmp_path):  # noqa: F811
    """One policy on both sides: the reward model is the only difference, and picks what it thinks more of."""
    from onerec_hf.scripts import ab_test

    log = str(data.parent / "log.parquet")
    world = json.dumps({"num_users": 120, "num_items": 80, "num_days": 10, "mean_events": 30, "seed": 3})
    settings = {"world": world, "num_days": 2, "num_beams": 20}
    alone = ab_test.main(str(policy), str(policy), log, str(tmp_path / "alone"), **settings)
    assert all(lift["value"] == 0 for lift in alone["lifts"].values())
    selected = {"reward": str(trained[0]), "num_candidates": 16}
    report = ab_test.main(str(policy), str(policy), log, str(tmp_path / "selected"), **settings, **selected)
    assert report["reward"] == str(trained[0]) and report["totals"]["control"] == alone["totals"]["control"]
    assert report["totals"]["treatment"] != report["totals"]["control"]


def test_reinforcement_learning_with_a_reward_model_and_an_adapter(data, trained, policy, tmp_path):  # noqa: F811
    from trl import TrlParser

    from onerec_hf.scripts import grpo
    from onerec_hf.trainers import OneRecGRPOConfig

    settings = {
        "data": data,
        "policy": policy,
        "output_dir": tmp_path,
        "max_steps": 2,
        "report_to": "none",
        "lora_r": 4,
    }
    settings |= {"num_generations": 8, "per_device_train_batch_size": 32, "save_strategy": "no", "logging_steps": 1}
    settings |= {"num_beams": 20, "learning_rate": 0.01, "use_cpu": "true", "rewards": "model"}
    argv = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    parser = TrlParser((grpo.RLArguments, OneRecGRPOConfig))
    with pytest.raises(ValueError, match="needs a folder in the other"):
        grpo.main(*parser.parse_args_and_config(argv))
    report = grpo.main(*parser.parse_args_and_config([*argv, "--reward", str(trained[0])]))
    assert 0 < report["log"][0]["rewards/reward_model/mean"] < 1 and report["log"][0]["rewards/reward_model/std"] > 0
    learned, before = (AutoModel.from_pretrained(folder).state_dict() for folder in (tmp_path, policy))
    assert learned.keys() == before.keys()  # merged: no adapter is left
    assert any(not torch.equal(learned[name], tensor) for name, tensor in before.items())
