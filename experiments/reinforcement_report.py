"""Tables and picture of what reinforcement.py wrote."""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def table(output: Path, seeds: list[int]) -> None:
    """Markdown of `ab` (lift in %, mean over worlds and interval of each), of `rollouts` and of `legality` (mean ±
    deviation).
    """
    for part in ("ab", "rollouts", "legality"):
        files = [output / f"{part}_{seed}.json" for seed in seeds]
        reports = [json.loads(file.read_text()) for file in files if file.exists()]
        for arm in reports[0] if reports else ():
            found = [report[arm] for report in reports]
            if part != "ab":
                values = ([f[name] for f in found] for name in found[0] if name != "curve")
                cells = [f"{np.mean(v):.4f} ±{np.std(v, ddof=len(v) > 1):.4f}" for v in values]
            elif "lifts" not in found[0]:
                continue
            else:
                cells = [f"{np.mean([f['test']['recall@10'] for f in found]):.4f}"]
                for name in (
                    "app_stay_time",
                    "watch_time",
                    "views",
                    "likes",
                    "dislikes",
                    "cold_start_views",
                    "diversity",
                ):
                    lifts = [f["lifts"][name] for f in found]
                    spans = ", ".join(f"{100 * lift['low']:.1f} to {100 * lift['high']:.1f}" for lift in lifts)
                    cells.append(f"{100 * np.mean([lift['value'] for lift in lifts]):+.1f} ({spans})")
            print(f"| {arm} | " + " | ".join(cells) + " |")


def plot(output: Path, seeds: list[int]) -> None:
    """Figure 9 of OneRec-V2 in small, and the legality of rollouts; thin lines are seeds, thick ones their means."""

    def curves(axis, name, column, arms, label):
        for arm, colour in zip(arms, ("#d55e00", "#e69f00", "#0072b2", "#009e73")):
            files = [output / f"{name}_{seed}.json" for seed in seeds]
            reports = [json.loads(file.read_text()) for file in files if file.exists()]
            runs = [report[arm]["curve"] for report in reports if arm in report]
            if not runs:
                continue
            for run in runs:
                axis.plot(
                    [row[0] for row in run], [row[column] for row in run], color=colour, linewidth=0.6, alpha=0.5
                )
            mean = np.mean([[row[column] for row in run] for run in runs], axis=0)
            axis.plot([row[0] for row in runs[0]], mean, color=colour, linewidth=2, label=arm)
        axis.set(xlabel="step", ylabel=label)
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    curves(left, "gradients", 1, ("grpo", "ecpo", "gbpo"), "gradient norm, negative advantages")
    arms = ("ecpo", "ecpo + format, top K", "ecpo + format, random K", "ecpo + 20 format, random K")
    curves(right, "legality", 1, arms, "legality of rollouts")
    figure.tight_layout()
    figure.savefig(output / "reinforcement.png", dpi=120)
    plt.close(figure)
