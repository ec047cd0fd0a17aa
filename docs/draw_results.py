"""Draws the two pictures of docs/results.md from results/*.json.

python docs/draw_results.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
ARMS = {"hybrid": "reward model and feedback"}
OURS, OTHERS = "#0072b2", "#8a949c"  # blue and grey: also for the colour-blind


def rows(name: str) -> tuple[list[str], list[list]]:
    """Names of the columns of a record, and its rows."""
    record = json.loads((FOLDER.parent / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return [column["name"] for column in record["columns"]], record["rows"]


def mean_and_spread(value: Any) -> tuple[float, float]:
    return (value["mean"], value.get("std", 0.0)) if isinstance(value, dict) else (value, 0.0)


def short(label: str) -> str:
    """The label of a row without its settings."""
    return label.replace("**", "").split(" parameters")[0].split(", `")[0].split(" (")[0]


def quality() -> None:
    """Recall@10 on Beauty, a bar each for seen items kept and masked, best first."""
    found = []
    for name in ("beauty_reranked", "beauty"):
        columns, table = rows(name)
        at = columns.index("recall@10")
        parts = ("re-ranked", "the same without", "neighbours by", "item head together", "item vectors")
        wanted = [row for row in table if name == "beauty" or any(part in row[0] for part in parts)]
        found += [(short(row[0]), [mean_and_spread(side) for side in row[at]]) for row in wanted]
    found.sort(key=lambda entry: entry[1][0][0])
    figure, axis = plt.subplots(figsize=(9, 0.3 * len(found) + 1))
    for y, (label, sides) in enumerate(found):
        color = OURS if label.startswith("OneRec") else OTHERS
        for offset, (value, spread), fill in zip((0.18, -0.18), sides, (1.0, 0.45)):
            axis.barh(y + offset, value, 0.36, xerr=spread or None, color=color, alpha=fill, error_kw={"lw": 1})
    axis.set_yticks(range(len(found)), [label for label, _ in found], fontsize=9)
    axis.set_xlabel("recall@10 on Amazon Beauty, higher is better\ndark: seen items kept, light: masked", fontsize=9)
    finish(figure, axis, "results_quality.png")


def alignment() -> None:
    """Change of true watch time: preference losses on sessions, and kinds of reinforcement learning."""
    columns, table = rows("session_alignment")
    at = columns.index("change of watch time")
    names = {row[0]: mean_and_spread(row[at]) for row in table}
    systems = ["SFT, the same number of steps (control)", "seed model, best of 64", "IPA"]
    systems += [name for name in names if name.endswith("pairs of the seed model")]
    lifts = [(short(name).replace("pairs of the seed model", "seed model's pairs"), *names[name]) for name in systems]
    columns, table = rows("ab_test")
    at = columns.index("watch time")
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharex=True)
    for y, (label, mean, spread) in enumerate(reversed(lifts)):
        axes[0].errorbar(mean, y, xerr=spread, fmt="o", color=OURS if label == "IPA" else OTHERS, capsize=3)
    axes[0].set_yticks(range(len(lifts)), [label for label, *_ in reversed(lifts)], fontsize=9)
    axes[0].set_title("preference alignment of sessions\nmean ± standard deviation of three worlds", fontsize=9.5)
    for y, row in enumerate(reversed(table)):
        value = row[at]
        for i, (low, high) in enumerate(value["intervals"]):
            axes[1].plot((low, high), (y + 0.2 * (1 - i),) * 2, color=OTHERS, lw=2)
        axes[1].plot(value["mean"], y, "o", color=OURS)
    axes[1].set_yticks(range(len(table)), [ARMS.get(row[0], short(row[0])) for row in reversed(table)], fontsize=9)
    axes[1].set_title(
        "reinforcement learning, simulated A/B test\nmean, and the 95% interval of each world", fontsize=9.5
    )
    for axis in axes:
        axis.axvline(0, color="black", lw=0.8)
        axis.set_xlabel("change of true watch time, %", fontsize=9)
    finish(figure, axes, "results_alignment.png")


def finish(figure: Any, axes: Any, name: str) -> None:
    for axis in [axes] if hasattr(axes, "spines") else axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=9)
    figure.tight_layout()
    figure.savefig(FOLDER / name, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    quality()
    alignment()
