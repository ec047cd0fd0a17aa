"""Fits one baseline and scores it on the test split, once with seen items allowed and once without them.

    python recipes/baseline.py --name sasrec --data FOLDER --output outputs/sasrec --seed 0

`--data` is a folder in the Amazon layout (see `load_amazon`) or, with `--layout log`, a table of interactions (see
`load_interactions`). The split is leave-last-out; with `--validation_start` and `--test_start` it is by global time.
Writes `metrics.json`, `predictions.parquet`, `predictions_exclude_seen.parquet` and, for SASRec, `model/`. Every field
of `Arguments` can also stand in a YAML file: `--config FILE`.
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trl import TrlParser

from onerec_hf.baselines import CoOccurrence, Popularity, SASRec
from onerec_hf.data import global_time_split, leave_last_out, load_amazon, load_interactions
from onerec_hf.evaluation import evaluate


@dataclass
class Arguments:
    name: Literal["popularity", "cooccurrence", "sasrec"]
    data: str
    output: str
    layout: Literal["amazon", "log"] = "amazon"
    validation_start: float | None = None
    test_start: float | None = None
    seed: int = 0
    # SASRec only
    loss: Literal["softmax", "bce"] = "softmax"
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 2
    max_length: int = 50
    dropout: float = 0.5
    num_epochs: int = 40
    batch_size: int = 128
    learning_rate: float = 1e-3


def load_splits(arguments: Arguments):
    """The `DatasetDict` of the three splits, and the number of items."""
    interactions = load_amazon(arguments.data) if arguments.layout == "amazon" else load_interactions(arguments.data)
    if (arguments.validation_start is None) != (arguments.test_start is None):
        raise ValueError("give both --validation_start and --test_start (split by time) or neither (leave last out).")
    if arguments.test_start is None:
        return leave_last_out(interactions), interactions.num_items
    start, end = arguments.validation_start, arguments.test_start
    return global_time_split(interactions, start, end, min_history=1), interactions.num_items


def fit_sasrec(arguments: Arguments, splits, num_items: int) -> SASRec:
    """Keeps the epoch with the best validation ndcg@10, seen items allowed (no property of the data is assumed)."""

    def validate(model: SASRec) -> float:
        result = evaluate(model, splits["validation"], num_items=num_items, ks=(10,), progress=False)
        return result.metrics["ndcg@10"]

    model = SASRec(
        num_items,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.num_attention_heads,
        max_length=arguments.max_length,
        dropout=arguments.dropout,
        seed=arguments.seed,
    )
    return model.fit(
        splits["train"]["history"],
        validate=validate,
        loss=arguments.loss,
        num_epochs=arguments.num_epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    )


def main(arguments: Arguments) -> dict:
    """Runs the recipe and returns what it writes to `metrics.json`."""
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    splits, num_items = load_splits(arguments)
    start = time.perf_counter()
    if arguments.name == "sasrec":
        model = fit_sasrec(arguments, splits, num_items)
        model.save_pretrained(output / "model")
    else:
        model = {"popularity": Popularity, "cooccurrence": CoOccurrence}[arguments.name](num_items)
        model.fit(splits["train"]["history"])
    report = {"arguments": asdict(arguments), "fit_seconds": time.perf_counter() - start}
    if arguments.name == "sasrec":
        report["best_epoch"] = max(model.training_log, key=lambda record: record["validation"])["epoch"]
        report["training_log"] = model.training_log
    for name, exclude_seen in (("predictions", False), ("predictions_exclude_seen", True)):
        result = evaluate(model, splits["test"], num_items=num_items, exclude_seen=exclude_seen, seed=arguments.seed)
        result.save(output / f"{name}.parquet")
        report["test_exclude_seen" if exclude_seen else "test"] = result.to_dict()
    (output / "metrics.json").write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    report = main(TrlParser(Arguments).parse_args_and_config()[0])
    print(json.dumps({name: report[name] for name in ("test", "test_exclude_seen")}, indent=2))
