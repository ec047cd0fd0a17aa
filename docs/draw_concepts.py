"""Draws two pictures of the concepts: how a semantic ID is made, and how a model is aligned.

python docs/draw_concepts.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from draw_architecture import CONTEXT, DECODER, INPUT, OUTPUT, arrow, box

from onerec_hf.semantic_ids import ResidualKMeans

FOLDER = Path(__file__).parent
COLORS = np.array(["#0072b2", "#e69f00", "#009e73", "#cc79a7"])  # Okabe and Ito: also for the colour-blind
MARKS = "os^D"


def scatter(axis, points, codes, title, centroids) -> None:
    for code in range(len(COLORS)):
        own = points[codes == code]
        axis.scatter(*own.T, s=22, color=COLORS[code], marker=MARKS[code], alpha=0.75, label=f"code {code}")
    axis.scatter(*centroids.T, s=130, color="black", marker="x", linewidths=2.2)
    axis.set_title(title, fontsize=10.5)
    axis.set(xticks=[], yticks=[], aspect="equal")


def semantic_ids() -> None:
    """Two levels of residual k-means in the plane, and the code of one item."""
    generator = np.random.default_rng(3)
    middles = np.array([[-2.2, 1.2], [1.8, 1.9], [-1.2, -2.0], [2.4, -1.3]])
    points = np.concatenate([middle + generator.normal(0, 0.75, (40, 2)) for middle in middles]).astype(np.float32)
    quantizer = ResidualKMeans(num_levels=2, codebook_size=4, balanced=True, seed=0).fit(torch.from_numpy(points))
    codes, books = np.asarray(quantizer.train_codes), [np.asarray(book) for book in quantizer.codebooks]
    residuals, item = points - books[0][codes[:, 0]], 7
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.4))
    scatter(axes[0], points, codes[:, 0], "level 1: the nearest of four centroids (x)", books[0])
    scatter(axes[1], residuals, codes[:, 1], "level 2: the same for what is left of every item", books[1])
    for axis, place in zip(axes, (points[item], residuals[item])):
        axis.scatter(*place, s=230, facecolors="none", edgecolors="black", linewidths=1.8)
    axes[0].legend(loc="lower center", bbox_to_anchor=(1.05, -0.17), ncols=4, frameon=False, fontsize=9.5)
    name = ", ".join(map(str, codes[item]))
    figure.suptitle(f"The circled item has the semantic ID ({name})", fontsize=11.5, weight="bold")
    figure.subplots_adjust(left=0.02, right=0.98, top=0.85, bottom=0.12, wspace=0.08)
    figure.savefig(FOLDER / "residual_codes.png", dpi=110)
    plt.close(figure)


def alignment() -> None:
    """From what users watched to what they valued."""
    figure, axis = plt.subplots(figsize=(11.5, 4.3))
    box(axis, 0.1, 1.6, 1.9, 1.1, "log of impressions\nshown, watched how long,\nliked, disliked", INPUT, 9)
    box(axis, 2.7, 2.75, 2.1, 1.1, "supervised model\nfinds what users choose\nonerec sft", DECODER, 9)
    box(axis, 2.7, 0.45, 2.1, 1.1, "reward model\nsays what they value\nonerec reward", CONTEXT, 9)
    box(axis, 5.5, 2.75, 2.4, 1.1, "candidates of each user:\nbeams or samples\nof the model itself", INPUT, 9)
    box(axis, 5.5, 0.45, 2.4, 1.1, "scores of the candidates", CONTEXT, 9)
    box(axis, 8.6, 2.75, 2.8, 1.1, "IPA: prefer the best to the worst\nonerec dpo", OUTPUT, 9)
    box(
        axis,
        8.6,
        0.45,
        2.8,
        1.1,
        "RL: more of what is above\nthe group's mean, less of the rest\nonerec grpo",
        OUTPUT,
        9,
    )
    for start, end in (
        ((2.0, 2.5), (2.7, 3.2)),
        ((2.0, 1.8), (2.7, 1.1)),
        ((4.8, 3.3), (5.5, 3.3)),
        ((4.8, 1.0), (5.5, 1.0)),
        ((6.7, 2.75), (6.7, 1.55)),
        ((7.9, 1.25), (8.6, 2.9)),
        ((7.9, 1.0), (8.6, 1.0)),
    ):
        arrow(axis, start, end)
    axis.plot((10.0, 10.0, 6.7), (3.85, 4.12, 4.12), color="#5b6770", lw=1.1)
    arrow(axis, (6.7, 4.12), (6.7, 3.85))
    axis.text(8.3, 4.2, "the next round starts from the aligned model", fontsize=9, ha="center", va="bottom")
    axis.plot((1.05, 1.05, 10.0), (1.6, 0.15, 0.15), color="#5b6770", lw=1.1, ls="--")
    arrow(axis, (10.0, 0.15), (10.0, 0.45))
    axis.text(5.6, 0.2, "or straight from the log, without a reward model", fontsize=9, ha="center", va="bottom")
    axis.set(xlim=(0, 11.5), ylim=(0.02, 4.5))
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(FOLDER / "alignment.png", dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    semantic_ids()
    alignment()
