"""Several processes (gloo) train and evaluate as one with the same global batch; one that dies ends the run."""

import json
import os
import re
import shutil

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments, trainer_pt_utils

from experiments import survival
from onerec_hf import OneRecPScoreConfig, OneRecPScoreModel
from onerec_hf.collators import OneRecCollator, RewardCollator
from onerec_hf.trainers import (
    IPAConfig,
    IPATrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecSFTConfig,
    OneRecSFTTrainer,
)
from onerec_hf.trainers.reward import RewardTrainer

from ..tiny import SIZES, tiny_catalogue, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CUDA cannot be forked: hide the GPU (CUDA_VISIBLE_DEVICES=)"
)
STEPS, GROUP = 4, 4  # of 16 rows: an epoch
ORDERS = {"SFT by length": "group_by_length"} | dict.fromkeys(
    ("SFT rebalanced", "reward rebalanced", "IPA rebalanced"), "batch_rebalance"
)
TOKENS = tiny_catalogue().semantic_ids.long() + torch.tensor([4, 12, 20])


class DiesInStepTwo(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ.get("RANK") == "1":
            os._exit(7)


def token_reward(completion_ids, **columns):
    return [float(sum(ids) % 7) for ids in completion_ids]


def exposures(count):
    """Users who saw one to three items; most do not say whether they like them, so labels are unequally many."""
    rows = list(survival.rows_of(count, targets=False))
    for user, row in enumerate(rows):
        seen = 1 + user % 3
        likes = [float((user + i) % 2) if user % 4 else float("nan") for i in range(seen)]
        row |= {"targets": list(range(user, user + seen)), "target_is_like": likes, "session_start": 1.0}
        row |= {"timestamp": [0.0] * len(row["history"])}
    return datasets.Dataset.from_list(rows).with_format("numpy")


def reward_trainer(arguments, folder):
    collator = RewardCollator(TOKENS.numpy(), max_history=8, targets=["is_like"], session_wise=False)
    torch.manual_seed(0)
    model = OneRecPScoreModel(
        OneRecPScoreConfig(
            codebook_sizes=SIZES, hidden_size=16, context_embed_dim=8, targets=["is_like"], initializer_range=0.3
        )
    )
    args = TrainingArguments(str(folder), remove_unused_columns=False, label_names=["labels"], **arguments)
    return RewardTrainer(model, args, collator, exposures(16), exposures(5))


def make_trainer(name, folder, num_processes, **settings):
    """Steps of four rows, however many processes share them and in how many micro-batches; five rows of evaluation,
    which do not divide: one batch of two is filled up with a row that another process has, one with two."""
    arguments = survival.COMMON | {"logging_steps": 1, "save_strategy": "no"}
    arguments |= {"train_sampling_strategy": ORDERS[name]} if name in ORDERS else {}
    name = name.split()[0]
    arguments |= {"max_steps": 2 * STEPS if name == "IPA" else STEPS}
    arguments |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    arguments |= {"optim": "sgd", "learning_rate": 0.3}  # Adam makes steps of the rounding of gradients that are 0
    arguments |= {"per_device_train_batch_size": 4 if num_processes == 1 else 1} | settings
    arguments |= {"gradient_accumulation_steps": 2 if num_processes == 2 else 1}
    if name == "reward":
        return reward_trainer(arguments, folder)
    model = tiny_model(tiny_catalogue(), architecture="v2_moe" if name == "IPA" else "v2")
    rows = survival.rows_of(16, targets=True)
    given = {"data_collator": OneRecCollator(TOKENS.numpy()), "eval_dataset": rows.select(range(5))}
    if name == "GRPO":
        arguments["per_device_train_batch_size"] = 4 * GROUP // num_processes
        arguments |= {"per_device_eval_batch_size": GROUP, "gradient_accumulation_steps": 1}
        args = OneRecGRPOConfig(
            str(folder), num_generations=GROUP, logged_weight=0.5, logged_batch_size=4 // num_processes,
            sft_weight=0.5, sft_batch_size=4 // num_processes, **arguments,
        )  # fmt: skip
        logged = rows.select(range(8)).add_column("advantage", [[1.0, -1.0], [0.0, 2.0]] * 4)
        return OneRecGRPOTrainer(
            model, token_reward, args, rows, logged_dataset=logged, sft_dataset=rows.remove_columns("targets"), **given
        )
    given["train_dataset"] = rows.remove_columns("targets")
    if name == "IPA":
        # few pairs, so that in some steps one process has a pair and the other has none
        args = IPAConfig(str(folder), dpo_ratio=0.25, num_candidates=8, mining_batch_size=3, kl_users=5, **arguments)
        return IPATrainer(model, args, reward=token_reward, **given)
    args = OneRecSFTConfig(str(folder), **{"train_sampling_strategy": "random"} | arguments)
    return OneRecSFTTrainer(model, args, callbacks=[DiesInStepTwo()] if name == "dies" else [], **given)


def start(name, folder, processes, **settings):
    folder.mkdir(exist_ok=True)
    run = survival.Run(name, folder, processes, **settings)
    run.wait()
    assert not run.failed, (folder / "output-0.txt").read_text(encoding="utf-8")[-3000:]
    return run


def check_logs(found, expected):
    """Every number that is logged, to 1e-4."""
    assert len(found) == len(expected)
    for one, other in zip(expected, found):
        for name in one.keys() | other.keys():
            # means over micro-batches; signs of margins that start at 0; times
            unlike = "^grad_norm/|rewards/accuracies|runtime|per_second|seconds|step_time"
            if not re.search(unlike, name):
                assert other[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (name, one, other)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["SFT", *ORDERS, "reward", "IPA", "GRPO"])
def test_several_processes_train_and_evaluate_as_one(name, count, tmp_path, monkeypatch):
    if ORDERS.get(name) == "batch_rebalance" and not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        pytest.skip("this transformers does not know it")
    monkeypatch.setattr(survival, "make_trainer", make_trainer)
    ends = {}
    for processes in (1, count):
        start(name, tmp_path / str(processes), processes)
        ends[processes] = [torch.load(tmp_path / str(processes) / f"end-{rank}.pt") for rank in range(processes)]
    (one,), two = ends.values()
    assert all(survival.differences(two[0]["weights"], other["weights"]) == [] for other in two)
    check_logs(two[0]["log"], one["log"])
    losses = [record["loss"] for record in one["log"] if "loss" in record]
    assert len(set(losses)) == len(losses) >= STEPS and any("eval_loss" in record for record in one["log"])
    before = make_trainer(name, tmp_path / "start", 1).model.state_dict()
    assert max((one["weights"][key] - weight).abs().max() for key, weight in before.items()) > 1e-2
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two[0]["weights"][key], weight, rtol=1e-4, atol=1e-5, msg=key)
    if name == "IPA":
        for iteration in ("iteration_000", "iteration_001"):
            pairs = [datasets.load_from_disk(str(tmp_path / str(n) / "pairs" / iteration)) for n in (1, count)]
            assert len(pairs[0]) == len(set(pairs[0]["row"])) == 4
            for column in ("row", "chosen", "rejected", "chosen_reward", "rejected_reward"):
                assert pairs[0][column][:] == pairs[1][column][:], column


def sharded(name, folder, rank, num_processes, port, settings):
    """A process of a run under FSDP2. accelerate shards on accelerators alone, so it is told that this is one."""
    if num_processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
        os.environ |= {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
        make = PartialState.__init__

        def init(self, *args, **kwargs):
            make(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_GPU

        PartialState.__init__ = init
    os.environ["ACCELERATE_USE_CPU"] = "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    checkpoint = settings.pop("resume_from_checkpoint", None)
    trainer = make_trainer(name, folder, num_processes, **settings)
    assert trainer.is_fsdp_enabled == (num_processes > 1)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "model"))
    if rank == 0:
        (folder / "log.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ["SFT", "reward", "GRPO"])
def test_fsdp2_trains_and_evaluates_as_one_process(name, count, tmp_path, monkeypatch):
    """IPA is refused (`test_ipa.py`). What is saved are whole weights."""
    monkeypatch.setattr(survival, "train", sharded)
    logs = []
    for processes in (1, count):
        start(name, tmp_path / str(processes), processes)
        logs.append(json.loads((tmp_path / str(processes) / "log.json").read_text(encoding="utf-8")))
    check_logs(*logs)
    one, two = (load_file(tmp_path / str(n) / "model" / "model.safetensors") for n in (1, count))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("name", ["SFT", "reward", "GRPO"])
def test_fsdp2_goes_on_from_a_checkpoint(name, tmp_path, monkeypatch):
    """With Adam, whose moments are sharded as the weights are, and resumed in a folder of its own."""
    monkeypatch.setattr(survival, "train", sharded)
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    start(name, tmp_path / "whole", 2, **settings)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    start(name, tmp_path / "resumed", 2, resume_from_checkpoint=True, **settings)
    whole, resumed = (tmp_path / run / "model" / "model.safetensors" for run in ("whole", "resumed"))
    assert survival.differences(load_file(whole), load_file(resumed)) == []
    logs = [json.loads((tmp_path / run / "log.json").read_text(encoding="utf-8")) for run in ("whole", "resumed")]
    check_logs(logs[1][:-1], logs[0][:-1])  # the last says the mean loss and time of the steps since the start


def test_a_process_that_dies_ends_the_run_at_once(tmp_path, monkeypatch):
    """The other one waits for its gradients: the broken connection is its error, not a wait without end."""
    monkeypatch.setattr(survival, "make_trainer", make_trainer)
    folder = tmp_path / "run"
    folder.mkdir()
    run = survival.Run("dies", folder, 2)
    run.wait()
    assert [process.exitcode for process in run.processes] == [1, 7]
    assert not list(folder.glob("end-*.pt"))
