"""What the recipes that train check before their first step, so that no typo and no full disk is found after the last
one.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedConfig, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from ..data import EventFeature, check_event_features, longest_list
from ..evaluation import evaluate
from ..recommender import Recommender
from .ending import earlier_results, score_model, some

logger = logging.get_logger(__name__)


def check_output(folder: str, replaces: bool = True) -> None:
    """Refuses an output folder that cannot be written; says which results of an earlier run a new model `replaces`."""
    path = Path(folder)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"the output folder {folder} cannot be made: {there} is a file. Name another folder.")
    if not os.access(there, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(f"{there} cannot be written: name another output folder, or `chmod u+w` this one.")
    old = [file.name for file in earlier_results(path)]
    if replaces and old:
        logger.warning(
            f"{folder} holds an earlier run: {', '.join(old)}. They are removed as soon as the new model is saved. To "
            "keep them, stop now and name another folder."
        )


def check_columns(table: str, there: Iterable[str], needed: Iterable[str]) -> None:
    """Refuses a table that lacks columns; `table` is how the user named it, as `--log impressions.parquet`."""
    there = list(there)
    if absent := [name for name in dict.fromkeys(needed) if name not in there]:
        raise ValueError(
            f"{table} has no columns {absent}; it has {there}. Name the file that has them, or rename yours."
        )


def check_push(repo: str, token: str | None = None) -> None:
    """Refuses a name that the Hub does not allow, and a token that it does not know."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{repo!r} is no name of a repository on the Hub: give 'organisation/name'.") from error
    try:
        HfApi(token=token).whoami()
    except Exception as error:  # of token, connection, offline mode
        raise OSError(
            f"{repo} could not be pushed: the Hub does not say who you are ({type(error).__name__}: {error}). Log in "
            "with `hf auth login`, or leave out the push and do it later with `onerec publish`."
        ) from error


def check_training(training: TrainingArguments, metrics: Iterable[str] = ()) -> None:
    """
    The arguments whose errors `Trainer` finds after hours.

    Args:
        metrics: What an evaluation returns beside `loss`.
    """
    check_output(training.output_dir)
    best, known = training.metric_for_best_model, ["loss", *metrics]
    if best is not None and best.removeprefix("eval_") not in known:
        raise ValueError(f"metric_for_best_model={best!r}: an evaluation returns {known}, each also as eval_<name>.")
    if training.push_to_hub and training.process_index == 0:
        check_push(training.hub_model_id or Path(training.output_dir).absolute().name, training.hub_token)


def refuse_unknown(settings: dict, config_class: type[PreTrainedConfig]) -> None:
    """A config takes any argument and ignores what it does not know: a typo would train another model."""
    known = {field.name for field in fields(config_class)} | {"model_type"}
    if unknown := [name for name in settings if name not in known and not hasattr(PreTrainedConfig, name)]:
        raise ValueError(f"model={unknown}: {config_class.__name__} does not know that; it has {sorted(known)}.")


def unique_names(title: str, folders: list[Path]) -> list[str]:
    """A name for each folder that no other system has: its own, with as many folders above it as that takes."""
    paths = [folder.absolute().parts for folder in folders]
    names = []
    for i, parts in enumerate(paths):
        others = [path for j, path in enumerate(paths) if j != i]
        ends = ((n, "/".join(parts[-n:])) for n in range(1, len(parts) + 1))
        free = (end for n, end in ends if end != title and all("/".join(path[-n:]) != end for path in others))
        names.append(next(free, str(folders[i].absolute())))
    return names


def check_keywords(argument: str, settings: dict, *functions: Callable) -> None:
    """Refuses settings that none of the functions takes by name, before the first of them is called."""
    parameters = [each for function in functions for each in signature(function).parameters.values()]
    known = sorted({each.name for each in parameters if each.kind is each.KEYWORD_ONLY})
    if unknown := [name for name in settings if name not in known]:
        raise ValueError(f"{argument}={unknown} is not known; allowed are {known or 'none here'}.")


def event_features(given: dict) -> dict[str, EventFeature]:
    """The features of `{"column": ["kind", size], ...}`."""
    for name, feature in given.items():
        if not isinstance(feature, list | tuple) or len(feature) != 2 or not isinstance(feature[1], int):
            raise ValueError(f'event feature {name!r} is {feature!r}: give a kind and a size, such as ["log", 24].')
        EventFeature(*feature).encode(np.zeros(1))  # refuses an unknown kind
    return {name: EventFeature(*feature) for name, feature in given.items()}


def check_beams(num_beams: int) -> None:
    """Refuses a search that is narrower than the lists of the test metrics."""
    longest = max(signature(evaluate).parameters["ks"].default)
    if num_beams < longest:
        raise ValueError(
            f"num_beams={num_beams}: the test metrics need lists of {longest} items, so at least {longest}."
        )


def check_sessions(
    config: PreTrainedConfig, splits: Mapping[str, datasets.Dataset], trained: Iterable[datasets.Dataset] = ()
) -> None:
    """
    Args:
        splits: Rows of which none may hold more targets than the model writes.
        trained: All training rows of a new model, in as many parts as they come: one of them at least must hold as
            many targets. Nothing for a model that can write sessions already.

    Raises:
        ValueError: For a model of sessions, where a row holds more targets than it has items, or none as many: its
            last positions would be served, and never trained.
    """
    items = config.num_session_items if config.session_wise else 1
    if items == 1:  # then each target is a row of its own
        return

    def with_targets(rows: datasets.Dataset) -> int:
        return longest_list(rows, "targets") if "targets" in rows.column_names else 1

    for name, split in splits.items():
        longest = with_targets(split)
        if longest > items:
            raise ValueError(
                f"a row of the {name} split has {longest} targets, the model writes sessions of num_session_items="
                f"{items} items. Train with --model '{{\"num_session_items\": {longest}, ...}}', "
                "or with 1 if the targets are no session; or prepare shorter sessions."
            )
    longest = 0
    for part in trained:  # until one says that there is no need to read on
        longest = max(longest, with_targets(part))
        if longest >= items:
            break
    if 0 < longest < items:
        what = "sessions of at most" if longest > 1 else "targets one by one, rows of"
        raise ValueError(
            f"the training split has {what} {longest}, the model writes sessions of num_session_items={items} items: "
            f'nothing would train the last {items - longest}. Train with --model \'{{"num_session_items": {longest}, '
            "...}', or prepare longer sessions (session_size)."
        )


def check_splits(splits: Mapping[str, datasets.Dataset]) -> None:
    """Refuses splits that cannot be trained on or scored."""
    for name, rows in splits.items():
        if len(rows) == 0:
            raise ValueError(
                f"the {name} split has no row that can be used: a user needs two events to train on, and one more for "
                "each of validation and test. Prepare the data again, with more of the log."
            )
        if name != "train" and not all(len(targets) for targets in rows["targets"]):
            raise ValueError(f"the {name} split has rows without targets, which cannot be scored: prepare it again.")


def check_sharding(trainer: Trainer, score: bool) -> None:
    """
    Refuses what one process does alone where each process holds a part of the weights: it would wait for the others
    forever.

    Args:
        score: Whether the first process shall search for recommendations, in evaluations and at the end.
    """
    zero3 = trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled()
    if not (trainer.is_fsdp_enabled or zero3):
        return
    what = "DeepSpeed ZeRO-3" if zero3 else "FSDP"
    if score:
        raise ValueError(
            f"under {what} no process has whole weights, and a search in one of them would wait for the others "
            "forever. Set --score false, which saves the model without metrics, and then run `onerec score`; or leave "
            "out the sharding (--accelerate_config multi_gpu)."
        )
    if hasattr(trainer.accelerator.unwrap_model(trainer.model), "merge_and_unload"):
        raise ValueError(f"under {what} an adapter cannot be merged: leave out --lora_r, or the sharding.")


def rehearse(
    recommender: Recommender, train: datasets.Dataset, splits: datasets.DatasetDict, scoring: bool = True
) -> None:
    """Does with a few rows all that comes during and after the training, so that what would fail then fails now."""
    check_splits(splits | {"train": train})
    recommender.ranker.collator([train[i] for i in range(min(2, len(train)))])
    with tempfile.TemporaryDirectory() as folder:
        recommender.save_beside(folder)
        for name in ("validation", "test") if scoring else ():
            score_model(recommender.ranker, some(splits[name], 2, name), Path(folder), seed=0)


class _TimeEstimate(TrainerCallback):
    """
    Prints after a few steps how long all of them will take; the trainers say before the first one what starts.

    The first steps are left out of the estimate: they are slower, and so much the more on a GPU.
    """

    warm_up, measured = 3, 10  # steps

    def on_train_begin(self, args, state, control, **kwargs):
        self.first = state.global_step + self.warm_up

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.first:
            self.start = time.perf_counter()
        if state.global_step == self.first + self.measured and state.is_world_process_zero:
            seconds = (time.perf_counter() - self.start) / self.measured
            left = seconds * (state.max_steps - state.global_step)
            time_left = f"{left / 60:,.0f} minutes" if left >= 90 else f"{left:.0f} seconds"
            print(f"{seconds:.2g} seconds per step: about {time_left} left, evaluations apart", flush=True)


def check_trained(trainer: Trainer) -> None:
    """Refuses to go on with weights that no step has changed: they would be saved as a trained model. A run that is
    resumed at its end has the steps of its checkpoint.
    """
    if trainer.state.global_step > 0:
        return
    training, rows = trainer.args, trainer.train_dataset
    count = f"{len(rows):,}" if hasattr(rows, "__len__") else "streamed"
    names = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "dataloader_drop_last")
    settings = ", ".join(f"{name}={getattr(training, name)}" for name in names)
    raise ValueError(
        f"the training made no step, so nothing is saved: {count} training rows, {settings}. Give more rows or steps."
    )


def train_checked(
    trainer: Trainer,
    recommender: Recommender,
    train: datasets.Dataset,
    splits: datasets.DatasetDict,
    score: bool,
) -> dict[str, Any]:
    """Trains once sharding, rows and all that comes after the training have been tried; returns `train_seconds`."""
    check_sharding(trainer, score)
    for rows in ({"train": train} | splits).values():  # of a stream, `train` are its first rows
        check_event_features(recommender.ranker.collator.event_features, rows)
    rehearse(recommender, train, splits, score)
    trainer.add_callback(_TimeEstimate())
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    check_trained(trainer)
    return {"train_seconds": time.perf_counter() - start}
