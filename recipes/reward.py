"""Trains the P-Score reward model on logged exposures and scores it on the test period: AUC, GAUC, calibration of every feedback.

    python recipes/prepare.py --config recipes/configs/kuairand_prepare.yaml --source FOLDER --output outputs/kuairand
    python recipes/reward.py --config recipes/configs/kuairand_reward.yaml --data outputs/kuairand --output_dir outputs/reward

Takes the folder that `recipes/prepare.py` writes with `--sessions` (one row per exposure: `max_events: 1`, no criteria). Time is
cut into periods (a day in ms): an exposure is judged from the histories and the rates of feedback before its period, in validation
and test from those before the split. Built on `transformers.Trainer`: every `TrainingArguments` field works; model choice is on the
validation split. Writes the model, its tokenizer, `metrics.json` and the scores of every validation and test exposure.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from model_arguments import mapping
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed
from trl import TrlParser

from onerec_hf import OneRecPScoreConfig, OneRecPScoreModel
from onerec_hf.data import EventFeature, RewardCollator, category_codes, event_labels, quantile_codes, rate_numbers
from onerec_hf.evaluation import feedback_report
from onerec_hf.hub import reward_card


@dataclass
class RewardArguments:
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote with --sessions."})
    targets: list[str] = field(metadata={"help": "Objectives, see data/labels.py."})
    model: str = field(default="{}", metadata={"help": "Arguments of OneRecPScoreConfig, YAML mapping or JSON."})
    max_history: int = field(default=30, metadata={"help": "Behaviours of context."})
    event_features: str = field(default="{}", metadata={"help": 'Of behaviours, e.g. {"play_time_ms": ["log", 24]}.'})
    context_item_features: list[str] = field(default_factory=list, metadata={"help": "Item features of behaviours."})
    request_features: str = field(default="{}", metadata={"help": 'Of exposures, e.g. {"timestamp": ["hour", 25]}.'})
    item_categories: list[str] = field(default_factory=list, metadata={"help": "Columns of items.parquet."})
    item_quantiles: list[str] = field(default_factory=list, metadata={"help": "Numeric columns, put into buckets."})
    user_categories: list[str] = field(default_factory=list, metadata={"help": "Columns of users.parquet."})
    user_quantiles: list[str] = field(default_factory=list, metadata={"help": "Numeric columns, put into buckets."})
    num_buckets: int = 32
    max_categories: int | None = None
    rates: list[str] = field(default_factory=list, metadata={"help": "Past rates by item, user, or an item category."})
    period: float = field(default=86_400_000, metadata={"help": "Length of a period in the unit of the timestamps."})
    warm_up: int = field(default=2, metadata={"help": "First periods that only give rates, and are not trained on."})
    watch_cap_ms: int | None = field(default=None, metadata={"help": "Time that is a full swt label."})


def table_features(args: RewardArguments, table: str, categories: list[str], quantiles: list[str]) -> dict:
    """Categories of the rows of items.parquet or users.parquet, by column."""
    rows = datasets.Dataset.from_parquet(str(Path(args.data) / table))
    if absent := [name for name in (*categories, *quantiles) if name not in rows.column_names]:
        raise ValueError(f"{table} has no {absent}; it has {rows.column_names}.")
    codes = {name: category_codes(rows[name], args.max_categories) for name in categories}
    return codes | {name: quantile_codes(np.array(rows[name], dtype=float), args.num_buckets) for name in quantiles}


def flat(split: datasets.Dataset, column: str) -> np.ndarray:
    """A list column, all rows one after another."""
    return split.with_format("arrow")[:][column].combine_chunks().flatten().to_numpy()


def past_numbers(
    args: RewardArguments, train: datasets.Dataset, groups: dict, boundaries: np.ndarray
) -> tuple[dict, dict]:
    """Past rates of training exposures, as the numbers of items and of users."""
    user = np.repeat(train["user"], [len(targets) for targets in train["targets"]])
    names = [name for name in train.column_names if name.startswith("target_")]
    feedback = {name.removeprefix("target_"): flat(train, name) for name in names}
    labels = event_labels(feedback, args.targets, watch_cap_ms=args.watch_cap_ms)
    numbers = {}, {}
    for key in args.rates:
        index = user if key == "user" else flat(train, "targets")
        found = rate_numbers(key, args.targets, feedback["timestamp"], index, labels, groups[key], boundaries)
        numbers[key == "user"].update(found)
    return numbers


def make_collator(args: RewardArguments, tokenizer, splits: datasets.DatasetDict) -> RewardCollator:
    """The collator, with features, past rates and the boundaries between periods."""
    starts = {name: np.array(rows["session_start"]) for name, rows in splits.items()}
    days = np.arange(starts["train"].min() + args.period, starts["validation"].min() - args.period / 2, args.period)
    boundaries = np.array([*days, starts["validation"].min(), starts["test"].min()])
    items = table_features(args, "items.parquet", args.item_categories, args.item_quantiles)
    users = table_features(args, "users.parquet", args.user_categories, args.user_quantiles)
    size = {n: len(datasets.Dataset.from_parquet(str(Path(args.data) / f"{n}s.parquet"))) for n in ("item", "user")}
    groups = items | {name: np.arange(rows) for name, rows in size.items()}
    item_numbers, user_numbers = past_numbers(args, splits["train"], groups, boundaries)
    events, requests = (
        {name: EventFeature(*feature) for name, feature in mapping(v).items()}
        for v in (args.event_features, args.request_features)
    )
    return RewardCollator(
        tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids),
        args.max_history,
        event_features=events,
        item_features={name: items[name] for name in args.context_item_features},
        user_features=users,
        targets=args.targets,
        session_wise=False,
        candidate_features=items | {"item_id": groups["item"] + 1},
        request_features=requests,
        boundaries=boundaries,
        item_numbers=item_numbers,
        user_numbers=user_numbers,
        label_settings={"watch_cap_ms": args.watch_cap_ms},
    )


def report(args: RewardArguments, prediction, split: datasets.Dataset) -> tuple[dict, datasets.Dataset]:
    """Metrics of the towers and, as `p_score`, of the fused score against every feedback; and the scores themselves."""
    logits, rewards = prediction.predictions
    users = np.repeat(split["user"], logits.shape[1])
    labels, towers = (x.reshape(-1, len(args.targets)) for x in (prediction.label_ids, 1 / (1 + np.exp(-logits))))
    metrics = feedback_report(labels, towers, users, args.targets)
    fused = np.repeat(rewards.reshape(-1, 1), len(args.targets), axis=1)
    fused = feedback_report(labels, fused, users, [f"p_score_{target}" for target in args.targets])
    metrics |= {name: value for name, value in fused.items() if name.endswith("auc")}
    columns = {"user": users, "p_score": rewards.ravel()}
    for x, target in enumerate(args.targets):
        columns |= {target: labels[:, x], f"predicted_{target}": towers[:, x]}
    return metrics, datasets.Dataset.from_dict(columns)


def main(args: RewardArguments, training: TrainingArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    set_seed(training.seed)
    training.remove_unused_columns, training.label_names = False, ["labels"]
    splits = datasets.load_from_disk(str(Path(args.data) / "splits"))
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer, splits)
    config = OneRecPScoreConfig(
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
    trainer = Trainer(OneRecPScoreModel(config), training, collator, train, splits["validation"], tokenizer)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    output = Path(training.output_dir)
    result = {"num_parameters": trainer.model.num_parameters(), "log": trainer.state.log_history}
    for name in ("validation", "test"):
        result[name], scores = report(args, trainer.predict(splits[name]), splits[name])
        scores.to_parquet(str(output / f"{name}_scores.parquet"))
    (output / "metrics.json").write_text(json.dumps(result, indent=2))
    card = {"title": "P-Score reward model", "repo": str(output), "data": f"Logged exposures: {args.data}."}
    card |= {
        "training": f"`recipes/reward.py`, {training.num_train_epochs:g} epochs.",
        "dataset_name": Path(args.data).name,
    }
    reward_card(config, **card, metrics=result["test"]).save(output / "README.md")
    return result


if __name__ == "__main__":
    metrics = main(*TrlParser((RewardArguments, TrainingArguments)).parse_args_and_config())
    print(json.dumps({name: metrics[name] for name in ("num_parameters", "validation", "test")}, indent=2))
