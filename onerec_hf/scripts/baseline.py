"""Fits one baseline and scores it on the test split, once with seen items allowed and once without them.

    onerec baseline --name sasrec --data FOLDER --output outputs/sasrec --seed 0

`--name`: popularity, cooccurrence, itemknn, embeddingknn (of the folder's item embeddings), sasrec (as published:
`--model '{"temperature": null}' --fit '{"loss": "bce"}'`), hstu, bert4rec, fdsa (`--attributes brand category`), tiger
(semantic IDs: `--tokenizer`). `--data` is a folder that `onerec prepare` wrote (same splits as our models) or, with
`--layout`, a public data set, split leave-last-out.
Rows of sessions (`onerec prepare --sessions`) become sequences: `--watched '{"long_view": 1}'` says which behaviours
count; of several, one is enough. Writes `metrics.json`, `predictions.parquet`, `predictions_exclude_seen.parquet` (a
row per user, for `evaluation.paired_bootstrap`) and, for what was trained, `model/`. Every field of
`BaselineArguments` can also stand in a YAML file: `--config FILE`.
"""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
from transformers.utils import logging

from .. import Catalogue
from .. import data as logs
from ..baselines import (
    FDSA,
    HSTU,
    TIGER,
    BERT4Rec,
    CoOccurrence,
    EmbeddingKNN,
    ItemKNN,
    Popularity,
    SASRec,
    attribute_codes,
)
from ..baselines.training import train_baseline
from ..data.data_folder import id_fingerprint
from ..evaluation import evaluate
from ..models.catalogue import CATALOGUE_NAME
from .checks import check_columns, check_keywords, check_output, check_splits
from .ending import remove_earlier_results, score, some, write_metrics
from .model_arguments import mapping
from .parser import ScriptParser

logger = logging.get_logger(__name__)

COUNTERS = {"popularity": Popularity, "cooccurrence": CoOccurrence, "itemknn": ItemKNN, "embeddingknn": EmbeddingKNN}
TRAINED = {"sasrec": SASRec, "hstu": HSTU, "bert4rec": BERT4Rec, "fdsa": FDSA, "tiger": TIGER}
BASELINES: dict[str, Any] = COUNTERS | TRAINED
ITEM_FINGERPRINT = "item_fingerprint"  # in metrics.json


@dataclass
class BaselineArguments:
    name: Literal[
        "popularity", "cooccurrence", "itemknn", "embeddingknn", "sasrec", "hstu", "bert4rec", "fdsa", "tiger"
    ] = field(metadata={"help": "Which one."})
    data: str = field(
        metadata={"help": "Folder that `onerec prepare` wrote, or of a public layout.", "aliases": ["--dataset"]}
    )
    output: str = field(metadata={"help": "Folder to write."})
    layout: Literal["prepared", "amazon", "kuairand"] = field(
        default="prepared", metadata={"help": "prepared: a data folder; amazon, kuairand: the public files."}
    )
    seed: int = field(default=0, metadata={"help": "Of all that is drawn at random."})
    model: str = field(default="{}", metadata={"help": "Arguments of the baseline's class, YAML mapping or JSON."})
    fit: str = field(default="{}", metadata={"help": "Arguments of its fit, YAML mapping or JSON."})
    attributes: list[str] = field(default_factory=list, metadata={"help": "fdsa: columns of the item table."})
    tokenizer: str = field(
        default="tokenizer", metadata={"help": "tiger: folder with the semantic IDs; not absolute: inside --data."}
    )
    eval_users: int | None = field(
        default=None, metadata={"help": "Validation users that choose the epoch; default all (tiger generates)."}
    )
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})
    watched: str = field(
        default="{}",
        metadata={"help": "Of session rows: what is read, columns and thresholds; an event that reaches one counts."},
    )


def check_same_items(reports: dict[Path, dict], item_ids: Iterable, place: str) -> None:
    """
    Refuses baselines of other items than those of `place`; says of which it cannot be told.

    Args:
        reports: What the folders of `onerec baseline` have in metrics.json.
        item_ids: Of `place`, in its order.
    """
    item_ids, unknown = list(item_ids), []
    own = id_fingerprint(item_ids)
    for folder, report in reports.items():
        known, advice = report.get(ITEM_FINGERPRINT), f"Run `onerec baseline --data {place}`, or name what that wrote."
        if report.get("num_items", len(item_ids)) != len(item_ids):
            raise ValueError(
                f"{folder} knows {report['num_items']} items, {place} has {len(item_ids)}: another log. {advice}"
            )
        if known is None and (folder / CATALOGUE_NAME).is_file():  # of `onerec sft` and what follows it
            known = id_fingerprint(Catalogue.from_pretrained(folder).item_ids)
        if known is None:
            unknown.append(str(folder))
        elif known != own:
            raise ValueError(
                f"{folder} knows {len(item_ids)} items, {place} has as many, and they are others, or the same ones in "
                f"another order: it would take one item for another. {advice}"
            )
    if unknown:
        logger.warning(
            f"{', '.join(unknown)}: nothing there says of which items, because an earlier version or something else "
            f"made it. Whether they are those of {place}, in the same order, cannot be checked; to be sure, run "
            "`onerec baseline` again."
        )


def load_splits(args: BaselineArguments) -> tuple[datasets.DatasetDict, list, Any]:
    """The splits, the item ids, and the item table (columns by name)."""
    if args.layout == "prepared":
        data = logs.DataFolder(args.data)
        return data.splits, data.items["item_id"][:], data.items
    interactions = getattr(logs, f"load_{args.layout}")(args.data)
    return logs.leave_last_out(interactions), interactions.item_ids.tolist(), interactions.items


def sequences(splits: datasets.DatasetDict, watched: dict[str, float]) -> datasets.DatasetDict:
    """
    Session rows for models of sequences. Train: all that a user watched, in time order. Elsewhere: the part of a
    history that was watched, or all of it where nothing was. An item was watched where one of the columns reaches its
    threshold, as in `onerec prepare --watched`.
    """

    check_columns("the splits of --data, for --watched,", splits["train"].column_names, ["session_start", *watched])

    def read(row: dict) -> list[int]:
        if not watched:
            return row["history"]
        counts = logs.reaches({name: row[name] for name in watched}, watched)
        return [item for item, counted in zip(row["history"], counts) if counted] or row["history"]

    users: dict[int, list[int]] = {}
    for row in splits["train"].sort("session_start"):
        users.setdefault(row["user"], read(row)).extend(row["targets"])
    train = datasets.Dataset.from_dict({"user": list(users), "history": list(users.values())})
    columns = ["user", "history", "targets"]
    others = {name: splits[name].map(lambda row: {"history": read(row)}).select_columns(columns) for name in splits}
    return datasets.DatasetDict(others | {"train": train})


def make(args: BaselineArguments, num_items: int, items: Any, settings: dict) -> Any:
    """The baseline, untrained."""
    if args.name == "embeddingknn":
        if args.layout != "prepared":
            raise ValueError("embeddingknn reads item embeddings: run `onerec prepare` and pass its folder.")
        return EmbeddingKNN(logs.DataFolder(args.data).item_embeddings, **settings)
    if args.name in COUNTERS:
        return COUNTERS[args.name](num_items, **settings)
    settings = {"seed": args.seed} | settings
    if args.name == "tiger":
        if args.layout != "prepared":
            raise ValueError("tiger reads semantic IDs: run `onerec prepare` and pass the folder that it wrote.")
        return TIGER(Catalogue.from_pretrained(Path(args.data) / args.tokenizer), **settings)
    if args.name == "fdsa":
        if not args.attributes:
            raise ValueError(
                "fdsa reads item attributes: name columns of the item table, --attributes brand category."
            )
        columns = getattr(items, "column_names", None) or list(items)
        if absent := [name for name in args.attributes if name not in columns]:
            raise ValueError(f"attributes={absent}: the item table has no such column; it has {columns}.")
        return FDSA(attribute_codes(*(items[name] for name in args.attributes)), **settings)
    return BASELINES[args.name](num_items, **settings)


def fit(args: BaselineArguments, model: Any, splits: datasets.DatasetDict, num_items: int, settings: dict) -> None:
    """Keeps the epoch with the best validation ndcg@10, seen items allowed: nothing is assumed about repeats."""
    train = splits["train"]
    sample = some(splits["validation"].shuffle(seed=0), args.eval_users, "eval_users")

    def validate(model) -> float:
        return evaluate(model, sample, num_items=num_items, ks=(10,), progress=False).metrics["ndcg@10"]

    users = {"users": train["user"]} if args.name == "tiger" else {}
    model.fit(train["history"], **users, **({"validate": validate, "seed": args.seed} | settings))


def check(args: BaselineArguments) -> tuple:
    """All that can be said before it is trained; returns splits, item ids, baseline and settings of its fit."""
    check_output(args.output)
    splits, item_ids, items = load_splits(args)
    settings = mapping(args.fit)
    if "targets" in splits["train"].column_names:
        splits = sequences(splits, mapping(args.watched))
    elif mapping(args.watched):
        raise ValueError(f"watched={args.watched}: only rows of sessions have columns to choose behaviours by.")
    check_splits(splits)
    model = make(args, len(item_ids), items, mapping(args.model))
    check_keywords("fit", settings, *([] if args.name in COUNTERS else [model.fit, train_baseline]))
    return splits, item_ids, model, settings


def main(args: BaselineArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    splits, item_ids, model, fit_settings = check(args)
    num_items = len(item_ids)
    test, output = some(splits["test"], args.test_users, "test_users"), Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    report = {"arguments": asdict(args), "num_items": num_items, ITEM_FINGERPRINT: id_fingerprint(item_ids)}
    start = time.perf_counter()
    if args.name in COUNTERS:
        model.fit(splits["train"]["history"])
    else:
        fit(args, model, splits, num_items, fit_settings)
    remove_earlier_results(output)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(output / "model")
    if args.name not in COUNTERS:
        validated = [record for record in model.training_log if "validation" in record]
        report["best_epoch"] = max(validated, key=lambda record: record["validation"])["epoch"]
        report["num_parameters"] = model.model.num_parameters()
        report["training_log"] = model.training_log
    report["fit_seconds"] = time.perf_counter() - start
    result = evaluate(model, splits["validation"], num_items=num_items, seed=args.seed)
    report["validation"] = result.to_dict()
    report |= score(model, test, num_items, output, args.seed)
    write_metrics(output, report)
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec baseline`; `argv`: its arguments, by default those of the command line."""
    report = main(*ScriptParser("baseline", __doc__, [BaselineArguments]).parse(argv))
    print(json.dumps({name: report[name] for name in ("test", "test_exclude_seen")}, indent=2))


if __name__ == "__main__":
    run()
