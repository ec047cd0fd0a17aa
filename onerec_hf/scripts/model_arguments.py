"""What the recipes that train a model share: its arguments, its config, its collator, and what is saved beside it."""

import json
import math
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import yaml
from transformers import AutoConfig, PreTrainedConfig

from ..collators import OneRecCollator, PathwayCollator, SessionCollator
from ..data import (
    DataFolder,
    category_codes,
    category_map,
    change_rows,
    count_lengths,
    first_rows,
    stream_split,
    target_rows,
)
from ..recommender import Recommender
from ..trainers import OneRecSFTConfig
from .checks import event_features, refuse_unknown
from .parser import config_path

ITEM_VECTORS = "item_vectors"  # name of the context feature
SMALL = "models/small.yaml"
ON_DISK = "Training rows stay on disk, in the cache of `datasets`, and are looked up while training."


@dataclass
class ModelArguments:
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote."})
    model: str = field(default="{}", metadata={"help": "Arguments of the model's config, YAML mapping or JSON."})
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "YAML file of such arguments, as models/onerec_v2_1b.yaml; --model overrides it. Where neither "
            "names a hidden_size: models/small.yaml."
        },
    )
    max_history: int = field(default=50, metadata={"help": "Items of context (onerec_v1: see its pathway lengths)."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read training rows while training, a part of the split in memory at a time."},
    )
    continue_from: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub repository of a trained model that goes on with this data, prepared with "
            "--semantic_ids_from of the same model."
        },
    )
    start: float | None = field(
        default=None,
        metadata={"help": "Train on targets from this time on (unit of the timestamps); older events are context."},
    )
    keep_optimizer: bool = field(
        default=False,
        metadata={"help": "Save the state of the optimizer with the model, and start from that of --continue_from."},
    )
    newest_impressions: bool = field(
        default=False,
        metadata={"help": "onerec_v2: a row per event, by time, each seen once, in place of all targets in one pass."},
    )
    positive: str = field(
        default="{}",
        metadata={"help": 'onerec_v1: what positive feedback is, columns and thresholds, e.g. {"is_like": 1}.'},
    )
    lifelong: str = field(default="history", metadata={"help": "onerec_v1: list column of the lifelong pathway."})
    event_features: str = field(
        default="{}", metadata={"help": 'Event columns as context features, e.g. {"play_time_ms": ["log", 24]}.'}
    )
    item_features: list[str] = field(
        default_factory=list, metadata={"help": "Columns of items.parquet as context features."}
    )
    item_vectors: bool = field(
        default=False,
        metadata={"help": "onerec_v2: item_embeddings.safetensors as a fixed context feature, beside the codes."},
    )
    user_features: list[str] = field(default_factory=list, metadata={"help": "Columns of users.parquet."})
    max_categories: int | None = field(
        default=None, metadata={"help": "Values kept per item or user feature, the rarer ones share 0; default all."}
    )
    metadata: list[str] = field(
        default_factory=list, metadata={"help": "Columns of items.parquet to return with an item."}
    )
    score: bool = field(
        default=True,
        metadata={"help": "Recommend for validation and test users and score it; false: `onerec score` later."},
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
    eval_users: int | None = field(
        default=None, metadata={"help": "Validation users that are generated for; default all."}
    )


def mapping(text: str | dict) -> dict:
    """An argument that is JSON on the command line and a mapping in a YAML file."""
    try:
        found = json.loads(text) if isinstance(text, str) else text
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{text!r} is no JSON ({error}): write it like '{{\"name\": 1}}', with double quotes."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{text!r}: a mapping is needed, like '{{\"name\": 1}}'.")
    return found


def model_path(name: str) -> str:
    """A Hub name or folder as it is; `package:NAME/FOLDER` are weights that an installed package carries."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    if (spec := find_spec(package)) is None or spec.origin is None:
        raise ValueError(f"{name}: no package {package!r} is installed: install it, or give a Hub name or a folder.")
    return str(Path(spec.origin).parent / folder)


def make_config(args: ModelArguments, data: DataFolder, collator: OneRecCollator | None = None) -> PreTrainedConfig:
    """The config that `--model_config` and `--model` describe, with the data folder's codebooks and the collator's
    features.
    """
    settings: dict[str, Any] = {"model_type": "onerec_v2"}
    # the configs' own defaults are models of the papers, of a billion parameters: whoever wants one names it
    preset = args.model_config or ("" if "hidden_size" in mapping(args.model) else SMALL)
    if preset:
        settings |= yaml.safe_load(Path(config_path(preset)).read_text(encoding="utf-8"))
    # a preset gives widths of features that the data may lack; those that --model names must be there
    widths = settings.pop("feature_embed_dims", {})
    settings |= mapping(args.model)
    own_widths = settings.pop("feature_embed_dims", {})
    if collator is not None:
        context, user = collator.context_feature_sizes, collator.user_feature_sizes
        widths = {name: width for name, width in widths.items() if name in {*context, *user}} | own_widths
        settings |= {"context_features": context, "user_features": user}
        if args.item_vectors:
            widths |= {ITEM_VECTORS: data.item_embeddings.shape[1]}
            settings["fixed_context_features"] = [ITEM_VECTORS]
        settings["feature_embed_dims"] = widths
    if settings.get("item_head_dim"):
        settings["item_head_size"] = data.num_items
    config = AutoConfig.for_model(**settings | {"codebook_sizes": data.tokenizer.codebook_sizes})
    refuse_unknown(settings, type(config))
    return config


def item_vectors(data: DataFolder) -> torch.Tensor:
    """The item embeddings that the semantic IDs were made from, (N, D), at unit variance, as what comes out of a
    norm.
    """
    vectors = torch.from_numpy(data.item_embeddings)
    return vectors / vectors.std()


def make_collator(args: ModelArguments, data: DataFolder) -> OneRecCollator:
    """The collator of the model's kind, with the features that were asked for."""

    def categories(table: str, names: list[str]) -> tuple[dict, dict]:
        columns = data.columns(table, names)
        known = {name: category_map(values, args.max_categories) for name, values in columns.items()}
        return {name: category_codes(values, known[name]) for name, values in columns.items()}, known

    config, tokenizer = make_config(args, data), data.tokenizer
    item_features, _ = categories("items", args.item_features)
    user_features, user_categories = categories("users", args.user_features)
    if args.item_vectors:
        if config.model_type != "onerec_v2":
            raise ValueError(f"item_vectors is for onerec_v2, the model is {config.model_type}.")
        item_features[ITEM_VECTORS] = np.arange(1, data.num_items + 1)
    features: dict[str, Any] = {
        "event_features": event_features(mapping(args.event_features)),
        "item_features": item_features,
        "user_features": user_features,
        "user_categories": user_categories,
    }
    item_token_ids = tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids)
    if config.model_type == "onerec_v1":
        lengths = {f"{name}_length": length for name, length in config.pathway_lengths.items()}
        pathways: dict[str, Any] = {"positive": mapping(args.positive), "lifelong": args.lifelong, **lengths}
        return PathwayCollator(item_token_ids, **pathways, **features)
    collator_class = SessionCollator if config.session_wise else OneRecCollator
    return collator_class(item_token_ids, args.max_history, **features)


def training_rows(
    train: datasets.Dataset,
    config: PreTrainedConfig,
    max_history: int,
    newest_impressions: bool = False,
    start: float | None = None,
) -> datasets.Dataset:
    """OneRec-V2 takes every target of a user in one pass; an encoder needs one row per target, unless the rows are
    sessions.

    `newest_impressions` is what OneRec-V2's section 2.1 trains on: a row per event, whose loss is that of the event
    alone, of all users by time, so that no step knows what comes after it. With `start`, a row per event from then on.
    """
    by_target = newest_impressions or start is not None or config.model_type != "onerec_v2"
    if "targets" not in train.column_names and by_target:
        if config.model_type == "onerec_v1":
            max_history = max(config.pathway_lengths.values())
        train = change_rows(train, partial(target_rows, max_history=max_history))
    if newest_impressions:
        train = train.sort("session_start")
    if start is not None:
        if "session_start" not in train.column_names:
            raise ValueError(f"start={start}: the rows have no times, only {train.column_names}. Leave it out.")
        times = np.asarray(train.with_format("numpy")["session_start"][:])
        if not (times >= start).any():
            raise ValueError(f"start={start}: no target is so late; they reach from {times.min()} to {times.max()}.")
        train = train.select(np.flatnonzero(times >= start))
    least = 1 if "targets" in train.column_names else 2
    return train.select(np.flatnonzero(np.asarray(train.with_format("numpy")["length"][:]) >= least))


def streamed_rows(
    args: ModelArguments, config: PreTrainedConfig, training: OneRecSFTConfig, max_history: int
) -> tuple:
    """
    What [`training_rows`] makes, as a stream without end, and a few of its rows. Sets `max_steps`, which a stream
    needs, to what `num_train_epochs` says.
    """
    if args.newest_impressions:
        raise ValueError(
            "streaming reads users in random order, newest_impressions all events by time: leave one out."
        )
    if args.start is not None:
        raise ValueError(
            "streaming reads users in random order and whole; start needs the rows of events: leave one out."
        )
    if training.train_sampling_strategy == "batch_rebalance":
        raise ValueError(
            "batch_rebalance draws from all rows, a stream from a few of them: leave out train_sampling_strategy "
            "(group_by_length, which streaming knows) or streaming."
        )
    sample = first_rows(args.data, "train")
    per_target = "targets" not in sample.column_names and config.model_type != "onerec_v2"
    least = 1 if "targets" in sample.column_names else 2
    count = count_lengths(
        args.data,
        "train",
        lambda lengths: int((lengths - 1).clip(min=0).sum() if per_target else (lengths >= least).sum()),
    )
    step = training.train_batch_size * training.gradient_accumulation_steps
    if training.max_steps <= 0:
        training.max_steps = math.ceil(training.num_train_epochs * count / (step * training.world_size))
    rows = partial(training_rows, config=config, max_history=max_history)
    grouped = training.train_sampling_strategy == "group_by_length"
    seed = training.seed if training.data_seed is None else training.data_seed
    stream = stream_split(
        args.data,
        rows_of=rows,
        seed=seed,
        group_size=step * training.world_size if grouped else None,
        num_nodes=training.world_size,
    )
    return stream, rows(sample)


def check_newest_impressions(args: ModelArguments, training: OneRecSFTConfig, model_type: str) -> None:
    """Sets the order in which newest impressions are read; raises where the run would read them twice, or not alone.

    Raises:
        ValueError: Another model than OneRec-V2, or more than one epoch.
    """
    if not args.newest_impressions:
        return
    if model_type != "onerec_v2":
        raise ValueError(f"newest_impressions is for onerec_v2, the model is {model_type}: leave it out.")
    if training.max_steps <= 0 and training.num_train_epochs != 1:
        raise ValueError(
            f"newest_impressions with num_train_epochs={training.num_train_epochs}: every impression is read once, in "
            "the order of time. Set num_train_epochs to 1."
        )
    training.train_sampling_strategy = "sequential"


def load_policy(folder: str, data: DataFolder, num_beams: int, rerank: bool = False) -> Recommender:
    """A trained model with all that is saved with it (`rerank`: its re-ranker, too), and the categories of the data
    folder's users, which are in no repository.
    """
    recommender = Recommender.from_pretrained(folder, num_beams)
    if not rerank:  # its weights were fitted to this model: they say nothing of one that is trained on from it
        recommender.ranker.reranker = None
    data.check_model(folder, recommender.model.catalogue)
    set_user_features(recommender.ranker.collator, data)
    return recommender


def set_user_features(collator: OneRecCollator, data: DataFolder) -> None:
    """The categories of the data folder's users, numbered as they were when the collator was made."""
    if sizes := collator.user_feature_sizes:
        users = data.columns("users", list(sizes))
        known = {name: category_map(users[name], size) for name, size in sizes.items()} | collator.user_categories
        collator.user_features = {name: category_codes(users[name], known[name]) for name in sizes}
