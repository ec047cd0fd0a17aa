"""Runs that stop: killed ones go on from their checkpoint as if unbroken, and one whose numbers are no numbers saves
nothing of it.

A checkpoint is complete or skipped, of the same run or refused.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_pt_utils import LengthGroupedSampler, get_model_param_count
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from .same_run import differences, run_settings, same_optimizer

logger = logging.get_logger(__name__)

MANIFEST_NAME = "resume.json"
STATE_NAME = "trainer_state.json"  # transformers writes it last
_WORDS = {"true": True, "latest": True, "false": None, "none": None, "": None}  # what a command line can say


def checkpoints_of(folder: str | Path) -> list[Path]:
    """The folders `checkpoint-<step>` of an output folder, by step, complete or not."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    found = [path for path in found if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    return sorted(found, key=_step)


def why_incomplete(checkpoint: str | Path) -> str | None:
    """What a checkpoint of [`ResumableTrainer`] lacks, in words; None where it is complete."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "there is no such folder"
    if not (checkpoint / MANIFEST_NAME).is_file():
        stopped = "the run stopped while it was written"
        written = "another trainer or save_only_model=True" if (checkpoint / STATE_NAME).is_file() else stopped
        return f"{MANIFEST_NAME} is missing ({written})"
    try:
        files = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]
    except ValueError:
        return f"{MANIFEST_NAME} is cut off"
    for name, size in files.items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if (found := (checkpoint / name).stat().st_size) != size:
            return f"{name} has {found} bytes instead of {size}"
    try:
        json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_NAME} is missing"
    except ValueError:
        return f"{STATE_NAME} is cut off"
    return None


class ResumableTrainer(Trainer):
    r"""
    `Trainer` whose killed runs go on bit for bit, on the same machine with the same settings. To be named before a
    trainer of TRL among the bases.

    A checkpoint counts as complete when all its files have the sizes that `resume.json` lists and
    `trainer_state.json`, which is written last, can be read. Older checkpoints are deleted (`save_total_limit`) only
    after that. The order of the rows is a function of the seed and the epoch, whatever `train_sampling_strategy` says.

    A subclass adds to the checkpoint by overriding `_resume_settings` (must be equal in both runs), `_progress` (of
    each process) and `_restore_progress`.
    """

    resumed_from: Path | None = None
    _order: Any = None  # the sampler of the training rows
    _run: dict[str, dict[str, Any]] | None = None  # what this run is, for its checkpoints

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_callback(_SayWhatStarts(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As `Trainer.train`.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): `True`, `"true"` or `"latest"`: the newest complete
                checkpoint of `output_dir`; a checkpoint that was cut off is skipped with a warning. A path: that
                checkpoint. `None`, `False` or `"false"`: a new run.

        Raises:
            ValueError: Before the first step: no complete checkpoint; one of other semantic IDs, rows or number of
                processes, of another model, or of another learning rate, which the saved optimizer would overrule; a
                new run into a folder that holds the checkpoints of another.

        Other arguments than the run had (a batch size, a seed, a loss) are taken, with a warning.
        """
        if isinstance(resume_from_checkpoint, str):
            resume_from_checkpoint = _WORDS.get(resume_from_checkpoint.lower(), resume_from_checkpoint)
        self.resumed_from = self._find_checkpoint(resume_from_checkpoint)
        self._run = run_settings(self)
        if self.resumed_from is not None:
            self._check_settings(self.resumed_from)
            if self.is_world_process_zero():
                logger.warning(f"Training goes on from {self.resumed_from}.")
        self.accelerator.wait_for_everyone()  # all have looked before anything is moved or written
        if self.resumed_from is not None and self.args.should_save:
            _set_newer_aside(self.resumed_from, Path(self.args.output_dir))
        checkpoint = None if self.resumed_from is None else str(self.resumed_from)
        return super().train(checkpoint, *args, **kwargs)

    # ---- choosing a checkpoint

    def _find_checkpoint(self, resume: str | bool | None) -> Path | None:
        folder = self.args.output_dir
        found = checkpoints_of(folder)
        if not resume:
            if finished := [path for path in found if (path / STATE_NAME).is_file()]:
                raise ValueError(
                    f"output_dir={folder!r} holds {finished[-1].name} of an earlier run, and a new run would mix with "
                    "it. Go on with that run (resume_from_checkpoint=true), choose another output_dir, or delete its "
                    "checkpoints."
                )
            return None
        if resume is not True:
            checkpoint = Path(resume)
            if why := why_incomplete(checkpoint):
                raise ValueError(
                    f"resume_from_checkpoint={str(resume)!r} is no complete checkpoint: {why}. Nothing was trained. "
                    "resume_from_checkpoint=true takes the newest complete checkpoint of output_dir."
                )
            return checkpoint
        skipped = []
        for checkpoint in reversed(found):
            why = why_incomplete(checkpoint)
            if why is None:
                return checkpoint
            skipped.append(f"{checkpoint.name}: {why}")
            if self.is_world_process_zero():
                logger.warning(f"{checkpoint} is skipped: {why}.")
        raise ValueError(
            f"resume_from_checkpoint=true, but output_dir={folder!r} holds no complete checkpoint"
            + (f" ({'; '.join(skipped)}). Delete these and l" if skipped else ". L")
            + "eave resume_from_checkpoint out to start a new run."
        )

    def _check_settings(self, checkpoint: Path) -> None:
        manifest = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        written, now, run = manifest["settings"], self._resume_settings(), self._run or run_settings(self)
        missing = dict.fromkeys(now)  # a checkpoint of an earlier version has no model and no optimizer to compare
        found = [differences(missing | written, now), differences(manifest.get("model", {}), run["model"])]
        of_optimizer = manifest.get("optimizer", {})
        if same := same_optimizer(of_optimizer, run["optimizer"]):
            of_optimizer = {name: value for name, value in of_optimizer.items() if name != "optim"}
        found.append(differences(of_optimizer, run["optimizer"]))
        if different := "; ".join(filter(None, found)):
            raise ValueError(
                f"{checkpoint} belongs to another run: {different}. Resume with what that run had, or start a new one "
                "from its weights. Nothing was trained."
            )
        if same and self.is_world_process_zero():
            logger.warning(
                f"The run of {checkpoint} had optim={manifest['optimizer']['optim']!r}, this one has "
                f"{run['optimizer']['optim']!r}: the same optimizer, whose saved state is taken. Its numbers may be "
                "rounded otherwise."
            )
        if (different := differences(manifest.get("course", {}), run["course"])) and self.is_world_process_zero():
            logger.warning(
                f"The run of {checkpoint} had other arguments: {different}. From here on it takes the new ones, and "
                "ends as neither a run with the old nor one with the new ones alone would."
            )

    def _resume_settings(self) -> dict[str, str | int | float | bool | None]:
        """What must be the same in the run that resumes, under the names of the message; JSON."""
        model = self.accelerator.unwrap_model(self.model)
        model = model.get_base_model() if hasattr(model, "peft_config") else model
        catalogue = getattr(model, "catalogue", None) or getattr(self.processing_class, "catalogue", None)
        return {
            "fingerprint of the semantic IDs": None if catalogue is None else catalogue.fingerprint(),
            "number of processes": self.args.world_size,
            "number of training rows": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else None,
        }

    # ---- writing and reading it

    def _save_checkpoint(self, *args, **kwargs):
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save and folder.is_dir():  # half-written by a run that was killed
            (folder / STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last call of every process before the main one writes `trainer_state.json` and deletes older
        checkpoints.
        """
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        (folder / self._progress_name).write_text(json.dumps(self._progress(folder)), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
            manifest = {"settings": self._resume_settings(), **(self._run or run_settings(self)), "files": files}
            (folder / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            folder = Path(checkpoint)
            self._restore_progress(json.loads((folder / self._progress_name).read_text(encoding="utf-8")), folder)

    @property
    def _progress_name(self) -> str:
        return f"progress-{self.args.process_index}.json"

    def _progress(self, folder: Path) -> dict[str, Any]:
        """What this process has gathered since the last log, as JSON; tensors may go to files of `folder`."""
        return {"loss": self._tr_loss.item(), "last_logged_step": self._globalstep_last_logged}

    def _restore_progress(self, progress: dict[str, Any], folder: Path) -> None:
        self._tr_loss.fill_(progress["loss"])
        self._globalstep_last_logged = progress["last_logged_step"]

    # ---- the same rows in the same order

    def _get_train_sampler(self, *args, **kwargs):
        self._order = super()._get_train_sampler(*args, **kwargs)
        if isinstance(self._order, LengthGroupedSampler):
            # a step of all processes is sorted together: transformers sorts for one of them, and the others wait
            self._order.batch_size *= self.args.world_size
        return _EpochSampler(self._order, self) if hasattr(self._order, "generator") else self._order

    def _run_epoch(self, *args, **kwargs):
        if hasattr(self._order, "set_epoch"):  # transformers does not reach it after a resume inside an epoch
            self._order.set_epoch(int(self.state.epoch or 0))
        if self.state.global_step < self.state.max_steps and not self._out_of_patience():
            return super()._run_epoch(*args, **kwargs)
        self.control.should_training_stop = True  # killed after the last step; transformers would train one more

    def _out_of_patience(self) -> bool:
        """Whether the run that is resumed had stopped early when it was killed."""
        early = [
            callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)
        ]
        return any(each.early_stopping_patience_counter >= each.early_stopping_patience for each in early)


class StopAtNonFinite(Trainer):
    r"""
    To be named before `Trainer` among the bases. Raises a `FloatingPointError` before a loss or a gradient that is NaN
    or infinite reaches the weights; `Trainer` itself logs such a loss as the mean of the earlier ones and goes on.
    What was saved stays.

    Reads one number per micro-batch back to the host, as `Trainer` does for its `logging_nan_inf_filter`, which this
    replaces, and one per step. Under float16 a scaler skips steps whose gradients overflow; there the loss alone is
    looked at.
    """

    _micro_batch = 0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.args.logging_nan_inf_filter = False

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self._micro_batch += 1
        if not torch.isfinite(loss):
            shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
            self._stop(
                f"the loss is {loss.item()} in batch {self._micro_batch} of step {self.state.global_step + 1}, of "
                f"{shapes}"
            )
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        self._micro_batch = 0
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaled and not torch.isfinite(torch.as_tensor(norm)):
            self._stop(f"the norm of the gradients is {float(norm)} in step {self.state.global_step + 1}")
        return norm

    def _stop(self, what: str) -> None:
        raise FloatingPointError(
            f"{what}: training stops, and no model of it is saved. Look for NaN or infinite values in the data or the "
            f"weights it started from; else lower learning_rate ({self.args.learning_rate:g}) or max_grad_norm, or "
            f"train in bf16 or float32. Earlier checkpoints, if any, are in {self.args.output_dir}."
        )


class _SayWhatStarts(TrainerCallback):
    """One line before the first step: of a default config it may be a billion parameters, and days."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            rows: Any = self.trainer.train_dataset
            examples = f"{len(rows):,} examples" if hasattr(rows, "__len__") else "streamed examples"
            total, trained = (get_model_param_count(model, trainable_only=only) for only in (False, True))
            logger.warning(  # which is shown, where an info is not
                f"Training {total:,} parameters, {trained:,} of them trainable, on {examples} in {state.max_steps:,} "
                "steps."
            )


class _EpochSampler(Sampler):
    """
    The sampler's rows in an order that is a function of the seed and the epoch, the same in all processes.

    transformers' draw from the global generator (by length), TRL's and accelerate's count the epochs since the process
    started.
    """

    def __init__(self, sampler: Any, trainer: Trainer):
        self.sampler, self.trainer = sampler, trainer
        self.sampler.generator = torch.Generator()

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        args, epoch = self.trainer.args, int(self.trainer.state.epoch or 0)
        self.sampler.generator.manual_seed((args.seed if args.data_seed is None else args.data_seed) + epoch)
        return iter(self.sampler)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _set_newer_aside(checkpoint: Path, folder: Path) -> None:
    """Renames the checkpoints after the one that a run goes back to: they would pass for its own."""
    if checkpoint.resolve().parent != folder.resolve() or not re.search(r"-\d+$", checkpoint.name):
        return
    for newer in checkpoints_of(folder):
        if _step(newer) > _step(checkpoint) and (newer / STATE_NAME).is_file():
            aside = newer.with_name(f"unused-{newer.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(newer, aside)
            logger.warning(f"{newer} is newer than the checkpoint that training goes on from: it is now {aside.name}.")


__all__ = ["MANIFEST_NAME", "ResumableTrainer", "StopAtNonFinite", "checkpoints_of", "why_incomplete"]
