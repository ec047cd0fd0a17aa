"""What the generation benchmarks share: catalogues, the dict trie of public code, alternating timing, the machine's speed, bars."""

import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch


def zipf_catalogue(num_items: int, codebook_size: int, levels: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Distinct semantic IDs (num_items, levels) whose codes follow a Zipf law of their own per level; exponent 0 is uniform."""
    generator = np.random.default_rng(seed)
    weight = np.arange(1, codebook_size + 1) ** -exponent
    numbers, found = generator.permuted(np.tile(np.arange(codebook_size), (levels, 1)), axis=1), np.zeros(0, np.int64)
    while len(found) < num_items:
        key = np.zeros(num_items, dtype=np.int64)
        for level in range(levels):
            drawn = generator.choice(codebook_size, num_items, p=weight / weight.sum())
            key = key * codebook_size + numbers[level][drawn]
        found = np.unique(np.concatenate([found, key]))
    found = generator.permutation(found)[:num_items]
    return np.stack([found // codebook_size**level % codebook_size for level in reversed(range(levels))], axis=1)


def read_catalogue(path: Path, column: str) -> np.ndarray:
    """Semantic IDs (N, L) of a parquet file, without repetitions and without the items that have none."""
    return np.unique(np.stack(pd.read_parquet(path)[column].dropna().to_numpy()).astype(np.int64), axis=0)


def dict_trie(codes: np.ndarray, offsets: list[int]) -> dict:
    root: dict = {}
    for row in (codes + np.array(offsets)).tolist():
        node = root
        for token in row:
            node = node.setdefault(token, {})
    return root


def allowed_tokens(trie: dict, prompt_length: int = 1):
    """`prefix_allowed_tokens_fn` as public code writes it, behind a prompt of so many tokens."""

    def allowed(_, ids):
        node = trie
        for token in ids.tolist()[prompt_length:]:
            node = node.get(token)
            if node is None:
                return [0]  # a dead beam must return something
        return list(node)

    return allowed


def alternate(ways: dict, repeats: int) -> tuple[dict[str, float], dict[str, float]]:
    """Processor seconds of each way, median and least; they alternate and the wall clock does not count: machines are shared."""
    seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            way()
            seconds[name].append(time.process_time() - start)
    return {name: median(values) for name, values in seconds.items()}, {
        name: min(values) for name, values in seconds.items()
    }


def machine_flops() -> float:
    """Floating-point operations per second of a large matrix product on this machine, now: the best of 10."""
    left = torch.randn(1024, 1024)
    best = float("inf")
    for _ in range(10):
        start = time.process_time()
        left @ left
        best = min(best, time.process_time() - start)
    return 2 * 1024**3 / best


def bars(path: Path, rows: list[dict], label, title: str) -> None:
    """One group of bars per row: seconds of each way on a logarithmic axis, with the ratio to ours above it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(name for row in rows for name in row["seconds"]))
    names = [*(name for name in names if name != "ours"), "ours"]
    figure, axis = plt.subplots(figsize=(max(8, 1.5 * len(rows)), 5))
    for i, name in enumerate(names):
        place = [
            j + (i - (len(names) - 1) / 2) * 0.8 / len(names) for j, row in enumerate(rows) if name in row["seconds"]
        ]
        values = [row["seconds"][name] for row in rows if name in row["seconds"]]
        ours = [row["seconds"]["ours"] for row in rows if name in row["seconds"]]
        drawn = axis.bar(place, values, 0.8 / len(names), label=name, color=f"C{i}" if name != "ours" else "black")
        ratios = [f"{value / own:.1f}x" for value, own in zip(values, ours)]
        axis.bar_label(drawn, ratios if name != "ours" else None, fmt="", fontsize=7, rotation=90, padding=2)
    axis.set_yscale("log")
    axis.margins(y=0.2)
    axis.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=8)
    axis.set_ylabel("seconds of one processor")
    axis.set_title(title)
    axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
