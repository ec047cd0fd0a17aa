"""What the generation benchmarks share: catalogues, the dict trie of public code, alternating timing, the machine's
speed.
"""

import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


def zipf_catalogue(num_items: int, codebook_size: int, levels: int, exponent: float, seed: int = 0) -> np.ndarray:
    """Distinct semantic IDs (num_items, levels) whose codes follow a Zipf law of their own per level; exponent 0 is
    uniform.
    """
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
    """Processor seconds of each way, median and least; they alternate and the wall clock does not count: machines are
    shared.
    """
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


def count_flops(way):
    """What `way()` returns, and the floating-point operations of its matrix products."""
    # torch's counter does not know the attention kernel of a CPU
    attention = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
            lambda query, key, value, *args, **kwargs: sdpa_flop_count(query, key, value)
        )
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        result = way()
    return result, counter.get_total_flops()
