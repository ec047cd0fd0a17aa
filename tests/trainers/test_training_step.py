"""What a training step is: a mean over its targets however they are divided, and nothing that is no number."""

import json
import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from onerec_hf import SemanticIdTokenizer
from onerec_hf.collators import OneRecCollator, SessionCollator
from onerec_hf.trainers import IPAConfig, IPATrainer, OneRecSFTConfig, OneRecSFTTrainer

from ..numeric import assert_close
from ..processes import run_processes
from ..tiny import SIZES, tiny_catalogue, tiny_model

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = [2, 2, 3, 2, 20, 3, 2, 2, 30, 2, 3, 2, 2, 2, 25, 2]  # a few long users, as in every log
ARGUMENTS = {
    "max_steps": 1,
    "learning_rate": 0.1,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0,
    "train_sampling_strategy": "sequential",
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
}


def rows_of(architecture, num_items=65):
    """V2: a user with all targets. OneRec: a session of one to three items."""
    generator = np.random.default_rng(0)
    rows = []
    for user, length in enumerate(LENGTHS):
        row = {"user": user, "history": generator.integers(0, num_items, length).tolist(), "length": length}
        if architecture == "onerec":
            row["targets"] = generator.integers(0, num_items, 1 + user % 3).tolist()
        rows.append(row)
    return datasets.Dataset.from_list(rows)


def trained(folder, architecture, batch, accumulate, kind="sft"):
    """The weights' movement in one step of SGD, and the loss in the log."""
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue, architecture=architecture)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    collator = SessionCollator(tokens, 40) if architecture == "onerec" else OneRecCollator(tokens, 40)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    rows, settings = rows_of(architecture), ARGUMENTS | size | {"output_dir": str(folder)}
    if kind == "sft":
        trainer = OneRecSFTTrainer(model, OneRecSFTConfig(**settings), data_collator=collator, train_dataset=rows)
    else:
        # user 12 has no pair, user 8 a long history; items 0.. are chosen, items 10.. rejected
        chosen, rejected = (tokens[first : first + model.num_session_items].flatten().tolist() for first in (0, 10))
        pairs = [{"row": row, "chosen": chosen, "rejected": rejected} for row in (0, 1, 8)]
        config = IPAConfig(**settings, preference_weight=3.0, kl_users=0)
        given = datasets.Dataset.from_list(pairs)
        trainer = IPATrainer(model, config, data_collator=collator, train_dataset=rows, pairs=given)
    trainer.train()
    logs = next(log for log in trainer.state.log_history if "loss" in log)
    moved = {name: weight.detach() - before[name] for name, weight in model.named_parameters()}
    return moved, {name: logs.get(name) for name in ("loss", "ntp_loss", "preference_loss")}


def check(found, expected):
    scale = max(move.abs().max().item() for move in expected[0].values())
    for name, move in expected[0].items():
        # of 16 short users and a few long ones, means of means were off by a half; weights of 1 round the moves at
        # 1e-7
        assert_close(found[0][name], move, scale=scale + 0.1, msg=name)
    assert found[1] == {name: value and pytest.approx(value, abs=2e-4) for name, value in expected[1].items()}


@pytest.mark.parametrize("kind", ["sft", "ipa"])
@pytest.mark.parametrize("architecture", ["v2", "v2_moe", "onerec"])
def test_accumulated_batches_make_the_step_of_one(architecture, kind, tmp_path):
    whole = trained(tmp_path / "whole", architecture, 16, 1, kind)
    assert whole[1]["loss"] > 1 and max(move.abs().max() for move in whole[0].values()) > 0.01
    for batch, accumulate in ((8, 2), (3, 6)):
        check(trained(tmp_path / f"{batch}", architecture, batch, accumulate, kind), whole)


def one_of_two_processes(rank, folder):
    for kind in ("sft", "ipa"):
        moved, logs = trained(folder / kind, "v2", 4, 2, kind)
        if rank == 0:
            save_file(moved, folder / kind / "moved.safetensors")
            (folder / kind / "logs.json").write_text(json.dumps(logs))


def test_two_processes_make_the_step_of_one(tmp_path):
    run_processes(one_of_two_processes, tmp_path)
    for kind in ("sft", "ipa"):
        found = (
            load_file(tmp_path / kind / "moved.safetensors"),
            json.loads((tmp_path / kind / "logs.json").read_text()),
        )
        check(found, trained(tmp_path / "one", "v2", 16, 1, kind))


def test_transformers_trainer_with_labels_accumulates_the_same(tmp_path):
    """It counts the codes in `labels` and gives the count to the loss, which has to read it."""
    catalogue = tiny_catalogue()
    moves = []
    for batch, accumulate in ((8, 1), (2, 4)):
        model = tiny_model(catalogue)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        ids = torch.nn.functional.pad(
            catalogue.semantic_ids[:8] + torch.tensor(model.config.level_offsets), (1, 0), value=1
        )
        labels = ids.clone()
        labels[:5, 2:] = -100  # the first users have one code, the others three
        context = catalogue.semantic_ids[8:16].unsqueeze(1) + torch.tensor(model.config.level_offsets)
        rows = [{"input_ids": i, "labels": l, "context_ids": c} for i, l, c in zip(ids, labels, context)]
        settings = {name: value for name, value in ARGUMENTS.items() if name != "train_sampling_strategy"}
        size = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulate,
            "remove_unused_columns": False,
        }
        args = TrainingArguments(**settings, **size, output_dir=str(tmp_path), train_sampling_strategy="sequential")
        Trainer(model, args, train_dataset=rows).train()
        moves.append({name: weight.detach() - before[name] for name, weight in model.named_parameters()})
    check((moves[1], {}), (moves[0], {}))
    assert tiny_model(architecture="onerec").accepts_loss_kwargs is False


def test_the_evaluation_loss_is_a_mean_over_targets(tmp_path):
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    collator, rows = OneRecCollator(tokens, 40), rows_of("v2")
    with torch.no_grad():
        expected = model(**collator(list(rows))).loss.item()
    for batch in (16, 5, 1):
        args = OneRecSFTConfig(**ARGUMENTS, output_dir=str(tmp_path), per_device_eval_batch_size=batch)
        trainer = OneRecSFTTrainer(model, args, data_collator=collator, train_dataset=rows, eval_dataset=rows)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["sft", "ipa"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_training_stops_where_numbers_stop(kind, what, tmp_path):
    """A weight of NaN in the middle; or a finite loss whose gradient is none. The checkpoint before it stays, no model
    is saved.
    """
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    settings = ARGUMENTS | {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path)}
    rows, collator = rows_of("v2"), OneRecCollator(tokens, 40)
    if kind == "sft":
        config = OneRecSFTConfig(**settings, per_device_train_batch_size=4)
        trainer = OneRecSFTTrainer(model, config, data_collator=collator, train_dataset=rows)
    else:
        pairs = datasets.Dataset.from_list([{"row": 0, "chosen": tokens[0].tolist(), "rejected": tokens[9].tolist()}])
        config = IPAConfig(**settings, per_device_train_batch_size=4, kl_users=0)
        trainer = IPATrainer(model, config, data_collator=collator, train_dataset=rows, pairs=pairs)
    steps = []

    def broken(module, inputs, output):
        steps.append(1)
        if trainer.state.global_step == 2 and what == "loss":
            return output * math.nan
        if trainer.state.global_step == 2 and output.requires_grad:
            output.register_hook(lambda gradient: gradient * math.inf)
        return output

    model.model.decoder.layers[1].mlp.register_forward_hook(broken)
    wanted = {
        "loss": "the loss is nan in batch 1 of step 3",
        "gradient": "the norm of the gradients is (nan|inf) in step 3",
    }
    with pytest.raises(FloatingPointError, match=f"{wanted[what]}.*no model of it is saved.*learning_rate"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert (
        all(torch.isfinite(weight).all() for weight in model.parameters())
        and not (tmp_path / "model.safetensors").exists()
    )


@pytest.mark.parametrize(
    "name, value",
    [
        ("label_smoothing_factor", 0.1),
        ("use_liger_kernel", True),
        ("include_for_metrics", ["inputs"]),
        ("do_predict", True),
    ],
)
def test_options_that_would_do_nothing_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* would do nothing: .*Leave it out"):
        OneRecSFTConfig(output_dir=str(tmp_path), **{name: value})
    with pytest.raises(ValueError, match=f"{name}=.* would do nothing"):
        IPAConfig(output_dir=str(tmp_path), **{name: value})


@pytest.mark.parametrize(
    "name, value",
    [
        ("packing", True),
        ("max_length", 64),
        ("pad_to_multiple_of", 8),
        ("completion_only_loss", False),
        ("dataset_kwargs", {}),
        ("loss_type", "dft"),
        ("router_aux_loss_coef", 0.01),
    ],
)
def test_fields_of_trl_that_describe_text_are_refused(name, value, tmp_path):
    with pytest.raises(ValueError, match=f"{name}=.* would do nothing: .*Leave it out"):
        OneRecSFTConfig(output_dir=str(tmp_path), **{name: value})


def test_sft_is_a_trainer_of_trl(tmp_path):
    """A model by its folder, a LoRA adapter, a callback, a card beside the checkpoint."""
    catalogue = tiny_catalogue()
    tiny_model(catalogue).save_pretrained(tmp_path / "model")
    SemanticIdTokenizer(codebook_sizes=SIZES, catalogue=catalogue).save_pretrained(tmp_path / "model")
    collator = OneRecCollator(catalogue.semantic_ids.numpy() + np.array(tiny_model().config.level_offsets), 40)
    seen = []

    class Notes(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    settings = ARGUMENTS | {
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    trainer = OneRecSFTTrainer(
        str(tmp_path / "model"),
        OneRecSFTConfig(**settings, per_device_train_batch_size=4),
        data_collator=collator,
        train_dataset=rows_of("v2"),
        peft_config=LoraConfig(r=2),
        callbacks=[Notes()],
    )
    assert isinstance(trainer, SFTTrainer) and isinstance(trainer.args, SFTConfig)
    trainer.train()
    assert [step for logs in seen if (step := logs.get("loss"))] and trainer.policy.catalogue is not None
    base = dict(tiny_model(catalogue).named_parameters())
    adapted = {name: weight for name, weight in trainer.policy.named_parameters() if "lora_" in name}
    assert any("lora_B" in name and weight.abs().max() > 0 for name, weight in adapted.items())
    assert torch.equal(trainer.policy.lm_head.weight, base["lm_head.weight"])
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert "TRL's `SFTTrainer`" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="formatting_func and compute_loss_func would do nothing"):
        OneRecSFTTrainer(trainer.model, trainer.args, data_collator=collator, formatting_func=str)


def test_averaged_weights_are_refused_under_fsdp(tmp_path, monkeypatch):
    args = OneRecSFTConfig(**ARGUMENTS, output_dir=str(tmp_path), weight_average_decay=0.9)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="under FSDP no process has whole weights"):
        OneRecSFTTrainer(tiny_model(), args, data_collator=list, train_dataset=rows_of("v2"))


def test_settings_of_another_preference_loss_are_refused(tmp_path):
    for name, value in (("label_smoothing", 0.3), ("simpo_gamma", 1.0), ("cpo_alpha", 0.5)):
        with pytest.raises(ValueError, match=rf"{name}={value} would do nothing: loss_type='dpo' has none"):
            IPAConfig(output_dir=str(tmp_path), **{name: value})
    assert IPAConfig(output_dir=str(tmp_path), loss_type="cdpo", label_smoothing=0.3).label_smoothing == 0.3
