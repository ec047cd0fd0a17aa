"""Trains a reward model on logged exposures and scores it on the test period: AUC, GAUC, calibration of every
feedback.

    onerec prepare --config kuairand_prepare.yaml --source FOLDER --output outputs/kuairand
    onerec reward --config kuairand_reward.yaml --data outputs/kuairand --output_dir outputs/reward

Takes the folder that `onerec prepare` writes with `--sessions` and no criteria: for the P-Score one row per exposure
(`max_events: 1`), for the session-wise reward model of OneRec, `--session_wise true`, one per request or session. Time
is cut into periods (a day in ms): an exposure is judged from the histories and the rates of feedback before its
period, in validation and test from those before the split; of splits by user, whose validation and test rows lie among
the training rows in time, each from those before its own period. Built on `transformers.Trainer`: every
`TrainingArguments` field works; model choice is on the validation split. Writes the model, its tokenizer,
`arguments.json` (for `onerec dpo` and `onerec grpo`, which judge with it), `metrics.json` and the scores of every
validation and test exposure or session.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import datasets
import numpy as np
from transformers import AutoModel, TrainingArguments, set_seed
from transformers.trainer_utils import PredictionOutput

from .. import OneRecPScoreConfig, OneRecSessionRewardConfig
from ..collators import RewardCollator
from ..data import DataFolder, check_event_features
from ..evaluation import feedback_report
from ..hub import model_card
from ..trainers.reward import RewardTrainer
from .checks import check_splits, check_trained, check_training, refuse_unknown
from .ending import finish, save, some, write_metrics
from .model_arguments import mapping
from .parser import ScriptParser
from .reward_arguments import ARGUMENTS_NAME, RewardArguments, make_collator


def report(
    args: RewardArguments, prediction: PredictionOutput, split: datasets.Dataset
) -> tuple[dict, datasets.Dataset]:
    """Metrics of the towers and of the one score (`p_score`, `reward`) against every feedback; and the scores
    themselves.
    """
    logits, rewards = cast(tuple[np.ndarray, np.ndarray], prediction.predictions)
    users, name = np.repeat(split["user"], rewards.size // len(split)), "reward" if args.session_wise else "p_score"
    labels, towers = (
        x.reshape(-1, len(args.targets)) for x in (np.asarray(prediction.label_ids), 1 / (1 + np.exp(-logits)))
    )
    metrics = feedback_report(labels, towers, users, args.targets)
    fused = np.repeat(rewards.reshape(-1, 1), len(args.targets), axis=1)
    judged = feedback_report(labels, fused, users, [f"{name}_{target}" for target in args.targets])
    metrics |= {key: value for key, value in judged.items() if key.endswith("auc")}
    columns = {"user": users, name: rewards.ravel()}
    for x, target in enumerate(args.targets):
        columns |= {target: labels[:, x], f"predicted_{target}": towers[:, x]}
    return metrics, datasets.Dataset.from_dict(columns)


def make_trainer(
    args: RewardArguments, training: TrainingArguments
) -> tuple[RewardTrainer, datasets.DatasetDict, DataFolder]:
    """Untrained model and trainer, the splits as it reads them, their folder; raises where something cannot be
    used.
    """
    data = DataFolder(args.data)
    splits = data.splits_on_disk() if args.streaming else data.splits
    tokenizer, collator = data.tokenizer, make_collator(args, data, splits)
    config_class = OneRecSessionRewardConfig if args.session_wise else OneRecPScoreConfig
    refuse_unknown(mapping(args.model), config_class)
    config = config_class(
        codebook_sizes=tokenizer.codebook_sizes,
        catalogue_fingerprint=tokenizer.catalogue.fingerprint(),
        targets=args.targets,
        context_features=collator.context_feature_sizes,
        user_features=collator.user_feature_sizes,
        item_features=collator.item_feature_sizes,
        item_numbers=collator.item_number_names,
        **mapping(args.model),
    )
    for rows in splits.values():
        check_event_features(collator.event_features | collator.request_features, rows)
    names, read = splits["train"].column_names, {"timestamp", *collator.event_features}
    unread = [name for name in names if f"target_{name}" in names and name not in read]
    splits = splits.remove_columns(unread).with_format("numpy")
    begin = collator.boundaries[args.warm_up - 1] if args.warm_up else -np.inf
    train = splits["train"].select(np.flatnonzero(np.array(splits["train"]["session_start"]) >= begin))
    check_splits(splits | {"train": train})
    model = AutoModel.from_config(config)
    return RewardTrainer(model, training, collator, train, splits["validation"], tokenizer), splits, data


def main(args: RewardArguments, training: TrainingArguments) -> dict:
    """Runs the script; returns what it writes to `metrics.json`."""
    check_training(training)
    if taken := sorted({"user", "p_score", "reward"} & set(args.targets)):
        raise ValueError(f"targets={taken}: the scores have a column of that name already; rename it in the log.")
    set_seed(training.seed)
    training.remove_unused_columns, training.label_names = False, ["labels"]
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, with our card
    trainer, splits, data = make_trainer(args, training)
    rehearsal = some(splits["test"], 2, "test")  # what would fail at the end fails now
    report(args, trainer.predict(rehearsal), rehearsal)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    check_trained(trainer)
    output, model = Path(str(training.output_dir)), trainer.accelerator.unwrap_model(trainer.model)
    result: dict[str, Any] = {"num_parameters": model.num_parameters(), "log": trainer.state.log_history}

    def save_beside(folder: Path) -> None:
        cast(RewardCollator, trainer.data_collator).save_pretrained(folder)
        arguments = json.dumps(asdict(args) | {"users": data.user_fingerprint}, indent=2)
        (folder / ARGUMENTS_NAME).write_text(arguments, encoding="utf-8")

    def metrics() -> None:
        for name, prediction in predictions.items():
            result[name], scores = report(args, prediction, splits[name])
            scores.to_parquet(str(output / f"{name}_scores.parquet"))
        write_metrics(output, result)

    def card() -> None:
        texts: dict[str, Any] = {"title": "Session-wise reward model" if args.session_wise else "P-Score reward model"}
        texts |= {"repo": str(output), "data": f"Logged exposures: {args.data}.", "dataset_name": Path(args.data).name}
        texts["training"] = f"`onerec reward`, {training.num_train_epochs:g} epochs."
        model_card(model.config, **texts, metrics=result.get("test")).save(output / "README.md")

    advice = (
        "The same command with --resume_from_checkpoint and the last checkpoint scores the model without training it."
    )
    save(trainer, save_beside)
    try:  # all processes share the rows
        predictions = {name: trainer.predict(splits[name]) for name in ("validation", "test")}
    except Exception as error:
        error.add_note(
            f"The reward model is trained and saved in {output}; its metrics and card are missing. {advice}"
        )
        raise
    finish(trainer, {"metrics (metrics.json, scores)": metrics, "card (README.md)": card}, advice, push)
    return result


def run(argv: list[str] | None = None) -> None:
    """`onerec reward`; `argv`: its arguments, by default those of the command line."""
    report = main(*ScriptParser("reward", __doc__, [RewardArguments, TrainingArguments]).parse(argv))
    print(json.dumps({name: report[name] for name in ("num_parameters", "validation", "test")}, indent=2))


if __name__ == "__main__":
    run()
