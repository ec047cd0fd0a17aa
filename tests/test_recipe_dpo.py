"""recipes/dpo.py as a person runs it, with the reward model that recipes/reward.py trained."""

import datasets
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, AutoTokenizer

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.recommender import Recommender

from .test_recipe_reward import DAY, data, trained  # noqa: F401  fixtures

# what the fixture `trained` gives reward.py on the command line
REWARD = {
    "targets": ["ctr", "swt"],
    "watch_cap_ms": 60000,
    "item_categories": ["category", "author_id"],
    "item_quantiles": ["duration_ms"],
    "rates": ["item", "user"],
    "context_item_features": ["category"],
    "event_features": {"is_click": ["category", 3]},
    "period": DAY,
    "request_features": {"timestamp": ["hour", 25]},
    "warm_up": 1,
    "user_categories": ["activity"],
    "num_train_epochs": 2,
}


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory):  # noqa: F811
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "context_embed_dim": 8}
    torch.manual_seed(0)
    model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=tokenizer.codebook_sizes, **sizes))
    model.catalogue = tokenizer.catalogue
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
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
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(REWARD))
    judge = ("--reward", str(trained[0]), "--reward_config", str(tmp_path / "reward.yaml"))
    report = align(data, policy, tmp_path / "ipa", *judge)
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


def test_data_folders_of_two_logs_are_refused(data, trained, policy, tmp_path):  # noqa: F811
    (tmp_path / "reward.yaml").write_text(yaml.safe_dump(REWARD))
    datasets.Dataset.from_dict({"user_id": [1, 2]}).to_parquet(str(tmp_path / "users.parquet"))
    judge = ("--reward", str(trained[0]), "--reward_config", str(tmp_path / "reward.yaml"))
    with pytest.raises(ValueError, match="hold other users: prepare both from one log"):
        align(data, policy, tmp_path / "ipa", *judge, "--reward_data", str(tmp_path))
    with pytest.raises(ValueError, match="--reward needs --reward_config"):
        align(data, policy, tmp_path / "ipa", "--reward", str(trained[0]))
