"""What `onerec reward` and the recipes that judge with its model share: its arguments, its collator, the reward function."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data import (
    RewardCollator,
    category_codes,
    category_map,
    event_labels,
    load_splits,
    quantile_codes,
    rate_numbers,
)
from ..rewards import reward_of_model
from ..rewards.functions import RewardFunction
from .checks import check_same_items, event_features
from .model_arguments import mapping

ARGUMENTS_NAME = "arguments.json"


@dataclass
class RewardArguments:
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote with --sessions."})
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
    watch_cap_ms: int | None = field(default=None, metadata={"help": "Play time of an item that is a full swt label."})
    session_wise: bool = field(
        default=False, metadata={"help": "The reward model of whole sessions, not the P-Score."}
    )
    session_cap_ms: int | None = field(default=None, metadata={"help": "The same of a session, with --session_wise."})


def table_features(args: RewardArguments, table: str, categories: list[str], quantiles: list[str]) -> dict:
    """Categories of the rows of items.parquet or users.parquet, by column."""
    rows = datasets.Dataset.from_parquet(str(Path(args.data) / table))
    if absent := [name for name in (*categories, *quantiles) if name not in rows.column_names]:
        raise ValueError(f"{table} has no {absent}; it has {rows.column_names}.")
    known = {name: category_map(rows[name], args.max_categories) for name in categories}
    codes = {name: category_codes(rows[name], known[name]) for name in categories}
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
    numbers: tuple[dict, dict] = ({}, {})
    for key in args.rates:
        index = user if key == "user" else flat(train, "targets")
        found = rate_numbers(key, args.targets, feedback["timestamp"], index, labels, groups[key], boundaries.tolist())
        numbers[key == "user"].update(found)
    return numbers


def make_collator(
    args: RewardArguments, tokenizer: PreTrainedTokenizerBase, splits: datasets.DatasetDict
) -> RewardCollator:
    """The collator, with features, past rates and the boundaries between periods."""
    starts = {name: np.array(rows["session_start"]) for name, rows in splits.items()}
    days = np.arange(starts["train"].min() + args.period, starts["validation"].min() - args.period / 2, args.period)
    boundaries = np.array([*days, starts["validation"].min(), starts["test"].min()])
    items = table_features(args, "items.parquet", args.item_categories, args.item_quantiles)
    users = table_features(args, "users.parquet", args.user_categories, args.user_quantiles)
    size = {n: len(datasets.Dataset.from_parquet(str(Path(args.data) / f"{n}s.parquet"))) for n in ("item", "user")}
    groups = items | {name: np.arange(rows) for name, rows in size.items()}
    item_numbers, user_numbers = past_numbers(args, splits["train"], groups, boundaries)
    events, requests = (event_features(mapping(v)) for v in (args.event_features, args.request_features))
    return RewardCollator(
        tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids),
        args.max_history,
        event_features=events,
        item_features={name: items[name] for name in args.context_item_features},
        user_features=users,
        targets=args.targets,
        session_wise=args.session_wise,
        candidate_features=items | {"item_id": groups["item"] + 1},
        request_features=requests,
        boundaries=boundaries.tolist(),
        item_numbers=item_numbers,
        user_numbers=user_numbers,
        label_settings={"watch_cap_ms": args.watch_cap_ms}
        | ({"session_cap_ms": args.session_cap_ms} if args.session_wise else {}),
    )


def load_reward(folder: str, data: str | None, policy_data: str) -> tuple:
    """Model, collator and catalogue of a folder that `onerec reward` wrote, for the users of the policy's data folder."""
    args = RewardArguments(**json.loads((Path(folder) / ARGUMENTS_NAME).read_text(encoding="utf-8")))
    args.data = data or args.data
    users = [
        datasets.Dataset.from_parquet(str(Path(f) / "users.parquet"))["user_id"][:] for f in (policy_data, args.data)
    ]
    if users[0] != users[1]:
        raise ValueError(
            f"{policy_data} and {args.data} hold other users: prepare both from one log, with the same k_core."
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)  # with the catalogue it was trained with
    check_same_items(folder, tokenizer.catalogue, args.data)
    collator = make_collator(args, tokenizer, load_splits(args.data))
    return AutoModel.from_pretrained(folder).eval(), collator, tokenizer.catalogue


def reward_function(
    folder: str, data: str | None, policy: PreTrainedModel, policy_data: str, num_generations: int
) -> RewardFunction:
    """The reward model of a folder that `onerec reward` wrote, as a reward function for the policy's completions."""
    model, collator, catalogue = load_reward(folder, data, policy_data)
    return reward_of_model(model, collator, policy, catalogue)
