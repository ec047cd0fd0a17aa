"""Fits one baseline and scores it on the test split, once with seen items allowed and once without them.

    python recipes/baseline.py --name sasrec --data FOLDER --output outputs/sasrec --seed 0

`--data` is a folder that `recipes/prepare.py` wrote (same splits as our models) or, with `--layout`, a public data set,
split leave-last-out. Writes `metrics.json`, `predictions.parquet`, `predictions_exclude_seen.parquet` and, for SASRec,
`model/`. Every field of `BaselineArguments` can also stand in a YAML file: `--config FILE`.
"""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import datasets
from trl import TrlParser

from onerec_hf import data as logs
from onerec_hf.baselines import CoOccurrence, Popularity, SASRec
from onerec_hf.evaluation import evaluate


@dataclass
class BaselineArguments:
    name: Literal["popularity", "cooccurrence", "sasrec"]
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote, or of a public layout."})
    output: str = field(metadata={"help": "Folder to write."})
    layout: Literal["prepared", "amazon", "kuairand", "kuairand_like_hate"] = "prepared"
    seed: int = 0
    model: str = field(default="{}", metadata={"help": "Arguments of SASRec(...), YAML mapping or JSON."})
    fit: str = field(default="{}", metadata={"help": "Arguments of SASRec.fit, YAML mapping or JSON."})


def load_splits(args: BaselineArguments) -> tuple[datasets.DatasetDict, int]:
    """The splits and the number of items."""
    if args.layout == "prepared":
        num_items = len(datasets.Dataset.from_parquet(str(Path(args.data) / "items.parquet")))
        return datasets.load_from_disk(str(Path(args.data) / "splits")), num_items
    loaders = {
        "amazon": logs.load_amazon,
        "kuairand": logs.load_kuairand,
        "kuairand_like_hate": logs.load_kuairand_like_hate,
    }
    interactions = loaders[args.layout](args.data)
    return logs.leave_last_out(interactions), interactions.num_items


def fit_sasrec(args: BaselineArguments, splits: datasets.DatasetDict, num_items: int) -> SASRec:
    """Keeps the epoch with the best validation ndcg@10, seen items allowed: nothing is assumed about repeats."""

    def validate(model: SASRec) -> float:
        result = evaluate(model, splits["validation"], num_items=num_items, ks=(10,), progress=False)
        return result.metrics["ndcg@10"]

    model_arguments, fit_arguments = (
        json.loads(value) if isinstance(value, str) else value for value in (args.model, args.fit)
    )
    model = SASRec(num_items, seed=args.seed, **model_arguments)
    return model.fit(splits["train"]["history"], validate=validate, seed=args.seed, **fit_arguments)


def main(args: BaselineArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    splits, num_items = load_splits(args)
    report = {"arguments": asdict(args), "num_items": num_items}
    start = time.perf_counter()
    if args.name == "sasrec":
        model = fit_sasrec(args, splits, num_items)
        model.save_pretrained(output / "model")
        report["best_epoch"] = max(model.training_log, key=lambda record: record["validation"])["epoch"]
        report["training_log"] = model.training_log
    else:
        model = {"popularity": Popularity, "cooccurrence": CoOccurrence}[args.name](num_items)
        model.fit(splits["train"]["history"])
    report["fit_seconds"] = time.perf_counter() - start
    for name, exclude_seen in (("predictions", False), ("predictions_exclude_seen", True)):
        result = evaluate(model, splits["test"], num_items=num_items, exclude_seen=exclude_seen, seed=args.seed)
        result.save(output / f"{name}.parquet")
        report["test_exclude_seen" if exclude_seen else "test"] = result.to_dict()
    (output / "metrics.json").write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    report = main(TrlParser(BaselineArguments).parse_args_and_config()[0])
    print(json.dumps({name: report[name] for name in ("test", "test_exclude_seen")}, indent=2))
