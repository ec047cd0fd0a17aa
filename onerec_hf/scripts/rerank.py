"""Fits a re-ranker of a trained model and baselines on the validation split, and saves it with the model.

    onerec rerank --model outputs/mymodel --data outputs/mydata --scorers outputs/cooccurrence outputs/sasrec \\
        --output outputs/reranked

The search and each scorer propose items; a weighted sum of what all of them say orders these. The weights are fitted
on validation users, once for lists where seen items may come back and once for lists without them. Without
`--output` they are saved in the model's own folder. `Recommender.from_pretrained` uses what is saved;
`recommend(..., rerank=False)` is the search alone. The test metrics of the whole replace those of the search alone,
which stay in `metrics.json` under `search_alone`; `reranker` there holds weights, the share of targets among the
candidates and what each scorer adds. A model that has an item head, or reads item vectors, needs no other scorers:
these are used as such. Without `--model`, the scorers alone are combined in the same way: what a
re-ranked model must beat; only `metrics.json` and the predictions are written.

`--value play_time_ms` makes lists of what is worth more: each item's mean of an event column over the training events
(of rows of sessions, over their targets), or a column of the item table such as a price, joins the sum as its
logarithm. The weight is the largest of 0, 1/8, 1/4, 1/2 and 1 with which these validation users have no lower
recall@10 than without, or `--value_weight`; with 1 the order is by probability times value.
"""

import json
import math
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from tqdm.auto import tqdm

from ..baselines import SCORERS, EmbeddingKNN
from ..collators.histories import allowed_items
from ..data import DataFolder
from ..data.data_folder import id_fingerprint
from ..item_ranker import ItemRanker
from ..models.catalogue import Catalogue
from ..recommender import Recommender
from ..reranker import ITEM_VECTORS, KINDS, VALUE, Reranker, item_neighbours
from .baseline import BASELINES, ITEM_FINGERPRINT, check_same_items
from .checks import check_beams, check_output, check_splits, unique_names
from .ending import remove_earlier_results, score, score_model, some, write_metrics
from .item_values import check_value, item_values
from .model_arguments import load_policy
from .parser import ScriptParser

VALUE_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0)
SCORER_NAMES = [name for name, kind in BASELINES.items() if kind.__name__ in SCORERS]


@dataclass
class RerankArguments:
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote, of the same log."})
    model: str | None = field(
        default=None, metadata={"help": "Folder that `onerec sft`, `dpo` or `grpo` wrote; none: the scorers alone."}
    )
    scorers: list[str] = field(
        default_factory=list, metadata={"help": f"Folders of `onerec baseline` ({', '.join(SCORER_NAMES)})."}
    )
    output: str | None = field(
        default=None, metadata={"help": "Folder for a copy of the model with its re-ranker; default the model's own."}
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
    num_candidates: int = field(default=50, metadata={"help": "What each scorer adds to the candidates."})
    fit_users: int | None = field(default=8000, metadata={"help": "Validation users whose choices fit the weights."})
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})
    batch_size: int = field(default=64, metadata={"help": "Users that are scored together."})
    seed: int = field(default=0, metadata={"help": "Of the order of equal scores."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, cpu; default the processor."})
    value: str | None = field(
        default=None, metadata={"help": "What a chosen item is worth: an event column, or one of the item table."}
    )
    value_weight: float | None = field(
        default=None, metadata={"help": "Of the logarithm of the value; default chosen on the validation split."}
    )
    item_vectors: bool = field(
        default=True,
        metadata={"help": "Neighbours by the item vectors that the model reads are a scorer, if none is given."},
    )


class ScorersAlone:
    """What ranks without a model: the scorers propose, a [`Reranker`] orders."""

    def __init__(self, reranker: Reranker, catalogue: Catalogue):
        self.reranker, self.catalogue = reranker, catalogue

    def recommend(self, examples: dict[str, list], k: int, exclude_seen: bool = False) -> np.ndarray:
        """As `ItemRanker.recommend`."""
        rows = [dict(zip(examples, values)) for values in zip(*examples.values())]
        kind = "masked" if exclude_seen else "kept"
        return self.reranker.rank(*self.candidates(rows, self.reranker, exclude_seen), k, kind).items.numpy()

    def candidates(
        self, rows: list[dict], reranker: Reranker, exclude_seen: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ItemRanker.candidates`."""
        histories = [row["history"] for row in rows]
        allowed = allowed_items(self.catalogue, histories, exclude_seen, None, None)
        return reranker.candidates(None, histories, self.catalogue, allowed)


def load_scorers(folders: list[str], data: DataFolder) -> dict[str, Any]:
    """Baselines of the items of a data folder, by the names of their folders."""
    scorers, reports = {}, {}
    for name, folder in zip(unique_names("", [Path(folder) for folder in folders]), map(Path, folders)):
        path = folder / "metrics.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kind = report.get("arguments", {}).get("name")
        if kind not in SCORER_NAMES or not (folder / "model" / "config.json").is_file():
            raise ValueError(
                f"{folder} holds no baseline that can score items: give folders of `onerec baseline --name` "
                f"{', '.join(SCORER_NAMES)}."
            )
        reports[folder] = report
        scorers[name.replace("/", "-")] = BASELINES[kind].from_pretrained(folder / "model")
    check_same_items(reports, data.items["item_id"][:], str(data.path))
    return scorers


def choose_value_weight(
    args: RerankArguments, reranker: Reranker, items: torch.Tensor, features: torch.Tensor, targets: list, kind: str
) -> dict:
    """Sets the weight of the items' value; returns what was tried, and on which grounds."""
    weights, tried = reranker.weights[kind], {}
    given = None if args.value_weight is None else float(args.value_weight)
    for weight in VALUE_WEIGHTS if given is None else (0.0, given):
        weights[VALUE] = weight
        lists = reranker.rank(items, features, 10, kind).items
        places = (items[:, None, :] == lists[:, :, None]).int().argmax(2)
        values = features[:, :, -1].gather(1, places).exp()[lists >= 0]
        tried[weight] = {"recall@10": recall(lists.tolist(), targets), "mean value": float(values.mean())}
    least = tried[0.0]["recall@10"]
    fine = [weight for weight, own in tried.items() if own["recall@10"] >= least]
    weights[VALUE] = max(fine) if given is None else given
    return {"column": args.value, "weight": weights[VALUE], "validation": {str(w): own for w, own in tried.items()}}


def recall(lists: list, targets: list) -> float:
    """The share of a user's targets that their list holds, a mean over users."""
    return float(np.mean([len(set(one) & set(best)) / len(set(one)) for one, best in zip(targets, lists)]))


def collect(
    ranker: ItemRanker | ScorersAlone, reranker: Reranker, split: datasets.Dataset, kind: str, batch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates (U, C) and features (U, C, F) of every user of a split."""
    parts = []
    for start in tqdm(range(0, len(split), batch_size), desc=f"candidates, {kind}"):
        rows = list(split.select(range(start, min(start + batch_size, len(split)))))
        parts.append(ranker.candidates(rows, reranker, exclude_seen=kind == "masked"))
    width = max(items.shape[1] for items, _ in parts)
    pad = torch.nn.functional.pad
    items = torch.cat([pad(items, (0, width - items.shape[1]), value=-1) for items, _ in parts])
    return items, torch.cat([pad(own, (0, 0, 0, width - own.shape[1])) for _, own in parts])


def ablation(reranker: Reranker, items: torch.Tensor, features: torch.Tensor, targets: list, kind: str) -> dict:
    """recall@10 of half of the users by weights fitted on the other half: all parts, and without each of them."""
    half = torch.arange(len(items)) % 2 == 0
    taught, judged = ([targets[i] for i in rows.nonzero().flatten()] for rows in (half, ~half))
    settings: dict[str, Any] = {"item_head": reranker.item_head, "search": reranker.search}
    trial, found = Reranker(reranker.scorers, **settings, item_values=reranker.item_values), {}
    for part in ("", *reranker.parts):
        own = features.clone()
        own[:, :, [i for i, name in enumerate(reranker.features) if name in (part, f"{part}, of the best")]] = 0.0
        trial.fit(items[half], own[half], taught, kind)
        lists = trial.rank(items[~half], own[~half], 10, kind).items.tolist()
        found[f"without {part}" if part else "all"] = recall(lists, judged)
    return found


def check(args: RerankArguments) -> None:
    """What can be said before the model and its scorers are there."""
    check_beams(args.num_beams)
    if args.model is None and not (args.scorers and args.output):
        raise ValueError(
            f"model=None, scorers={args.scorers}, output={args.output!r}: without a model, give scorers and an output."
        )
    check_output(str(args.output or args.model), replaces=args.output is not None)
    if args.value_weight is not None and (args.value is None or not 0 <= args.value_weight < math.inf):
        raise ValueError(f"value_weight={args.value_weight} and value={args.value!r}: 0 or more, of a value.")
    if args.num_candidates < 1:
        raise ValueError(f"num_candidates={args.num_candidates}: at least 1.")
    if args.value is not None:
        check_value(DataFolder(args.data), args.value)


def copy_model(args: RerankArguments) -> None:
    """The model to `output`, without what belongs to its run."""
    output, model = Path(str(args.output)), Path(str(args.model))
    if not (output.exists() and output.samefile(model)):
        remove_earlier_results(output)
        of_the_run = shutil.ignore_patterns("checkpoint-*", "command.json", "metrics.json")
        shutil.copytree(model, output, ignore=of_the_run, dirs_exist_ok=True)


def score_alone(args: RerankArguments, recommender: Recommender, test: datasets.Dataset, output: Path) -> dict:
    """The report of the model's training, and under `search_alone` the metrics without a re-ranker."""
    path = Path(str(args.model)) / "metrics.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    alone = report.get("search_alone", {}) if "reranker" in report else report
    if not {"test", "test_exclude_seen"} <= alone.keys() or alone["test"]["num_users"] != len(test):
        alone = score_model(recommender.ranker, test, output, args.seed)  # of the same users as the whole
    return report | {"search_alone": {name: alone[name] for name in ("test", "test_exclude_seen")}}


def fit(args: RerankArguments, ranker: ItemRanker | ScorersAlone, reranker: Reranker, data: DataFolder) -> dict:
    """Fits the weights of both kinds; returns them with what they were fitted on."""
    users = some(data.splits["validation"].shuffle(seed=0), args.fit_users, "fit_users")
    fitted: dict[str, Any] = {"scorers": args.scorers, "fit_users": len(users)}
    start = time.perf_counter()
    for kind in KINDS:
        items, features = collect(ranker, reranker, users, kind, args.batch_size)
        targets = users["targets"][:]
        weights = reranker.fit(items, features, targets, kind)
        among = (items[:, :, None] == torch.tensor([own[0] for own in targets])[:, None, None]).any(2).any(1)
        fitted[kind] = {"weights": weights, "first targets among the candidates": float(among.float().mean())}
        fitted[kind]["recall@10 of half of the users"] = ablation(reranker, items, features, targets, kind)
        if reranker.item_values is not None:
            fitted[kind][VALUE] = choose_value_weight(args, reranker, items, features, targets, kind)
    fitted["seconds"] = time.perf_counter() - start
    return fitted


def main(args: RerankArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    check(args)
    output, data = Path(str(args.output or args.model)), DataFolder(args.data)
    check_splits(data.splits)
    test = some(data.splits["test"], args.test_users, "test_users")
    scorers = load_scorers(args.scorers, data)
    settings: dict[str, Any] = {"num_candidates": args.num_candidates}
    if args.value is not None:
        settings["item_values"] = item_values(data, args.value)
    if args.model is None:
        output.mkdir(parents=True, exist_ok=True)
        remove_earlier_results(output)
        reranker = Reranker(scorers, **settings, search=False)
        alone = ScorersAlone(reranker, data.catalogue)
        items = {"num_items": data.num_items, ITEM_FINGERPRINT: id_fingerprint(data.items["item_id"][:])}
        report: dict[str, Any] = items | {"reranker": fit(args, alone, reranker, data)}
        report["fit_seconds"] = report["reranker"]["seconds"]
        report |= score(alone, test, data.num_items, output, args.seed)
        write_metrics(output, report)
        return report
    recommender = load_policy(args.model, data, args.num_beams)
    recommender.model.to(args.device)
    head, own = bool(getattr(recommender.model, "item_head", None)), item_neighbours(recommender.model)
    given = any(isinstance(scorer, EmbeddingKNN) for scorer in scorers.values())
    if own is not None and args.item_vectors and not given:
        scorers = {ITEM_VECTORS: own} | scorers
    if not (scorers or head):
        raise ValueError(
            f"nothing to re-rank with: {args.model} has no item head and reads no item vectors. Give scorers, folders "
            f"of `onerec baseline` ({', '.join(SCORER_NAMES)})."
        )
    reranker = Reranker(scorers, **settings, item_head=head)
    if args.output is not None:
        copy_model(args)
    report = score_alone(args, recommender, test, output)
    fitted = fit(args, recommender.ranker, reranker, data)
    reranker.save_pretrained(output)
    recommender.ranker.reranker = reranker
    report |= score_model(recommender.ranker, test, output, args.seed) | {"reranker": fitted}
    write_metrics(output, report)
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec rerank`; `argv`: its arguments, by default those of the command line."""
    report = main(*ScriptParser("rerank", __doc__, [RerankArguments]).parse(argv))
    print(json.dumps({name: report[name] for name in ("search_alone", "reranker") if name in report}, indent=2))
    print(json.dumps({name: report[name] for name in ("test", "test_exclude_seen")}, indent=2))


if __name__ == "__main__":
    run()
