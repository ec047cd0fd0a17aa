"""What `onerec leaderboard` reads from its runs, and how it shows it: a table and a picture."""

import json
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
from matplotlib.figure import Figure

from .. import Catalogue
from ..data import DataFolder
from ..data.data_folder import id_fingerprint
from ..evaluation import frequency_strata, history_strata, novelty_at_k, recall_by_frequency, recall_by_history
from ..evaluation.metrics import coverage_at_k, diversity_at_k
from ..hub import table_cell
from ..hub.pictures import plot_label
from .baseline import ITEM_FINGERPRINT
from .ending import PREDICTIONS

METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10")
BEYOND = ("coverage@10", "novelty@10", "diversity@10")


class HeldOut(NamedTuple):
    """The users that every entry is measured on.

    Attributes:
        rows: the test split.
        lengths: items in each user's history.
        counts (`np.ndarray` of shape `(N,)`): training occurrences of every item.
        embeddings (`np.ndarray` of shape `(N, D)`): of the items, for diversity.
        by_frequency, by_history: see `frequency_strata` and `history_strata`.
    """

    rows: datasets.Dataset
    lengths: list[int]
    counts: np.ndarray
    embeddings: np.ndarray
    by_frequency: list[tuple[int, int]]
    by_history: list[tuple[int, int]]

    @classmethod
    def of(cls, data: DataFolder) -> "HeldOut":
        train = np.concatenate(data.splits["train"].with_format("numpy")["history"])
        rows, counts = data.splits["test"], np.bincount(train, minlength=data.num_items)
        lengths = [len(history) for history in rows["history"]]
        by_frequency, by_history = frequency_strata(counts, rows["targets"]), history_strata(lengths)
        return cls(rows, lengths, counts, data.item_embeddings, by_frequency, by_history)

    def measure(self, table: datasets.Dataset) -> dict[str, list[float]]:
        """Recall@10 by frequency and by history, and what is beyond accuracy, of one run's lists."""
        lists = np.array(table["predictions"])
        by_frequency = recall_by_frequency(lists, self.rows["targets"], self.counts, self.by_frequency)
        by_history = recall_by_history(np.array(table["recall@10"]), self.lengths, self.by_history)
        return {
            "strata": [recall for recall, _ in by_frequency],
            "histories": [recall for recall, _ in by_history],
            "beyond": [
                coverage_at_k(lists, 10, len(self.counts)),
                float(np.nanmean(novelty_at_k(lists, 10, self.counts))),
                float(np.nanmean(diversity_at_k(lists, 10, self.embeddings))),
            ],
        }


def check_runs(folders: list[Path], data: DataFolder) -> None:
    """Refuses runs on another data folder: their test users may be the same, their items are not."""
    items = id_fingerprint(data.items["item_id"][:])
    for folder in folders:
        report = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        known = report.get("num_items", data.num_items)
        if known != data.num_items:
            raise ValueError(
                f"{folder} knows {known} items, {data.path} has {data.num_items}: of another log. Delete that folder."
            )
        if report.get(ITEM_FINGERPRINT, items) != items:
            raise ValueError(
                f"{folder} knows other items than {data.path} has, or the same ones in another order. Delete that "
                "folder."
            )
        if (folder / "catalogue.safetensors").is_file():
            data.check_model(folder, Catalogue.from_pretrained(folder))


def collect(folders: list[Path], test: HeldOut) -> dict:
    """Means and deviations over the seeds of one entry, and each user's recall@10, averaged over them."""
    reports = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    result = {"seeds": len(folders), "seconds": [r.get("fit_seconds", r.get("train_seconds")) for r in reports]}
    if all("validation" in report for report in reports):
        result["validation"] = float(np.mean([report["validation"]["ndcg@10"] for report in reports]))
    for kind, name in PREDICTIONS.items():
        tables = [datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for folder in folders]
        if any(table["user"] != test.rows["user"] for table in tables):
            raise ValueError(
                f"{folders[0].parent} was run on other test users than --dataset has: delete that folder."
            )
        values = {metric: [report[kind][metric] for report in reports] for metric in METRICS}
        result[kind] = {m: (float(np.mean(v)), float(np.std(v, ddof=1)) if v[1:] else None) for m, v in values.items()}
        result[f"users_{kind}"] = np.mean([table["recall@10"] for table in tables], axis=0)
        if kind == "test":
            measured = [test.measure(table) for table in tables]
            result |= {name: np.mean([each[name] for each in measured], axis=0).tolist() for name in measured[0]}
    return result


def tables(results: dict, reference: str, test: HeldOut) -> str:
    """Markdown; kept / masked in every cell, best recall@10 first."""

    def number(mean, deviation):
        return f"{mean:.4f}" + (f" ±{deviation:.4f}" if deviation is not None else "")

    lines = [
        f"| model | seeds | {' | '.join(METRICS)} | recall@10 - {table_cell(reference)}, 95% | seconds |",
        "|---" * 8 + "|",
    ]
    for name, result in results.items():
        cells = [" / ".join(number(*result[kind][metric]) for kind in PREDICTIONS) for metric in METRICS]
        intervals = " / ".join("[{:+.4f}, {:+.4f}]".format(*result["interval"][kind]) for kind in PREDICTIONS)
        trained = None not in result["seconds"]  # not by us: an entry of one's own
        seconds = f"{np.mean(result['seconds']):.0f}" if trained else "-"
        against = "-" if name == reference else intervals
        lines.append(f"| {' | '.join([table_cell(name), str(result['seeds']), *cells, against, seconds])} |")
    for name, title, columns in (
        ("strata", "recall@10, target seen so often in training", ranges(test.by_frequency)),
        ("histories", "recall@10, items in the history", ranges(test.by_history)),
        ("beyond", "beyond accuracy", [*BEYOND]),
    ):
        lines += ["", f"| {' | '.join([title, *columns])} |", "|---" * (len(columns) + 1) + "|"]
        for entry, result in results.items():
            lines.append(f"| {table_cell(entry)} | {' | '.join(f'{value:.4f}' for value in result[name])} |")
    lines += [
        "",
        "All three with seen items kept. coverage: share of the catalogue in some list. novelty: bits, -log2 of an "
        "item's share of the training events. diversity: mean cosine distance of the items of a list.",
    ]
    return "\n".join(lines) + "\n"


def ranges(strata: list[tuple[int, int]]) -> list[str]:
    """What stands above their columns."""
    return [str(low) if low == high else f"{low}-{high}" for low, high in strata]


def picture(results: dict, strata: list, path: Path) -> None:
    """Left: recall@10, seen items masked, with its deviation. Right: recall@10 by frequency of the target."""
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(results)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(results)[::-1]
    for kind, color, shift in (("test", "#b6c8de", -0.19), ("test_exclude_seen", "#4c78a8", 0.19)):
        means, deviations = zip(*(results[name][kind]["recall@10"] for name in names))
        label = "seen items " + ("masked" if kind.endswith("seen") else "kept")
        left.barh(
            np.arange(len(names)) + shift, means, 0.36, xerr=[d or 0 for d in deviations], color=color, label=label
        )
    left.set_yticks(range(len(names)), map(plot_label, names))
    left.set_xlabel("recall@10")
    left.legend(frameon=False, fontsize=8)
    for name in results:
        right.plot(results[name]["strata"], marker="o", markersize=3, linewidth=1.2, label=plot_label(name))
    right.set_xticks(range(len(strata)), ranges(strata))
    right.set_xlabel("training occurrences of the target")
    right.legend(frameon=False, fontsize=8, ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
