"""Draws the picture of docs/loop.md from results/loop_days.json.

python docs/draw_loop.py
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
# line, marker and colour of each policy: it can be read without colours
STYLES = {
    "frozen": (":", "s", "#8a949c"),
    "sft": ("--", "o", "#0072b2"),
    "ipa": ("-", "^", "#d55e00"),
    "gbpo": ("-.", "D", "#009e73"),
}
PANELS = {
    "true watch time of a list, s": "higher is better",
    "coverage, %": "share of the catalogue in some list",
    "views on the top tenth, %": "lower is more even",
    "views on new videos, %": "uploaded in the last three days",
}


def main() -> None:
    record = json.loads((FOLDER.parent / "results" / "loop_days.json").read_text(encoding="utf-8"))
    rows = {row[0]: row[1:] for row in record["rows"]}
    days = range(1, len(record["columns"]))
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 3.4))
    for axis, (name, note) in zip(axes, PANELS.items()):
        for policy, (line, marker, color) in STYLES.items():
            values = rows[f"{name}: {policy}"]
            mean, spread = ([each[key] for each in values] for key in ("mean", "std"))
            axis.plot(days, mean, line, marker=marker, markersize=4, color=color, label=policy)
            low, high = ([m + sign * s for m, s in zip(mean, spread)] for sign in (-1, 1))
            axis.fill_between(days, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_title(f"{name}\n({note})", fontsize=9)
        axis.set_xlabel("day", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "loop.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
