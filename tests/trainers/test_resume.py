"""Runs that were killed go on as the unbroken one; checkpoints that are cut off, or of another run, are skipped or
refused.
"""

import json
import shutil

import pytest
import torch
from peft import LoraConfig
from tqdm.auto import tqdm as tqdm_auto
from tqdm.std import TqdmDefaultWriteLock, tqdm
from transformers import EarlyStoppingCallback, TrainerState, trainer_pt_utils
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from experiments import survival
from experiments.survival import TRAINERS, Run, differences, make_trainer, survive
from onerec_hf import Catalogue, OneRecV2Config
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer
from onerec_hf.trainers.resume import checkpoints_of, why_incomplete

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="CUDA cannot be forked: hide the GPU (CUDA_VISIBLE_DEVICES=)"
    ),
]
KEPT = {"save_total_limit": None}


def train(name, folder, resume=None, change=None, **settings):
    """One of the benchmark's trainers, in this process; `change` may edit it before it trains."""
    torch.manual_seed(0)
    trainer = make_trainer(name, folder, 1, **settings)
    if change is not None:
        change(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of SFT that stopped after 6 steps, with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    train("SFT", folder, max_steps=6)
    return folder


@pytest.fixture
def stopped(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logging.get_logger("onerec_hf.trainers.resume"), "warning", found.append)
    return found


# ---- the same numbers


def forked(name, folder, processes, **settings):
    folder.mkdir(exist_ok=True)
    run = Run(name, folder, processes, **settings)
    run.wait()
    assert not run.failed, (folder / "output-0.txt").read_text()[-3000:]
    return [torch.load(folder / f"end-{rank}.pt") for rank in range(processes)]


def test_a_run_takes_no_lock_of_its_parents_progress_bars(tmp_path, monkeypatch):
    """A killed run, or tqdm's monitor at the moment of a fork, keeps it for ever, and the first bar of the next run
    would wait.
    """
    kept = TqdmDefaultWriteLock()
    for kind in (tqdm, tqdm_auto):  # the second, which transformers draws with, can have one of its own
        monkeypatch.setattr(kind, "_lock", kept, raising=False)
    with kept:
        assert len(forked("SFT", tmp_path / "run", 1, **KEPT)) == 1


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", TRAINERS)
def test_resumed_equals_unbroken(name, processes, tmp_path):
    """From inside the second epoch, between two logs (9 of GRPO: with rollouts left); from the start of one; from the
    last step.
    """
    expected = forked(name, tmp_path / "unbroken", processes, **KEPT)
    last = len(expected[0]["log"])
    assert last > 4 and any("expert_load_max" in record for record in expected[0]["log"])
    for step in [9, 12, 23 if name == "GRPO" else 24]:
        broken = shutil.copytree(tmp_path / "unbroken", tmp_path / f"from-{step}")
        for checkpoint in checkpoints_of(broken):
            if int(checkpoint.name.partition("-")[2]) > step:
                shutil.rmtree(checkpoint)
        assert differences(expected, forked(name, broken, processes, **KEPT)) == [], step


@pytest.mark.parametrize("strategy", ["random", "batch_rebalance"])
def test_every_order_of_the_rows_is_resumed(strategy, tmp_path):
    if strategy == "batch_rebalance" and not hasattr(trainer_pt_utils, "BatchRebalanceSampler"):
        pytest.skip("this transformers does not know it")
    settings = KEPT | {"train_sampling_strategy": strategy, "max_steps": 10}
    expected = forked("SFT", tmp_path, 2, **settings)
    shutil.rmtree(tmp_path / "checkpoint-10")
    assert differences(expected, forked("SFT", tmp_path, 2, **settings)) == []


@pytest.mark.parametrize("name", ["SFT", "IPA"])
@pytest.mark.parametrize("step", [9, 12])
def test_patience_survives(name, step, tmp_path):
    """It has run out at step 12; a run that resumes before that stops there too, and one that resumes after it at
    once.
    """

    def run(folder, resume=None):
        def change(trainer):
            trainer.eval_dataset = trainer.train_dataset
            trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=4))
            # every evaluation is worse than the first one
            trainer.generation_metrics = lambda model: {"worse": float(trainer.state.global_step)}

            trainer.args.eval_strategy, trainer.args.eval_steps = IntervalStrategy.STEPS, 3

        settings = KEPT | {"metric_for_best_model": "worse"}
        return train(name, folder, resume, change, **settings, greater_is_better=False).state

    unbroken = run(tmp_path / "one")
    assert unbroken.global_step == 15 and unbroken.best_metric == 3
    for checkpoint in checkpoints_of(tmp_path / "one"):
        if int(checkpoint.name.partition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    assert run(tmp_path / "one", "true").global_step == 15
    assert run(tmp_path / "one", "true").global_step == 15  # killed after the last evaluation


@pytest.mark.parametrize(("name", "processes"), [("SFT, averaged weights", 1), ("IPA", 1), ("SFT", 2)])
def test_killed_runs_survive(name, processes, tmp_path):
    found = survive(name, processes, 2, tmp_path)
    assert found["kills"] == 2 and found["different"] == 0


def test_the_comparison_sees_what_differs():
    one = {"weights": {"a": torch.zeros(2)}, "log": [{"loss": 1.0, "nan": float("nan")}]}
    assert differences(one, {"weights": {"a": torch.zeros(2)}, "log": [{"loss": 1.0, "nan": float("nan")}]}) == []
    assert differences(one, {"weights": {"a": torch.tensor([0, 1e-30])}, "log": one["log"]}) == ["/weights/a"]
    assert differences(one, one | {"log": [{"loss": 1.0 + 1e-15, "nan": float("nan")}]}) == ["/log/0/loss"]
    assert differences(one, one | {"log": []}) == ["/log"]


def test_the_last_step_is_not_trained_twice(tmp_path):
    """Step 4 of 6 of an epoch: transformers would train a fifth."""
    expected = train("SFT", tmp_path, max_steps=4).model.state_dict()
    trainer = train("SFT", tmp_path, "true", max_steps=4)
    assert trainer.state.global_step == 4 and differences(expected, trainer.model.state_dict()) == []


# ---- which checkpoint


@pytest.mark.parametrize("resume", ["true", "True", "latest", True])
def test_true_is_the_newest_checkpoint(resume, stopped, warnings):
    trainer = train("SFT", stopped, resume, max_steps=7)
    assert trainer.resumed_from == stopped / "checkpoint-6" and trainer.state.global_step == 7
    assert [text for text in warnings if "goes on" in text or "skipped" in text] == [
        f"Training goes on from {stopped / 'checkpoint-6'}."
    ]


@pytest.mark.parametrize("resume", ["false", "False", "none", "", None, False])
def test_false_is_a_new_run(resume, tmp_path):
    assert train("SFT", tmp_path, resume, max_steps=1).resumed_from is None


def cut(path):
    path.write_bytes(path.read_bytes()[:-2])


DAMAGES = {
    "trainer_state.json is missing": lambda folder: (folder / "trainer_state.json").unlink(),
    "trainer_state.json is cut off": lambda folder: cut(folder / "trainer_state.json"),
    "optimizer.pt is missing": lambda folder: (folder / "optimizer.pt").unlink(),
    "scheduler.pt is missing": lambda folder: (folder / "scheduler.pt").unlink(),
    "rng_state.pth is missing": lambda folder: (folder / "rng_state.pth").unlink(),
    "progress-0.json is missing": lambda folder: (folder / "progress-0.json").unlink(),
    "model.safetensors has": lambda folder: cut(folder / "model.safetensors"),
    "resume.json is cut off": lambda folder: (folder / "resume.json").write_text('{"files": {'),
    "resume.json is missing": lambda folder: (folder / "resume.json").unlink(),
}


@pytest.mark.parametrize("why", DAMAGES)
def test_what_is_cut_off_is_skipped_or_refused(why, stopped, warnings):
    DAMAGES[why](stopped / "checkpoint-6")
    with pytest.raises(ValueError, match=rf"checkpoint-6' is no complete checkpoint: {why}"):
        train("SFT", stopped, str(stopped / "checkpoint-6"), max_steps=6)
    assert train("SFT", stopped, "true", max_steps=6).resumed_from == stopped / "checkpoint-3"
    assert warnings[0].startswith(f"{stopped / 'checkpoint-6'} is skipped: {why}")
    assert warnings[1] == f"Training goes on from {stopped / 'checkpoint-3'}."
    assert why_incomplete(stopped / "checkpoint-6") is None  # written again


def test_nothing_to_resume_from(stopped, tmp_path):
    with pytest.raises(ValueError, match=r"holds no complete checkpoint\. Leave resume_from_checkpoint out"):
        train("SFT", tmp_path / "empty", "true")
    with pytest.raises(ValueError, match="true2' is no complete checkpoint: there is no such folder"):
        train("SFT", tmp_path / "empty", "true2")
    for checkpoint in checkpoints_of(stopped):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"\(checkpoint-6: optimizer\.pt is missing; checkpoint-3: optimizer"):
        train("SFT", stopped, "true")


# ---- of the same run


@pytest.mark.parametrize("name", ["SFT", "IPA", "GRPO"])
def test_other_semantic_ids_are_refused(name, tmp_path):
    """Of the same sizes: every tensor fits."""
    known = []

    def swap(trainer):
        old = trainer.model.catalogue
        known.append(old.fingerprint())
        trainer.model.catalogue = Catalogue(old.semantic_ids.flip(0), old.codebook_sizes)
        known.append(trainer.model.catalogue.fingerprint())

    train(name, tmp_path, max_steps=3)
    with pytest.raises(ValueError, match="belongs to another run: fingerprint of the semantic IDs") as error:
        train(name, tmp_path, "true", swap)
    assert known[-2] != known[-1] and f"{known[-2]!r} there, {known[-1]!r} here" in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("number of processes", 2, "number of processes 2 there, 1 here"),
        ("number of training rows", 5, "number of training rows 5 there, 12 here"),
        ("weight_average_decay", 0.9, "weight_average_decay 0.9 there, None here"),
    ],
)
def test_other_settings_are_refused(setting, value, message, stopped):
    path = stopped / "checkpoint-6" / "resume.json"
    manifest = json.loads(path.read_text())
    manifest["settings"][setting] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=message):
        train("SFT", stopped, "true")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("learning_rate", 1e-5, "learning_rate 0.01 there, 1e-05 here"),
        ("weight_decay", 0.5, "weight_decay 0.0 there, 0.5 here"),
        ("adam_beta2", 0.9, "adam_beta2 0.999 there, 0.9 here"),
        ("optim", "sgd", "optim 'adamw_torch[a-z_]*' there, 'sgd' here"),
    ],
)
def test_what_the_saved_optimizer_would_overrule_is_refused(setting, value, message, stopped):
    with pytest.raises(ValueError, match=rf"checkpoint-6 belongs to another run: {message}\. Resume with what that"):
        train("SFT", stopped, "true", max_steps=7, **{setting: value})


@pytest.mark.parametrize("name", ["SFT", "IPA", "GRPO"])
def test_another_model_is_refused_in_words(name, tmp_path, monkeypatch):
    """Of another size, for which torch has a traceback, or with the same shapes and other heads."""
    train(name, tmp_path, max_steps=3)
    for own, message in (
        ({"hidden_size": 32}, "hidden_size 16 there, 32 here"),
        ({"num_attention_heads": 4, "head_dim": 4, "num_key_value_heads": 4}, "num_attention_heads 2 there, 4 here"),
    ):
        with monkeypatch.context() as other:
            other.setattr(survival, "OneRecV2Config", lambda own=own, **given: OneRecV2Config(**(given | own)))
            with pytest.raises(ValueError, match=message):
                train(name, tmp_path, "true", max_steps=4)


def test_adapters_are_compared(tmp_path):
    def tuned(rank, resume=None):
        torch.manual_seed(0)
        model, collator = survival.world()
        args = OneRecSFTConfig(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
        settings = {"peft_config": LoraConfig(r=rank, target_modules=["q_proj"])} if rank else {}
        trainer = OneRecSFTTrainer(model, args, collator, survival.rows_of(4), **settings)
        trainer.train(resume_from_checkpoint=resume)

    tuned(4)
    with pytest.raises(ValueError, match=r"adapter \{'r': 4, .*\} there, \{'r': 8, .*\} here"):
        tuned(8, "true")
    with pytest.raises(ValueError, match=r"adapter \{'r': 4, .*\} there, None here"):
        tuned(None, "true")
    tuned(4, "true")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("SFT", {"seed": 1}, "seed 42 there, 1 here"),
        ("SFT", {"per_device_train_batch_size": 3}, "per_device_train_batch_size 2 there, 3 here"),
        ("SFT", {"lr_scheduler_type": "constant"}, "lr_scheduler_type 'linear' there, 'constant' here"),
        ("IPA", {"beta": 0.9}, "beta 0.1 there, 0.9 here"),
    ],
)
def test_other_arguments_that_change_the_course_are_said(name, settings, message, tmp_path, warnings):
    train(name, tmp_path, max_steps=3)
    train(name, tmp_path, "true", max_steps=4, **settings)
    (said,) = [text for text in warnings if "had other arguments" in text]
    assert message in said and "ends as neither" in said


def test_the_default_optimizer_of_another_version_of_torch_is_said(stopped, warnings):
    assert train("SFT", stopped, "true", max_steps=7, optim="adamw_torch").state.global_step == 7
    said = [text for text in warnings if "optim='adamw_torch_fused', this one has 'adamw_torch'" in text]
    assert len(said) == 1 and not [text for text in warnings if "other arguments" in text]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"dropout": 0.25}, " there, 0.25 here"),
        ({"context_dropout": 0.25}, " there, 0.25 here"),
        ({"loss_reduction": "sum"}, "loss_reduction 'mean' there, 'sum' here"),
        ({"initializer_range": 0.25, "item_loss_weight": 0.5}, "initializer_range 0.02 there, 0.25 here"),
        ({"router_bias_update_rate": 0.25}, "router_bias_update_rate 0.001 there, 0.25 here"),
    ],
)
def test_how_a_model_is_trained_may_change(own, message, stopped, warnings, monkeypatch):
    monkeypatch.setattr(survival, "OneRecV2Config", lambda **given: OneRecV2Config(**(given | own)))
    assert train("SFT", stopped, "true", max_steps=7).state.global_step == 7
    (said,) = [text for text in warnings if "had other arguments" in text]
    assert all(name in said for name in own) and message in said


def test_other_collators_are_said(stopped, warnings):
    def shorter(trainer):
        trainer.data_collator.settings["max_history"] = 7

    train("SFT", stopped, "true", shorter, max_steps=7)
    assert any("max_history 50 there, 7 here" in text for text in warnings)


def test_what_a_run_writes_and_how_long_it_goes_on_is_no_other_run(stopped, warnings):
    train("SFT", stopped, "true", max_steps=7, logging_steps=1, save_steps=7, eval_delay=2, dataloader_num_workers=0)
    assert not [text for text in warnings if "other arguments" in text]


def test_checkpoints_of_earlier_versions_are_taken(stopped):
    for checkpoint in checkpoints_of(stopped):
        manifest = json.loads((checkpoint / "resume.json").read_text())
        assert "hub_token" not in manifest["course"]
        kept = {name: manifest[name] for name in ("settings", "files")}
        (checkpoint / "resume.json").write_text(json.dumps(kept))
    assert train("SFT", stopped, "true", max_steps=7).state.global_step == 7


def test_a_new_run_does_not_mix_with_another(stopped):
    with pytest.raises(ValueError, match=r"holds checkpoint-6 of an earlier run, .*resume_from_checkpoint=true"):
        train("SFT", stopped, max_steps=3)
    for checkpoint in checkpoints_of(stopped):
        (checkpoint / "trainer_state.json").unlink()  # a run that was killed in its first write may start anew
    train("SFT", stopped, max_steps=3)
    assert why_incomplete(stopped / "checkpoint-3") is None


def test_going_back_sets_newer_checkpoints_aside(stopped, warnings):
    train("SFT", stopped, str(stopped / "checkpoint-3"), max_steps=4)
    assert [path.name for path in checkpoints_of(stopped)] == ["checkpoint-3", "checkpoint-4"]
    assert why_incomplete(stopped / "unused-checkpoint-6") is None
    assert "checkpoint-6 is newer than the checkpoint that training goes on from" in warnings[1]
    other = shutil.copytree(stopped / "checkpoint-3", stopped.parent / "other" / "checkpoint-3")
    shutil.rmtree(stopped / "unused-checkpoint-6")
    train("SFT", stopped, str(other), max_steps=4)
    assert (stopped / "checkpoint-4").is_dir()


def test_ipa_takes_its_pairs_to_another_folder(tmp_path):
    expected = train("IPA", tmp_path / "one", max_steps=10, **KEPT).model.state_dict()
    again = train("IPA", tmp_path / "two", str(tmp_path / "one" / "checkpoint-9"), max_steps=10)
    assert differences(expected, again.model.state_dict()) == []
    pairs = tmp_path / "two" / "pairs"
    assert sorted(path.name for path in pairs.iterdir()) == ["iteration_001", "seed_samples"]
    shutil.rmtree(tmp_path / "one")
    assert train("IPA", tmp_path / "two", "true", max_steps=11).state.global_step == 11


@pytest.mark.parametrize("name", ["SFT", "GRPO"])
def test_older_checkpoints_go_when_the_new_one_is_complete(name, tmp_path, monkeypatch):
    write, seen = TrainerState.save_to_json, []

    def killed(state, path):
        seen.append([why_incomplete(checkpoint) for checkpoint in checkpoints_of(tmp_path)])
        if state.global_step == 6:
            raise KeyboardInterrupt
        write(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", killed)
    with pytest.raises(KeyboardInterrupt):
        train(name, tmp_path, save_total_limit=1)
    assert seen == [["trainer_state.json is missing"], [None, "trainer_state.json is missing"]]
    monkeypatch.setattr(TrainerState, "save_to_json", write)
    assert train(name, tmp_path, "true", max_steps=6, save_total_limit=1).resumed_from == tmp_path / "checkpoint-3"
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-6"]
