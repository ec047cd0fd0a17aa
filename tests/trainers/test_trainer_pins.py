"""What every trainer did before it moved to another base class: losses of each micro-batch, and how far the weights
went.

`python -m tests.trainers.test_trainer_pins` prints the numbers. A change that is meant to change them says so and
replaces them here.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from onerec_hf.collators import OneRecCollator, PathwayCollator, SessionCollator
from onerec_hf.trainers import (
    IPAConfig,
    IPATrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecSFTConfig,
    OneRecSFTTrainer,
)

from ..numeric import TERMS, assert_close
from ..tiny import tiny_catalogue, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
LENGTHS = [4, 9, 3, 5, 12, 4, 3, 7, 2, 5, 3, 8]
SHARED = {
    "max_steps": 3,
    "learning_rate": 0.02,
    "optim": "sgd",  # Adam would turn the rounding of a gradient that is nearly 0 into a whole step
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1.0,
    "seed": 5,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
}
CASES = {
    "sft onerec": ("onerec", {"gradient_accumulation_steps": 2, "train_sampling_strategy": "random"}),
    "sft v1": ("v1", {"gradient_accumulation_steps": 2}),
    "sft v2": ("v2", {}),
    "sft v2_moe average": ("v2_moe", {"weight_average_decay": 0.9, "gradient_accumulation_steps": 3}),
    "ipa reward": ("v2", {"num_candidates": 12, "dpo_ratio": 1.0, "preference_weight": 2.0, "max_steps": 6}),
    "ipa reward sessions": ("onerec", {"num_candidates": 8, "num_rejected": 2, "loss_type": "sdpo", "dpo_ratio": 0.5}),
    "ipa pairs": ("v2_moe", {"gradient_accumulation_steps": 2, "loss_type": "ipo"}),
    "grpo gbpo": ("v2", {"loss_type": "gbpo", "gradient_accumulation_steps": 2, "steps_per_generation": 4}),
    "grpo ecpo": ("v2_moe", {"loss_type": "ecpo", "steps_per_generation": 2, "max_steps": 4}),
    "grpo logged": ("v2", {"loss_type": "ecpo", "logged_loss_type": "gbpo", "logged_weight": 0.4, "sft_weight": 0.3}),
}


def reward(completion_ids, user, **columns):
    """Different for every completion and every user."""
    return [math.sin(sum((i + 1) * token for i, token in enumerate(ids)) + u) for ids, u in zip(completion_ids, user)]


def rows_of(architecture, num_items):
    generator = np.random.default_rng(3)
    rows = []
    for user, length in enumerate(LENGTHS):
        row = {"user": user, "history": generator.integers(0, num_items, length).tolist(), "length": length}
        row["is_like"] = generator.integers(0, 2, length).tolist()
        row["targets"] = generator.permutation(num_items)[: 1 if architecture == "v1" else 1 + user % 3].tolist()
        rows.append(row)
    keep = ["user", "history", "length", *([] if architecture.startswith("v2") else ["is_like", "targets"])]
    return datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows).select_columns(keep)


def make(name, folder):
    architecture, own = CASES[name]
    catalogue = tiny_catalogue(30, num_collisions=0)
    model = tiny_model(catalogue, architecture=architecture)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    collator = SessionCollator(tokens, 10) if architecture == "onerec" else OneRecCollator(tokens, 10)
    if architecture == "v1":
        lengths = {"short_term_length": 2, "positive_length": 3, "lifelong_length": 4}
        collator = PathwayCollator(tokens, positive={"is_like": 1}, lifelong="history", **lengths)
    with_targets, rows = rows_of(architecture, 30)
    settings = SHARED | {"per_device_train_batch_size": 3} | own
    if name.startswith("sft"):
        config = OneRecSFTConfig(str(folder), **settings)
        return OneRecSFTTrainer(model, config, data_collator=collator, train_dataset=rows)
    if name.startswith("ipa"):
        config = IPAConfig(str(folder), kl_users=2, **settings)
        given = {"reward": reward}
        if name == "ipa pairs":
            pairs = [{"row": row, "chosen": tokens[row], "rejected": tokens[row + 9]} for row in (0, 2, 3, 7, 10)]
            given = {"pairs": datasets.Dataset.from_list(pairs)}
        return IPATrainer(model, config, data_collator=collator, train_dataset=rows, **given)
    settings |= {"num_generations": 4, "per_device_train_batch_size": 8, "sign_norm_steps": 0} | own
    beside = {}
    if name == "grpo logged":
        settings |= {"logged_batch_size": 3, "sft_batch_size": 2}
        signs = {"advantage": [[(-1.0) ** i for i, _ in enumerate(targets)] for targets in with_targets["targets"]]}
        beside["logged_dataset"] = datasets.Dataset.from_dict(with_targets[:] | signs)
        beside["sft_dataset"] = rows
    config = OneRecGRPOConfig(str(folder), **settings)
    return OneRecGRPOTrainer(model, reward, config, with_targets, data_collator=collator, **beside)


def record(name, folder):
    """Losses of the micro-batches, as they go into the gradient; sum and absolute sum of what was added to the
    weights.
    """
    trainer = make(name, folder)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    losses, step = [], trainer.training_step

    def training_step(*args, **kwargs):
        losses.append(step(*args, **kwargs))
        return losses[-1]

    trainer.training_step = training_step
    trainer.train()
    moves = [(weight.detach() - before[name]).double() for name, weight in trainer.model.named_parameters()]
    moved = [sum(move.sum().item() for move in moves), sum(move.abs().sum().item() for move in moves)]
    return {"losses": [loss.item() for loss in losses], "moved": moved}


EXPECTED: dict[str, dict[str, list[float]]] = {
    "sft onerec": {
        "losses": [7.596375, 5.524561, 11.1748, 13.33299, 11.01258, 3.700991],
        "moved": [-0.06043742, 4.308994],
    },
    "sft v1": {
        "losses": [6.756459, 5.019617, 5.28475, 5.870443, 7.579361, 4.774925],
        "moved": [-0.09399635, 4.910917],
    },
    "sft v2": {
        "losses": [3.110483, 2.387412, 3.388881],
        "moved": [0.01404721, 3.027069],
    },
    "sft v2_moe average": {
        "losses": [1.951611, 0.9181028, 0.4139086, 3.212029, 1.801746, 0.9306253, 0.4906657],
        "moved": [-0.07295169, 3.367803],
    },
    "ipa reward": {
        "losses": [4.45647, 3.76124, 4.784703, 4.292065, 4.908423, 4.014233],
        "moved": [0.01478671, 4.330079],
    },
    "ipa reward sessions": {
        "losses": [15.92516, 11.12889, 23.09576],
        "moved": [-0.04922757, 3.891131],
    },
    "ipa pairs": {
        "losses": [6.282988, 9.352807, 1.631076, 10.13078, 5.498619, 9.057217],
        "moved": [0.006677666, 3.054149],
    },
    "grpo gbpo": {
        "losses": [-0.1718964, -0.176586, -0.1075385, -0.1510161, -0.1342401, -0.1572234],
        "moved": [0.01387259, 2.773764],
    },
    "grpo ecpo": {
        "losses": [-1.490116e-08, 0.006166711, -1.490116e-08, 0.003643639],
        "moved": [-0.005943471, 2.62408],
    },
    "grpo logged": {
        "losses": [0.6929228, 0.5898628, 0.6925896],
        "moved": [-0.01043117, 2.462338],
    },
}


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_the_same(name, tmp_path):
    found, expected = record(name, tmp_path), EXPECTED[name]
    terms = 4 * len(found["losses"]) * TERMS  # forward, backward and update of every step build on the one before
    scale = 1.0 if name == "grpo ecpo" else None  # advantages of about 1 cancel in its losses, to a thousandth
    assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), terms, scale)
    # a move is the difference of weights of about 1, a thousand times as large
    assert_close(torch.tensor(found["moved"]), torch.tensor(expected["moved"]), 30 * terms)
    own = [loss for loss in expected["losses"] if abs(loss) > 1e-6]  # ECPO's are 0 where the policy has not moved yet
    assert expected["moved"][1] > 1 and len(set(own)) == len(own) >= 2


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as place:
            numbers = record(each, Path(place))
        print(f"{each}: {json.dumps(numbers)}", file=sys.stderr)
