"""Draws the two pictures of docs/architecture.md.

python docs/draw_architecture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

FOLDER = Path(__file__).parent
INPUT, CONTEXT, DECODER, OUTPUT = "#eef2f7", "#dbe9f6", "#e3f1df", "#fbead1"


def box(axis, x, y, width, height, text, color, size=9.3):
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=.08", fc=color, ec="#5b6770", lw=0.9
    )
    axis.add_patch(patch)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, linespacing=1.35)


def arrow(axis, start, end, text="", style="-|>"):
    axis.annotate("", end, start, arrowprops={"arrowstyle": style, "color": "#5b6770", "lw": 1.1})
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axis.text(x + 0.06, y, text, fontsize=9, color="#39434a", va="center")


def systems() -> None:
    """The three systems side by side, from the context at the bottom to the items at the top."""
    figure, axis = plt.subplots(figsize=(11.5, 6.6))
    behaviours = "codes and features\nof the history,\n{},\nbehind a static slot"
    encoder = "encoder:\nfull self-attention;\nkeys and values for\nevery decoder block"
    blocks = "blocks:\n{},\n{},\nfeed-forward\nor experts"
    own_first = blocks.format("self-attention", "attention to context")
    context_first = blocks.format("attention to context", "self-attention")
    lazy = "one linear map,\nRMSNorm; keys (values\nthe same) shared by\ngroups of blocks"
    pathways = "pathways side by side:\nstatic, short-term,\npositive feedback,\nlifelong (QFormer)"
    columns = (
        (
            "OneRec\nencoder-decoder, a session at a time",
            behaviours.format("one token per code"),
            encoder,
            "m x [BOS, s1, s2, s3]:\nthe items of a session",
            own_first,
            "the best sessions of m items",
        ),
        (
            "OneRecV1 (Technical Report)\nencoder-decoder, four pathways",
            pathways,
            encoder,
            "[BOS, s1, s2, s3]:\none item",
            own_first,
            "the best items",
        ),
        (
            "OneRec-V2\nlazy decoder-only",
            behaviours.format("one vector per item"),
            lazy,
            "n x [BOS, s1, s2, s3]:\nall targets of a user\nin one pass",
            context_first,
            "the best items",
        ),
    )
    for i, (title, context, keys, tokens, decoder, result) in enumerate(columns):
        x = 0.2 + 3.75 * i
        axis.text(x + 2.0, 6.25, title, ha="center", va="center", fontsize=11, weight="bold", linespacing=1.4)
        box(axis, x, 0.2, 1.65, 1.25, context, INPUT, 9)
        box(axis, x, 1.85, 1.65, 1.6, keys, CONTEXT, 9)
        box(axis, x + 1.85, 0.2, 1.6, 1.25, tokens, INPUT, 9)
        box(axis, x + 1.85, 1.85, 1.6, 1.6, decoder, DECODER, 9)
        box(axis, x + 0.55, 3.85, 2.9, 0.62, "head: softmax within the level\n(level_log_probs)", DECODER, 9.5)
        box(axis, x + 0.55, 4.75, 2.9, 0.5, "beam search over the catalogue", OUTPUT, 9.5)
        box(axis, x + 0.55, 5.45, 2.9, 0.38, result, OUTPUT, 9.5)
        arrow(axis, (x + 0.82, 1.45), (x + 0.82, 1.85))
        arrow(axis, (x + 1.65, 2.5), (x + 1.85, 2.5))
        arrow(axis, (x + 2.65, 1.45), (x + 2.65, 1.85))
        arrow(axis, (x + 2.65, 3.45), (x + 2.65, 3.85))
        arrow(axis, (x + 2.0, 4.47), (x + 2.0, 4.75))
        arrow(axis, (x + 2.0, 5.25), (x + 2.0, 5.45))
    axis.set(xlim=(0, 11.4), ylim=(0, 6.6))
    axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(FOLDER / "systems.png", dpi=130)
    plt.close(figure)


def data_way() -> None:
    """From a log to what is served, with the command of each step."""
    figure, axis = plt.subplots(figsize=(11.5, 4.3))
    box(axis, 0.2, 2.4, 1.5, 0.9, "log of events\n(parquet, CSV, JSONL)", INPUT)
    box(axis, 0.2, 1.1, 1.5, 0.9, "items: text or\nembeddings", INPUT)
    box(
        axis,
        2.9,
        1.2,
        2.0,
        2.1,
        "data folder\n\nsplits, items, users,\nembeddings, codebooks,\ntokenizer with catalogue",
        CONTEXT,
    )
    box(axis, 6.1, 2.75, 1.9, 0.85, "model folder (policy)\nmodel, catalogue, collator", DECODER)
    box(axis, 6.1, 0.55, 1.9, 0.85, "reward model folder\nmodel, catalogue, collator", DECODER)
    box(axis, 9.3, 1.65, 1.9, 0.85, "aligned model folder", DECODER)
    box(axis, 9.3, 3.3, 1.9, 0.75, "Recommender, pipeline,\ngenerate, the Hub", OUTPUT)
    arrow(axis, (1.7, 2.75), (2.9, 2.5))
    arrow(axis, (1.7, 1.6), (2.9, 1.9))
    axis.text(2.28, 2.2, "onerec\nprepare", fontsize=9, family="monospace", ha="center", va="center")
    arrow(axis, (4.9, 2.6), (6.1, 3.1))
    axis.text(5.45, 3.1, "onerec sft", fontsize=9, family="monospace", ha="center")
    arrow(axis, (4.9, 1.7), (6.1, 1.05))
    axis.text(5.4, 1.0, "onerec reward", fontsize=9, family="monospace", ha="center")
    arrow(axis, (8.0, 3.0), (9.3, 2.3))
    arrow(axis, (8.0, 1.05), (9.3, 1.85))
    axis.text(8.6, 2.1, "onerec dpo\nonerec grpo", fontsize=9, family="monospace", ha="center", va="center")
    arrow(axis, (8.0, 3.4), (9.3, 3.65))
    arrow(axis, (10.25, 2.5), (10.25, 3.3))
    axis.set(xlim=(0, 11.4), ylim=(0.3, 4.2))
    axis.axis("off")
    figure.tight_layout(pad=0.3)
    figure.savefig(FOLDER / "data_way.png", dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    systems()
    data_way()
