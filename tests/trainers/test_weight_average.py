"""The moving average of the weights against its recursion, and the swap around evaluation."""

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from onerec_hf import OneRecV2Config
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer


class Quadratic(PreTrainedModel):
    config_class = OneRecV2Config

    def __init__(self):
        super().__init__(OneRecV2Config(codebook_sizes=[4], pad_token_id=0))
        self.weight = nn.Parameter(torch.tensor([4.0]))
        self.fixed = nn.Parameter(torch.tensor([7.0]), requires_grad=False)

    def forward(self, target_ids=None, num_items_in_batch=None):
        return {"loss": (self.weight - target_ids.float()).square().mean()}

    def loss_items(self, real):
        return real.sum()


def make(tmp_path, **kwargs):
    seen = []

    def generation_metrics(model):
        seen.append(model.weight.item())
        return {"weight": model.weight.item()}

    arguments = OneRecSFTConfig(
        tmp_path, report_to="none", train_sampling_strategy="random", disable_tqdm=True, **kwargs
    )
    data = datasets.Dataset.from_dict({"target_ids": [0] * 8})
    sets = {"train_dataset": data, "eval_dataset": data, "data_collator": default_collate}
    trainer = OneRecSFTTrainer(Quadratic(), arguments, **sets, generation_metrics=generation_metrics)
    return trainer, seen


def test_average_follows_its_recursion(tmp_path):
    trainer, _ = make(tmp_path, weight_average_decay=0.25)
    average = None
    for step, value in enumerate([3.0, 1.0, -2.0, 5.0], start=1):
        with torch.no_grad():
            trainer.model.weight.fill_(value)
        trainer.update_average(step)
        keep = [None, 2 / 11, 0.25, 0.25, 0.25][step]  # (1 + t) / (10 + t) is 3/12 in step 2 already
        average = value if average is None else keep * average + (1 - keep) * value
        with trainer._averaged_weights() as raw:
            assert trainer.model.weight.item() == pytest.approx(average)
            assert raw["weight"].item() == value and list(raw) == ["weight"]
        assert trainer.model.weight.item() == value


def test_evaluation_and_the_final_model_hold_the_average(tmp_path):
    settings = {
        "max_steps": 3,
        "learning_rate": 1.0,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
    }
    settings |= {"per_device_train_batch_size": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no"}
    settings["learning_rate"] = 0.25  # w <- w / 2: 2, 1, 0.5
    trainer, seen = make(tmp_path, weight_average_decay=0.9, **settings)
    trainer.train()
    second = 2 * 3 / 12 + 1 * 9 / 12
    third = second * 4 / 13 + 0.5 * 9 / 13
    assert seen == pytest.approx([2.0, second, third])
    assert trainer.model.weight.item() == pytest.approx(third)
    trainer, seen = make(tmp_path, **settings)
    trainer.train()
    assert seen == pytest.approx([2.0, 1.0, 0.5])


def test_a_decay_outside_its_range_is_named(tmp_path):
    with pytest.raises(ValueError, match="weight_average_decay=1"):
        OneRecSFTConfig(tmp_path, weight_average_decay=1.0)
