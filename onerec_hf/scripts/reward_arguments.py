"""What `onerec reward` and the recipes that judge with its model share: its arguments, its collator, the saved
model.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from ..collators import RewardCollator
from ..data import DataFolder, category_codes, category_map, event_labels, quantile_codes, rate_numbers
from ..rewards import RewardModel
from .checks import event_features
from .model_arguments import ON_DISK, mapping

logger = logging.get_logger(__name__)

ARGUMENTS_NAME = "arguments.json"
MOST_PERIODS = 100_000


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
    num_buckets: int = field(default=32, metadata={"help": "Buckets of each numeric column."})
    max_categories: int | None = field(
        default=None, metadata={"help": "Values kept per category, the rarer ones share 0; default all."}
    )
    rates: list[str] = field(default_factory=list, metadata={"help": "Past rates by item, user, or an item category."})
    period: float = field(default=86_400_000, metadata={"help": "Length of a period in the unit of the timestamps."})
    warm_up: int = field(default=2, metadata={"help": "First periods that only give rates, and are not trained on."})
    watch_cap_ms: int | None = field(default=None, metadata={"help": "Play time of an item that is a full swt label."})
    streaming: bool = field(default=False, metadata={"help": ON_DISK})
    session_wise: bool = field(
        default=False, metadata={"help": "The reward model of whole sessions, not the P-Score."}
    )
    session_cap_ms: int | None = field(default=None, metadata={"help": "The same of a session, with --session_wise."})


def table_features(args: RewardArguments, data: DataFolder, table: str) -> dict:
    """Categories of the rows of `"items"` or `"users"`, by column."""
    of = table.removesuffix("s")
    categories = data.columns(table, getattr(args, f"{of}_categories"))
    numbers = data.columns(table, getattr(args, f"{of}_quantiles"))
    codes = {name: category_codes(v, category_map(v, args.max_categories)) for name, v in categories.items()}
    return codes | {name: quantile_codes(np.array(v, dtype=float), args.num_buckets) for name, v in numbers.items()}


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


def period_boundaries(args: RewardArguments, starts: dict[str, np.ndarray]) -> np.ndarray:
    """
    The times, increasing, at which what a row knows is renewed: one per period.

    In a split by time, the whole of the validation is one period and the whole of the test another, as for a model
    that is deployed once. In a split by user, validation and test rows lie all over the log, and other users' training
    rows beside them: periods go on to its end, and a held-out row knows what was known when its own period began.

    Args:
        starts: `session_start` of the rows of every split.

    Raises:
        ValueError: A period that is not above 0, too short for the log, or too long for past rates.
    """
    first, last = starts["train"].min(), max(values.max() for values in starts.values())
    if not args.period > 0 or (last - first) / args.period > MOST_PERIODS:
        raise ValueError(
            f"period={args.period:.15g} cuts the log, {first} to {last}, into more than {MOST_PERIODS:,} periods: "
            "give the length of a day, say, in the unit of its timestamps."
        )
    validation, test = starts["validation"].min(), starts["test"].min()
    if starts["train"].max() < validation and starts["validation"].max() < test:
        days = np.arange(first + args.period, validation - args.period / 2, args.period)
        boundaries = np.array([*days, validation, test])
    else:
        boundaries = np.arange(first + args.period, last, args.period)
        logger.warning(
            f"{args.data} is split by user: its validation and test rows lie among the training rows in time. Each is "
            f"judged from what was known when its period began, of {len(boundaries) + 1:,} periods. With the "
            "--validation_start and --test_start of `onerec prepare`, all of them would lie after the training."
        )
    assert (np.diff(boundaries) > 0).all()  # a row looks its period up in them
    if args.rates and not len(boundaries):
        raise ValueError(
            f"rates={args.rates} with period={args.period:.15g}: the log, {first} to {last}, is no longer than a "
            "period, so nothing is past. Give a shorter one, in the unit of its timestamps."
        )
    return boundaries


def make_collator(args: RewardArguments, data: DataFolder, splits: datasets.DatasetDict) -> RewardCollator:
    """The collator, with features, past rates and the boundaries between periods."""
    tokenizer = data.tokenizer
    if lacking := [name for name, rows in splits.items() if "session_start" not in rows.column_names]:
        raise ValueError(
            f"the splits {lacking} of {data.path} have no session_start: a reward model reads rows of exposures or "
            "sessions. Make them with `onerec prepare --sessions ...`."
        )
    boundaries = period_boundaries(args, {name: np.array(rows["session_start"]) for name, rows in splits.items()})
    items, users = table_features(args, data, "items"), table_features(args, data, "users")
    groups = items | {"item": np.arange(data.num_items), "user": np.arange(data.num_users)}
    if unknown := [name for name in args.rates if name not in groups]:
        raise ValueError(f"rates={unknown}: allowed are item, user and the item_categories, {sorted(groups)}.")
    if unknown := [name for name in args.context_item_features if name not in items]:
        raise ValueError(
            f"context_item_features={unknown}: they are some of item_categories and item_quantiles, {sorted(items)}."
        )
    if not 0 <= args.warm_up <= len(boundaries):
        most = f"--warm_up {len(boundaries)} at most" if len(boundaries) else "--warm_up 0"
        raise ValueError(
            f"warm_up={args.warm_up}: the log has {len(boundaries)} boundaries between its periods. Give a shorter "
            f"--period, in the unit of its timestamps, or {most}."
        )
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


def load_reward(repo: str, data: DataFolder) -> RewardModel:
    """
    A folder that `onerec reward` wrote, for the items and users of a policy's data folder.

    Raises:
        ValueError: Where the reward model was trained on other items or users.
    """
    reward = RewardModel.from_pretrained(repo)
    data.check_model(repo, reward.catalogue)
    path = Path(repo) / ARGUMENTS_NAME
    trained = json.loads(path.read_text(encoding="utf-8"))["users"] if path.is_file() else None
    if trained not in (None, data.user_fingerprint):
        raise ValueError(
            f"{repo} (a reward model) and {data.path} hold other users: prepare both from one log, with the same "
            "k_core."
        )
    return reward
