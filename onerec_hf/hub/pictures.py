"""The pictures of a model card. Drawn with matplotlib, which only this file needs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7")  # Okabe and Ito's, which everybody can tell apart


def _figure(width: float = 6.0, height: float = 3.4):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the pictures of a card are drawn with matplotlib: `pip install matplotlib`.") from error

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    axes.set_prop_cycle(color=COLOURS)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def plot_label(name: str) -> str:
    """A name as matplotlib prints it: a dollar would begin a formula, and a label with `_` in front is left out."""
    return f" {name}".replace("$", r"\$")


def plot_training_curve(
    log_history: Sequence[Mapping[str, float]], path: str | Path, metric: str = "eval_ndcg@10"
) -> None:
    """Training and validation loss (nats per code) and a validation metric over epochs, from
    `trainer.state.log_history`.
    """
    figure, axes = _figure()
    for name, label, style in (("loss", "training loss", "-"), ("eval_loss", "validation loss", "o-")):
        points = [(record["epoch"], record[name]) for record in log_history if name in record]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3)
    points = [(record["epoch"], record[metric]) for record in log_history if metric in record]
    axes.set_xlabel("epoch")
    axes.set_ylabel("nats per code")
    handles, labels = axes.get_legend_handles_labels()
    if points:
        twin = axes.twinx()
        twin.spines["top"].set_visible(False)
        twin.plot(*zip(*points), "s--", color="#009e73", label=metric.removeprefix("eval_"), markersize=3)
        twin.set_ylabel(metric.removeprefix("eval_") + " on validation")
        twin.set_ylim(bottom=0)
        more, names = twin.get_legend_handles_labels()
        handles, labels = handles + more, labels + names
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)


def plot_recall_by_frequency(
    recalls: Mapping[str, np.ndarray], target_counts: np.ndarray, path: str | Path, num_strata: int = 5
) -> None:
    """
    Recall by how often the target item occurs in training: the rarest fifth of the test cases on the left.

    Args:
        recalls: Per system the per-user recall, shape (U,).
        target_counts: Training events of each user's target item, shape (U,).
    """
    edges = np.unique(np.quantile(target_counts, np.linspace(0, 1, num_strata + 1)))
    stratum = np.searchsorted(edges[1:-1], target_counts, side="left")
    names = []
    for s in range(len(edges) - 1):
        inside = target_counts[stratum == s]
        names.append(f"{inside.min():.0f}–{inside.max():.0f}\n({len(inside)} users)" if len(inside) else "")
    figure, axes = _figure()
    width = 0.8 / len(recalls)
    for i, (name, values) in enumerate(recalls.items()):
        heights = [values[stratum == s].mean() if (stratum == s).any() else 0 for s in range(len(edges) - 1)]
        axes.bar(
            np.arange(len(heights)) + (i - (len(recalls) - 1) / 2) * width, heights, width, label=plot_label(name)
        )
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_xlabel("training events of the target item")
    axes.set_ylabel("recall@10")
    figure.legend(loc="outside upper center", ncols=2 if len(recalls) > 3 else 3, frameon=False)
    figure.savefig(path)


def plot_prediction_entropy(
    entropies: Mapping[str, np.ndarray], codebook_sizes: Sequence[int], path: str | Path
) -> None:
    """
    How sure a model is of the code of each level, given the true codes before it (OneRec reports 6.00, 3.71 and 0.05
    nats of 9.01).

    Boxes from the 25th to the 75th percentile of the users with the median in them, whiskers from the 5th to the 95th,
    a cross at the mean; dashed the entropy of a uniform guess, ln K.

    Args:
        entropies: Per system the entropy of every level in nats, shape (U, L), as [`~evaluation.prediction_entropy`]
            gives it.
        codebook_sizes: K of every level.
    """
    figure, axes = _figure()
    levels, width = len(codebook_sizes), 0.7 / len(entropies)
    for i, (name, values) in enumerate(entropies.items()):
        values = np.asarray(values)
        if values.ndim != 2 or values.shape[1] != levels:
            raise ValueError(f"entropies[{name!r}] has shape {values.shape}: expected (users, {levels}).")
        place = np.arange(levels) + 1 + (i - (len(entropies) - 1) / 2) * width
        parts = axes.boxplot(
            values,
            positions=place,
            widths=0.8 * width,
            whis=(5, 95),
            showfliers=False,
            patch_artist=True,
            medianprops={"color": "#333333"},
            boxprops={"facecolor": COLOURS[i % len(COLOURS)], "alpha": 0.7},
        )
        parts["boxes"][0].set_label(plot_label(name))
        axes.plot(place, values.mean(0), "x", color="#333333", markersize=5)
    for level, size in enumerate(codebook_sizes):
        label = "uniform guess, ln K" if level == 0 else None
        axes.hlines(math.log(size), level + 0.6, level + 1.4, "#333333", linestyles="--", linewidth=1, label=label)
    axes.set_xticks(np.arange(levels) + 1, [f"level {level + 1}" for level in range(levels)])
    axes.set_xlim(0.4, levels + 0.6)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("entropy of the next code, nats")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path)
