"""Reinforcement learning of a trained model by GRPO, ECPO or GBPO, from rollouts, from logged feedback, or from both.

    onerec grpo --policy outputs/mymodel --data outputs/mydata --rewards hit format --rollout sample \\
        --num_generations 16 --per_device_train_batch_size 64 --sft_weight 1 --output_dir outputs/mymodel_ecpo
    onerec grpo --config mydata/grpo.yaml --policy outputs/mymodel --data outputs/mydata \\
        --exposures logs.parquet --output_dir outputs/mymodel_gbpo

`--exposures` holds **every** impression with play time, duration, dislike and what counts as watched; columns
`log_prob_1` to `log_prob_L`, if any, are the log-probabilities of the codes at exposure (null or above 0: not known).
The reward `model` is that of `--reward FOLDER`, which `onerec reward` wrote; rewards of your own: `main(args,
training, [...])` from Python. Every field of `OneRecGRPOConfig` works on the command line and in a YAML file;
`--lora_r 8` trains an adapter and writes the merged model. Writes a repository as `onerec sft` does.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, set_seed
from transformers.utils import logging

from .. import Catalogue
from ..collators import OneRecCollator
from ..data import (
    DataFolder,
    Interactions,
    change_rows,
    load_interactions,
    match_ids,
    reaches,
    read_table,
    target_rows,
)
from ..rewards import FormatReward, HitReward, IndustrialReward
from ..rewards.functions import RewardFunction
from ..trainers import OneRecGRPOConfig, OneRecGRPOTrainer, feedback_exposures, rejection_sample
from .checks import check_beams, check_training, train_checked
from .ending import finish_policy, some
from .grpo_held_out import HeldOut, has_times
from .model_arguments import ON_DISK, load_policy, mapping, training_rows
from .parser import ScriptParser
from .reward_arguments import load_reward

logger = logging.get_logger(__name__)


@dataclass
class RLArguments:
    policy: str = field(metadata={"help": "Folder of the trained model: start, and KL reference."})
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote."})
    rewards: list[str] = field(
        default_factory=lambda: ["hit"],
        metadata={
            "help": "hit (a true target), model (--reward), format (legality of K random samples, format_top: best)."
        },
    )
    reward: str | None = field(
        default=None, metadata={"help": "Folder that `onerec reward` wrote, from the same log."}
    )
    industrial: str = field(
        default="{}",
        metadata={
            "help": "Scale hit and model down for a class of items while it takes more than its share: "
            '{"column": "is_ad", "quota": 0.1, "factor": 0.5}, a 0/1 column of items.parquet.'
        },
    )
    format_samples: int = field(default=5, metadata={"help": "K of the format reward."})
    exposures: str | None = field(
        default=None, metadata={"help": "Table of all impressions (parquet, CSV, JSONL, ...)."}
    )
    columns: str = field(default="{}", metadata={"help": "Our names to yours in it, for user_id, item_id, timestamp."})
    watched: str = field(default='{"long_view": 1}', metadata={"help": "What fills histories: columns, thresholds."})
    request: str | None = field(default="request_id", metadata={"help": "Impressions of a request share a context."})
    start: float | None = field(default=None, metadata={"help": "Train on impressions from this time on."})
    end: float | None = field(
        default=None,
        metadata={
            "help": "And before this one: the start of the validation. Impressions at or after a held-out event of "
            "--data are left out in any case."
        },
    )
    ties: Literal["strict", "inclusive"] = field(default="strict", metadata={"help": "At the top quartile's edge."})
    sft: Literal["train", "rsft"] = field(
        default="train", metadata={"help": "Rows of the supervised loss: the split, or the better half of exposures."}
    )
    streaming: bool = field(default=False, metadata={"help": ON_DISK})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default trains all weights."})
    score: bool = field(
        default=True,
        metadata={"help": "Recommend for validation and test users and score it; false: `onerec score` later."},
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the search that scores the model."})
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})


def load_exposures(
    args: RLArguments,
    catalogue: Catalogue,
    collator: OneRecCollator,
    splits: Mapping[str, datasets.Dataset] | None = None,
) -> datasets.Dataset:
    """
    Requests with duration-aware advantages; `user` is -1 for users that the data folder does not have.

    Args:
        splits: Of the data folder: exposures at or after a held-out event of their user are left out, counted in a
            warning. None: `start` and `end` alone choose.

    Raises:
        ValueError: Columns that the table lacks, times that cannot be compared with those of the splits, or no
            exposure that may be trained on.
    """
    columns, watched, levels = mapping(args.columns), mapping(args.watched), catalogue.num_levels
    ids = ["user_id", "item_id", *([args.request] if args.request else [])]
    table = read_table(args.exposures, ids=[columns.get(name, name) for name in ids])
    names = [name for name in (f"log_prob_{level + 1}" for level in range(levels)) if name in table.column_names]
    for name in names:
        values = table[name].to_numpy().astype(float)
        table = table.set_column(table.column_names.index(name), name, [np.where(np.isnan(values), 1.0, values)])
    features = dict.fromkeys([*collator.event_features, *collator.settings.get("positive", ())])
    features.pop("timestamp", None)  # every row has it
    kept = dict.fromkeys([*watched, *features, "play_time_ms", "duration_ms", "is_hate", *ids[2:]])
    log = load_interactions(table, columns=columns, feedback=[*kept, *names])
    user_ids = np.asarray(datasets.Dataset.from_parquet(str(Path(args.data) / "users.parquet"))["user_id"])
    log = log.where(allowed_exposures(args, log, catalogue, user_ids, splits))
    log_probs = np.stack([log.feedback.pop(name) for name in names], axis=1) if names else None
    rows = feedback_exposures(
        log,
        catalogue,
        positive=watched,
        request=args.request,
        start=args.start,
        log_probs=None if log_probs is None else np.where(log_probs > 0, np.nan, log_probs),
        user_ids=user_ids,
        max_history=collator.max_history,
        ties=args.ties,
    )
    read = {"user", "history", "timestamp", "targets", "advantage", "play_time", "log_probs", *features}
    return rows.select_columns([name for name in rows.column_names if name in read])  # the rest would only cost time


def allowed_exposures(
    args: RLArguments,
    log: Interactions,
    catalogue: Catalogue,
    user_ids: np.ndarray,
    splits: Mapping[str, datasets.Dataset] | None,
) -> np.ndarray:
    """Which exposures are before `end` and before what the splits hold out; raises where none is."""
    time = log.timestamp
    first, last = time.min(), time.max()
    before = np.ones(len(log), dtype=bool) if args.end is None else time < args.end
    if not before.any():
        raise ValueError(
            f"end={args.end:.15g} leaves no exposure: those of {args.exposures} reach from {first} to {last}. Give a "
            "time among them, in their unit."
        )
    if args.end is not None and before.all():
        logger.warning(
            f"end={args.end:.15g} leaves out no exposure: those of {args.exposures} reach from {first} to {last}. Is "
            "it in their unit?"
        )
    if splits is None:
        return before
    if args.end is not None and not has_times(splits):
        logger.warning(f"the rows of {args.data} have no times: that end={args.end:.15g} is right is not checked.")
        return before
    held_out = HeldOut(splits, len(user_ids), catalogue.num_items, args.data)
    user = match_ids(log.user_ids, user_ids)[log.user_index]
    item = match_ids(log.item_ids, catalogue.item_ids)[log.item_index]
    watched = reaches(log.feedback, mapping(args.watched))
    kept = before & held_out.allowed(user, item, time, watched, args.start, args.end)
    if dropped := int(before.sum() - kept.sum()):
        logger.warning(
            f"{dropped:,} of {int(before.sum()):,} exposures are left out: they are at or after an event that "
            f"{args.data} holds out for validation or test."
        )
    if not kept.any():
        raise ValueError(
            f"no exposure of {args.exposures} is before the events that {args.data} holds out: nothing is left to "
            "train on. Give the impressions from before them, too; for newer ones alone, --start after everything "
            "that is held out."
        )
    return kept


def judged(exposures: datasets.Dataset) -> datasets.Dataset:
    """
    The requests with a verdict on an exposure: what a loss of logged feedback is made of.

    Raises:
        ValueError: There is none, and nothing would be trained.
    """
    rows = exposures.filter(lambda row: any(row["advantage"]))
    if not len(rows):
        raise ValueError(
            f"none of {len(exposures):,} requests has an exposure with a verdict: nobody disliked one (is_hate), and "
            "no play time is above the top quarter's edge among its user's earlier plays of videos of similar length. "
            "Where users have few plays, many of them tie at that edge: count them (--ties inclusive), give a longer "
            "log, or train from rollouts (--logged_weight 0)."
        )
    return rows


def make_rewards(args: RLArguments, data: DataFolder, policy: Any, num_generations: int) -> list[RewardFunction]:
    """The reward functions that were named."""
    if ("model" in args.rewards) != (args.reward is not None):
        raise ValueError(
            f"rewards={args.rewards} and reward={args.reward!r}: `model` in one needs a folder in the other."
        )

    token_ids = data.tokenizer.encode_semantic_ids(data.catalogue.semantic_ids)

    def hit_reward(targets, completion_ids, **columns):
        own = [token_ids[list(items)].tolist() for items in targets]
        return HitReward("targets", policy.catalogue)(completion_ids=completion_ids, targets=own)

    known: dict[str, Callable[[], RewardFunction]] = {
        "hit": lambda: hit_reward,
        "model": lambda: load_reward(str(args.reward), data),
        "format": lambda: FormatReward(policy.catalogue, num_generations, args.format_samples, "random"),
        "format_top": lambda: FormatReward(policy.catalogue, num_generations, args.format_samples, "top"),
    }
    if unknown := [name for name in args.rewards if name not in known]:
        raise ValueError(f"rewards={unknown}: allowed are {sorted(known)}.")
    rewards = {name: known[name]() for name in args.rewards}
    if settings := mapping(args.industrial):
        for name in ("hit", "model"):
            if name in rewards:
                rewards[name] = industrial_reward(name, rewards[name], settings, data, policy.catalogue)
    return list(rewards.values())


def industrial_reward(
    name: str, reward: RewardFunction, settings: dict, data: DataFolder, catalogue: Catalogue
) -> IndustrialReward:
    """A reward that is scaled down for the items that a column marks; raises where it marks none, or is no column of 0
    and 1.
    """
    if set(settings) != {"column", "quota", "factor"}:
        raise ValueError(f"industrial={settings}: give column, quota and factor, and nothing else.")
    column = settings["column"]
    values = data.columns("items", [column])[column]
    if not set(values) <= {0, 1} or not any(values):
        raise ValueError(
            f"industrial: {column!r} of items.parquet must be 0 or 1 for every item, and 1 for some; it has values "
            f"such as {list(dict.fromkeys(values))[:4]}."
        )
    scaled = IndustrialReward(reward, catalogue, torch.tensor(values).bool(), settings["quota"], settings["factor"])
    scaled.__name__ = f"industrial_{name}"
    return scaled


def main(args: RLArguments, training: OneRecGRPOConfig, reward_funcs: list | None = None) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    if training.logged_weight == 1 and args.reward:
        raise ValueError(f"reward={args.reward!r} would score nothing: logged_weight=1 leaves no rollouts. Lower it.")
    if args.exposures is None and args.sft == "rsft" and training.sft_weight > 0:
        raise ValueError("sft='rsft' takes the better half of the exposures: give --exposures, or leave it out.")
    check_training(training)
    check_beams(args.num_beams)
    set_seed(training.seed)
    data = DataFolder(args.data)
    recommender = load_policy(args.policy, data, args.num_beams)
    model, collator, catalogue = recommender.model, recommender.ranker.collator, recommender.model.catalogue
    splits = data.splits_on_disk() if args.streaming else data.splits
    train, test = splits["train"], some(splits["test"], args.test_users, "test_users")
    exposures = load_exposures(args, catalogue, collator, splits) if args.exposures else None
    supervised = None
    if training.sft_weight > 0:
        rsft = args.sft == "rsft"
        supervised = rejection_sample(exposures) if rsft else training_rows(train, model.config, collator.max_history)
    logged = judged(exposures) if training.logged_weight > 0 and exposures else None
    if reward_funcs is None and training.logged_weight < 1:
        reward_funcs = make_rewards(args, data, model, training.num_generations)
    users = train
    if "targets" not in train.column_names:
        users = change_rows(train, partial(target_rows, max_history=collator.max_history))
    trainer = OneRecGRPOTrainer(
        model,
        reward_funcs,
        training,
        users,
        processing_class=AutoTokenizer.from_pretrained(args.policy),
        data_collator=collator,
        logged_dataset=logged,
        sft_dataset=supervised,
        peft_config=LoraConfig(r=args.lora_r, task_type="CAUSAL_LM") if args.lora_r else None,
    )
    report = train_checked(trainer, recommender, train, splits, args.score)
    return finish_policy(trainer, recommender, data, test if args.score else None, report)


def run(argv: list[str] | None = None) -> None:
    """`onerec grpo`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("grpo", __doc__, [RLArguments, OneRecGRPOConfig]).parse(argv))


if __name__ == "__main__":
    run()
