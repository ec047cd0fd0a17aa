"""recipes/dpo.py as a person runs it, with the reward model that recipes/reward.py trained."""

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.data import OneRecCollator
from onerec_hf.recommender import ItemRanker, Recommender
from onerec_hf.semantic_ids import load_quantizer

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
    import dpo
    from trl import TrlParser

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


def test_data_folders_of_two_logs_are_refused(data, trained, policy, tmp_path):  # noqa: F811
    datasets.Dataset.from_dict({"user_id": [1, 2]}).to_parquet(str(tmp_path / "users.parquet"))
    with pytest.raises(ValueError, match="hold other users: prepare both from one log"):
        align(data, policy, tmp_path / "ipa", "--reward", str(trained[0]), "--reward_data", str(tmp_path))


def test_reinforcement_learning_with_a_reward_model_and_an_adapter(data, trained, policy, tmp_path):  # noqa: F811
    import grpo
    from trl import TrlParser

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
