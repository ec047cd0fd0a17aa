"""`onerec sft --continue_from`: the model of yesterday on the data of today, and how the two have drifted apart."""

import copy
from typing import Any

import datasets
import numpy as np
import torch

from .. import Catalogue
from ..data import DataFolder, category_codes, category_map
from ..evaluation import calibration, evaluate
from ..item_ranker import ItemRanker
from ..recommender import Recommender
from ..semantic_ids import codebook_fingerprint
from .ending import make_recommender, some
from .model_arguments import ITEM_VECTORS, ModelArguments, set_user_features

# what a trained model brings with it
OF_THE_MODEL = (
    *("model", "model_config", "max_history", "positive", "lifelong", "event_features", "item_features"),
    *("item_vectors", "user_features", "max_categories"),
)
CALIBRATED_SLOTS = 10


def continued(args: ModelArguments, data: DataFolder) -> Recommender:
    """
    The model of `--continue_from` with the items of a data folder: those that it knows keep their semantic IDs.

    Raises:
        ValueError: For other codebooks, for items whose semantic IDs have changed, and for arguments of a new model.
    """
    repo = str(args.continue_from)
    new = ModelArguments(data=args.data)
    if given := [name for name in OF_THE_MODEL if getattr(args, name) not in (getattr(new, name), {})]:
        raise ValueError(f"continue_from={repo!r} brings its own {given}: leave them out, or train a new model.")
    old = Recommender.from_pretrained(repo, args.num_beams)
    places = check_codebooks(repo, old, data)
    collator = copy.copy(old.ranker.collator)
    collator.item_token_ids = np.asarray(data.tokenizer.encode_semantic_ids(data.catalogue.semantic_ids))
    collator.item_features = {
        name: new_features(name, values, places, data) for name, values in collator.item_features.items()
    }
    set_user_features(collator, data)
    model = grown(old.model, places, data)
    names = args.metadata or [
        name for name in next(iter(old.metadata.values()), {}) if name in data.items.column_names
    ]
    return make_recommender(ItemRanker(model, collator, args.num_beams), data, names)


def check_codebooks(repo: str, old: Recommender, data: DataFolder) -> np.ndarray:
    """The place in the model's catalogue of each item of the data, -1 for a new one; raises where codes mean something
    else there.
    """
    advice = f"Prepare the data with `onerec prepare --semantic_ids_from {repo}`."
    if old.quantizer is None:
        raise ValueError(f"{repo} has no codebooks (quantizer_config.json): name a model that `onerec sft` saved.")
    theirs, ours = codebook_fingerprint(data.quantizer), codebook_fingerprint(old.quantizer)
    catalogue, items = old.model.catalogue, data.catalogue
    if theirs != ours or items.codebook_sizes != catalogue.codebook_sizes:
        raise ValueError(
            f"{repo} was trained with the codebooks {ours} {catalogue.codebook_sizes}, {data.path} has {theirs} "
            f"{items.codebook_sizes}: the codes of the one mean nothing to the other. {advice}"
        )
    places = catalogue.index_of(items.item_ids, "ignore")
    known = np.flatnonzero(places >= 0)
    if not len(known):
        raise ValueError(f"{repo} and {data.path} have no item in common: give the data of the model's own items.")
    before, now = catalogue.semantic_ids.cpu()[places[known]], items.semantic_ids.cpu()[known]
    if (moved := (before != now).any(1)).any():
        first = items.item_ids[known[moved.numpy()][0]]
        raise ValueError(
            f"{int(moved.sum())} items of {repo} have other semantic IDs in {data.path}; the first is {first!r}. "
            f"{advice}"
        )
    return places


def new_features(name: str, old: np.ndarray, places: np.ndarray, data: DataFolder) -> np.ndarray:
    """Categories of all items of the data, numbered as in training; a value that no known item has is unknown, 0."""
    if name == ITEM_VECTORS:
        return np.arange(1, len(places) + 1)
    values, known = data.columns("items", [name])[name], places >= 0
    numbers = category_map(values)
    own = category_codes(values, numbers)
    meaning = np.zeros(len(numbers) + 1, dtype=np.int64)
    meaning[own[known]] = old[places[known]]
    return np.where(known, old[np.maximum(places, 0)], meaning[own])


def grown(model: Any, places: np.ndarray, data: DataFolder) -> Any:
    """The model with the catalogue of the data, and with a row for each of its items where it has rows of items."""
    config, state, known = copy.deepcopy(model.config), model.state_dict(), torch.from_numpy(places >= 0)
    rows = torch.from_numpy(places).clamp(min=0)
    if ITEM_VECTORS in config.context_features:
        config.context_features[ITEM_VECTORS] = len(places) + 1
    if config.model_type == "onerec_v2" and config.item_head_size:
        config.item_head_size = len(places)
    new = type(model)(config)
    for name, weight in new.state_dict().items():
        if weight.shape == state[name].shape and not name.startswith("item_head.items"):
            continue
        if name.startswith("item_head.items"):  # a new item is told by its given vector alone, until it is trained
            state[name] = torch.where(known[:, None], state[name][rows], 0.0)
        else:
            vectors, given = torch.from_numpy(data.item_embeddings), state[name][1:]
            scale = (given[rows[known]] * vectors[known]).sum() / vectors[
                known
            ].square().sum()  # as it was in training
            state[name] = torch.cat([torch.zeros_like(given[:1]), vectors * scale])
    new.load_state_dict(state)
    new.catalogue = data.catalogue
    return new.eval()


class Drift:
    """
    What has changed between a model and the data that it goes on with, for `metrics.json`.

    Args:
        args: Of the script.
        recommender: With the items of the data, before it is trained.
        data: Its folder.
    """

    def __init__(self, args: ModelArguments, recommender: Recommender, data: DataFolder):
        self.args, self.ranker, self.data = args, recommender.ranker, data
        old = Catalogue.from_pretrained(str(args.continue_from))
        self.new = old.index_of(data.catalogue.item_ids, "ignore") < 0
        self.report: dict[str, Any] = {"continued_from": str(args.continue_from), "start": args.start}
        left = len(old) - int((~self.new).sum())
        self.report["items"] = {"known": int((~self.new).sum()), "appended": int(self.new.sum()), "left": left}
        train, test = data.splits["train"], data.splits["test"]
        rows = train.with_format("arrow")[:]
        column = "history" if "targets" not in train.column_names else "targets"
        events = rows[column].combine_chunks().flatten().to_numpy()
        if column == "history" and args.start is not None:
            recent = rows["timestamp"].combine_chunks().flatten().to_numpy() >= args.start
        else:
            recent = np.ones(len(events), dtype=bool)
        now = events[recent]
        targets = np.concatenate([np.asarray(row, dtype=np.int64) for row in test["targets"]])
        self.report["unseen_share"] = {"train": float(self.new[now].mean()), "test": float(self.new[targets].mean())}
        self.report["code_usage"] = self.code_usage(events[~recent], now)
        self.test = test

    def code_usage(self, before: np.ndarray, now: np.ndarray) -> dict[str, list[float]]:
        """Per level, the share of the codes that the events use, and how far the two usages lie apart: half the sum of
        the differences of the shares, 0 is equal, 1 is nothing in common.
        """
        codes, found = self.data.catalogue.semantic_ids.long().numpy(), {}
        shares = {}
        for name, events in (("before", before), ("now", now)):
            counts = [
                np.bincount(codes[events, level], minlength=size)
                for level, size in enumerate(self.data.catalogue.codebook_sizes)
            ]
            found[f"used_{name}"] = [float((each > 0).mean()) for each in counts]
            shares[name] = [each / max(each.sum(), 1) for each in counts]
        if len(before) and len(now):
            pairs = zip(shares["before"], shares["now"])
            found["distance"] = [float(np.abs(left - right).sum() / 2) for left, right in pairs]
        return found

    def measure(self, when: str) -> None:
        """How the model does on the time that follows, the test split; `when`: before or after the training."""
        rows = some(self.test.shuffle(seed=0), self.args.eval_users, "eval_users")
        training = self.ranker.model.training
        self.ranker.model.eval()
        metrics = evaluate(self.ranker, rows, num_items=len(self.new), ks=(10,), progress=False).metrics
        self.report.setdefault("next_day", {})[when] = metrics
        self.report.setdefault("calibration", {})[when] = self.calibrated(rows)
        self.ranker.model.train(training)

    @torch.no_grad()
    def calibrated(self, rows: datasets.Dataset) -> dict[str, float]:
        """Whether the probabilities of the first items of each list are how often they are the next item."""
        labels, probabilities = [], []
        for start in range(0, len(rows), 256):
            batch = [rows[i] for i in range(start, min(start + 256, len(rows)))]
            found = self.ranker.search(batch, CALIBRATED_SLOTS)
            items = found.items.cpu().numpy()
            labels.append(items == np.array([row["targets"][0] for row in batch])[:, None])
            probabilities.append(found.scores.float().exp().cpu().numpy() * (items >= 0))
        return calibration(np.concatenate(labels).ravel(), np.concatenate(probabilities).ravel().clip(0, 1))
