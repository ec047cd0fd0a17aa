"""SFT on two processes (gloo) is SFT on one with the same global batch; a process that dies takes the run with it."""

import os

import pytest
import torch
from transformers import TrainerCallback

from experiments import survival
from onerec_hf.collators import OneRecCollator
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

from ..tiny import tiny_catalogue, tiny_model

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="CUDA cannot be forked: hide the GPU (CUDA_VISIBLE_DEVICES=)"
)
STEPS = 6


class DiesInStepTwo(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2 and os.environ.get("RANK") == "1":
            os._exit(7)


def sft(name, folder, num_processes, **settings):
    """Batches of four rows, however many processes share them; five rows of evaluation, which do not divide: one
    batch of two is filled up with a row that another process has, one with two."""
    model = tiny_model(tiny_catalogue())
    codes = model.catalogue.semantic_ids.long() + torch.tensor(model.config.level_offsets)
    shared = survival.COMMON | {"per_device_train_batch_size": 4 // num_processes, "max_steps": STEPS}
    shared |= {"logging_steps": 1, "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3} | settings
    args = OneRecSFTConfig(str(folder), per_device_eval_batch_size=2, train_sampling_strategy="random", **shared)
    rows = survival.rows_of(16, targets=True)
    return OneRecSFTTrainer(
        model,
        args,
        data_collator=OneRecCollator(codes.numpy()),
        train_dataset=rows.remove_columns("targets"),
        eval_dataset=rows.select(range(5)),
        callbacks=[DiesInStepTwo()] if name == "dies" else [],
    )


def start(name, folder, processes):
    folder.mkdir()
    run = survival.Run(name, folder, processes)
    run.wait()
    return run


def test_two_processes_train_and_evaluate_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr(survival, "make_trainer", sft)
    found = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = start("SFT", folder, processes)
        assert not run.failed, (folder / "output-0.txt").read_text(encoding="utf-8")[-3000:]
        ends = [torch.load(folder / f"end-{rank}.pt") for rank in range(processes)]
        assert survival.differences(ends[0]["weights"], ends[-1]["weights"]) == []
        found[processes] = ends[0]["log"]
    one, two = found[1], found[2]
    for key, count in (("loss", STEPS), ("grad_norm", STEPS), ("eval_loss", 2)):
        expected = [record[key] for record in one if key in record]
        assert len(expected) == count and len(set(expected)) == count
        assert [record[key] for record in two if key in record] == pytest.approx(expected, rel=1e-4), key


def test_a_process_that_dies_ends_the_run_at_once(tmp_path, monkeypatch):
    """The other one waits for its gradients: the broken connection is its error, not a wait without end."""
    monkeypatch.setattr(survival, "make_trainer", sft)
    run = start("dies", tmp_path / "run", 2)
    assert [process.exitcode for process in run.processes] == [1, 7]
    assert not list((tmp_path / "run").glob("end-*.pt"))
