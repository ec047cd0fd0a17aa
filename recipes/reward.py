"""Trains a reward model on logged exposures and scores it on the test period: AUC, GAUC, calibration of every feedback.

    python recipes/prepare.py --config recipes/configs/kuairand_prepare.yaml --source FOLDER --output outputs/kuairand
    python recipes/reward.py --config recipes/configs/kuairand_reward.yaml --data outputs/kuairand --output_dir outputs/reward

Takes the folder that `recipes/prepare.py` writes with `--sessions` and no criteria: for the P-Score one row per exposure
(`max_events: 1`), for the session-wise reward model of OneRec, `--session_wise true`, one per request or session. Time is cut into
periods (a day in ms): an exposure is judged from the histories and the rates of feedback before its period, in validation and test
from those before the split. Built on `transformers.Trainer`: every `TrainingArguments` field works; model choice is on the
validation split. Writes the model, its tokenizer, `arguments.json` (for recipes/dpo.py and recipes/grpo.py, which judge with it),
`metrics.json` and the scores of every validation and test exposure or session.
"""

import json
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
from checks import check_splits, check_training, refuse_unknown
from ending import after_saving, save, some, write_metrics
from model_arguments import mapping
from reward_arguments import ARGUMENTS_NAME, RewardArguments, make_collator
from transformers import AutoModel, AutoTokenizer, TrainingArguments, set_seed
from trl import TrlParser

from onerec_hf import OneRecPScoreConfig, OneRecSessionRewardConfig
from onerec_hf.data import load_splits
from onerec_hf.evaluation import feedback_report
from onerec_hf.hub import model_card as reward_card
from onerec_hf.hub import push_to_hub
from onerec_hf.trainers import ResumableTrainer, StopAtNonFinite


class RewardTrainer(StopAtNonFinite, ResumableTrainer):
    """`Trainer` that stops at the first NaN and whose killed runs go on."""


def report(args: RewardArguments, prediction, split: datasets.Dataset) -> tuple[dict, datasets.Dataset]:
    """Metrics of the towers and of the one score (`p_score`, `reward`) against every feedback; and the scores themselves."""
    logits, rewards = prediction.predictions
    users, name = np.repeat(split["user"], rewards.size // len(split)), "reward" if args.session_wise else "p_score"
    labels, towers = (x.reshape(-1, len(args.targets)) for x in (prediction.label_ids, 1 / (1 + np.exp(-logits))))
    metrics = feedback_report(labels, towers, users, args.targets)
    fused = np.repeat(rewards.reshape(-1, 1), len(args.targets), axis=1)
    fused = feedback_report(labels, fused, users, [f"{name}_{target}" for target in args.targets])
    metrics |= {key: value for key, value in fused.items() if key.endswith("auc")}
    columns = {"user": users, name: rewards.ravel()}
    for x, target in enumerate(args.targets):
        columns |= {target: labels[:, x], f"predicted_{target}": towers[:, x]}
    return metrics, datasets.Dataset.from_dict(columns)


def main(args: RewardArguments, training: TrainingArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    check_training(training)
    if taken := sorted({"user", "p_score", "reward"} & set(args.targets)):
        raise ValueError(f"targets={taken}: the scores have a column of that name already; rename it in the log.")
    set_seed(training.seed)
    training.remove_unused_columns, training.label_names = False, ["labels"]
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, with our card
    splits = load_splits(args.data)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer, splits)
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
    names, read = splits["train"].column_names, {"timestamp", *collator.event_features}
    unread = [name for name in names if f"target_{name}" in names and name not in read]
    splits = splits.remove_columns(unread).with_format("numpy")
    begin = collator.boundaries[args.warm_up - 1] if args.warm_up else -np.inf
    train = splits["train"].select(np.flatnonzero(np.array(splits["train"]["session_start"]) >= begin))
    trainer = RewardTrainer(AutoModel.from_config(config), training, collator, train, splits["validation"], tokenizer)
    check_splits(splits | {"train": train})
    rehearsal = some(splits["test"], 2, "test")  # what would fail at the end fails now
    report(args, trainer.predict(rehearsal), rehearsal)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    output = Path(training.output_dir)
    arguments = json.dumps(asdict(args), indent=2)
    save(trainer, lambda folder: (folder / ARGUMENTS_NAME).write_text(arguments, encoding="utf-8"))
    result = {"num_parameters": trainer.model.num_parameters(), "log": trainer.state.log_history}
    advice = (
        "The same command with --resume_from_checkpoint and the last checkpoint scores the model without training it."
    )
    try:  # all processes share the rows
        predictions = {name: trainer.predict(splits[name]) for name in ("validation", "test")}
    except Exception as error:
        error.add_note(
            f"The reward model is trained and saved in {output}; its metrics and card are missing. {advice}"
        )
        raise

    def metrics():
        for name, prediction in predictions.items():
            result[name], scores = report(args, prediction, splits[name])
            scores.to_parquet(str(output / f"{name}_scores.parquet"))
        write_metrics(output, result)

    def card():
        texts = {"title": "Session-wise reward model" if args.session_wise else "P-Score reward model"}
        texts |= {"repo": str(output), "data": f"Logged exposures: {args.data}.", "dataset_name": Path(args.data).name}
        texts["training"] = f"`recipes/reward.py`, {training.num_train_epochs:g} epochs."
        reward_card(config, **texts, metrics=result.get("test")).save(output / "README.md")

    steps = {"metrics (metrics.json, scores)": metrics, "card (README.md)": card}
    if push:
        repo, private = training.hub_model_id or output.absolute().name, training.hub_private_repo
        steps["push"] = lambda: push_to_hub(output, repo, private=private, token=training.hub_token)
    after_saving(trainer, steps, advice)
    return result


if __name__ == "__main__":
    metrics = main(*TrlParser((RewardArguments, TrainingArguments)).parse_args_and_config())
    print(json.dumps({name: metrics[name] for name in ("num_parameters", "validation", "test")}, indent=2))
