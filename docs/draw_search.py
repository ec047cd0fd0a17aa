"""Draws docs/search.png, one real recommendation of the quickstart: history, semantic IDs, beam tree, items.

python docs/draw_search.py --repo outputs/quickstart/onerec-v2-quickstart --log outputs/quickstart
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from draw_architecture import CONTEXT, DECODER, INPUT, OUTPUT, arrow, box
from transformers import AutoModel, AutoTokenizer

import onerec_hf  # noqa: F401  registers the models

BEAMS, SHOWN = 3, 4
KEPT, DROPPED = "#0072b2", "#b8c0c8"  # blue and grey differ in brightness as well


def beam_tree(log_probs: np.ndarray, codes: np.ndarray) -> list[list[tuple]]:
    """Of every level the most probable children of the kept prefixes, best first: (prefix, probability)."""
    levels, kept = [], [()]
    for level in range(codes.shape[1]):
        found = {}
        for item, prefix in enumerate(map(tuple, codes[:, : level + 1].tolist())):
            if prefix[:-1] in kept:
                found[prefix] = float(np.exp(log_probs[item, : level + 1].sum()))
        levels.append(sorted(found.items(), key=lambda entry: -entry[1])[:SHOWN])
        kept = [prefix for prefix, _ in levels[-1][:BEAMS]]
    return levels


def search(repo: str, log: Path, user: int, length: int) -> dict[str, Any]:
    """The history of a user, with codes and titles, and the tree of a search of `BEAMS` beams."""
    model, tokenizer = AutoModel.from_pretrained(repo).eval(), AutoTokenizer.from_pretrained(repo)
    events = pd.read_parquet(log / "log.parquet")
    titles = pd.read_parquet(log / "videos.parquet").set_index("video_id").title
    items = events[events.user_id == user].sort_values("time_ms").video_id.tolist()[-length:]
    known = model.catalogue.item_ids.tolist()
    tokens = torch.tensor(tokenizer.encode_items(known))
    context = torch.tensor(tokenizer.encode_items(items)).unsqueeze(0)
    with torch.no_grad():
        log_probs = model(context_ids=context, target_ids=tokens.unsqueeze(0)).target_log_probs[0].numpy()
    codes = (tokens - torch.tensor(model.config.level_offsets)).numpy()
    places = {item: i for i, item in enumerate(known)}
    title_of = {tuple(code): titles[item] for code, item in zip(codes.tolist(), known)}
    history = [(titles[item], tuple(codes[places[item]].tolist())) for item in items]
    return {"history": history, "tree": beam_tree(log_probs, codes), "titles": title_of}


def short(title: str) -> str:
    """The part of a simulated title that says what the video is about."""
    return title.split(",")[0]


def draw(found: dict[str, Any], path: Path) -> None:
    """History at the left, the tree in the middle, items at the right."""
    figure, axis = plt.subplots(figsize=(11.5, 4.3))
    for x, text in ((1.35, "1  what a user watched"), (3.35, "2  as codes"), (6.4, "3  beam search, three beams")):
        axis.text(x, 4.3, text, ha="center", fontsize=11, weight="bold")
    axis.text(10.15, 4.3, "4  items", ha="center", fontsize=11, weight="bold")
    rows = np.linspace(3.7, 0.75, len(found["history"]))
    for y, (title, codes) in zip(rows, found["history"]):
        box(axis, 0.05, y - 0.27, 2.6, 0.54, short(title), INPUT, 9)
        box(axis, 2.85, y - 0.27, 1.0, 0.54, " ".join(map(str, codes)), CONTEXT, 9.5)
        arrow(axis, (2.65, y), (2.85, y))
    box(axis, 4.15, 0.48, 0.72, 3.5, "model\n\nreads\nthe\ncodes,\nwrites\nthe\nnext", DECODER, 9.5)
    arrow(axis, (3.85, 2.22), (4.15, 2.22))
    columns, places = (5.2, 6.35, 7.5), {(): (4.87, 2.22)}
    for x, nodes in zip(columns, found["tree"]):
        for i, (y, (prefix, probability)) in enumerate(zip(np.linspace(3.75, 0.7, len(nodes)), nodes)):
            kept = i < BEAMS
            begin, color = places[prefix[:-1]], KEPT if kept else DROPPED
            axis.plot((begin[0], x), (begin[1], y), color=color, lw=1 + 9 * probability, zorder=0)
            box(axis, x, y - 0.24, 0.72, 0.48, f"{prefix[-1]}\n{100 * probability:.1f}%", "white", 8.5)
            if kept:
                places[prefix] = (x + 0.72, y)
        axis.text(x + 0.36, 0.2, f"level {len(prefix)}", ha="center", fontsize=9)
    for prefix, _ in found["tree"][-1][:BEAMS]:
        x, y = places[prefix]
        box(axis, 8.75, y - 0.27, 2.7, 0.54, short(found["titles"][prefix]), OUTPUT, 9)
        arrow(axis, (x, y), (8.75, y))
    axis.text(9.9, 0.62, "grey: looked at and dropped", fontsize=8.5, ha="center", color="#5b6770")
    axis.text(9.9, 0.36, "only codes of existing items are looked at", fontsize=8.5, ha="center", color="#5b6770")
    axis.set(xlim=(0, 11.5), ylim=(0.05, 4.5))
    axis.axis("off")
    figure.tight_layout(pad=0.2)
    figure.savefig(path, dpi=130)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", default="outputs/quickstart/onerec-v2-quickstart")
    parser.add_argument("--log", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--user", type=int, default=0)
    arguments = parser.parse_args()
    draw(search(arguments.repo, arguments.log, arguments.user, 4), Path(__file__).parent / "search.png")
