"""Lifelong compression of one simulated user: seconds, number of clusters and peak memory by the maximum cluster size
M.

    OMP_NUM_THREADS=1 python benchmarks/lifelong.py --events 100000 --dim 64 --sizes 100 200 \\
        --output outputs/lifelong.json

Views by a power law (exponent .5) over 50,000 videos whose embeddings are a mixture of 300 Gaussians, normalised.
Processor seconds are what the machine's other jobs change least; the median of the repeats counts.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from statistics import median

import datasets
import numpy as np

from onerec_hf.data import compress_lifelong


def simulated_user(events: int, dim: int, seed: int, num_items: int = 50_000) -> tuple[datasets.Dataset, np.ndarray]:
    """One row with a history, and the item embeddings (N, D)."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(300, dim))
    embeddings = centres[rng.integers(0, 300, num_items)] + 0.7 * rng.normal(size=(num_items, dim))
    embeddings = (embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)).astype(np.float32)
    weight = np.arange(1, num_items + 1) ** -0.5
    row = {"user": [0], "history": [rng.choice(num_items, events, p=weight / weight.sum())]}
    row |= {"timestamp": [np.sort(rng.integers(0, 10**12, events))], "is_like": [rng.integers(0, 2, events)]}
    row |= {name: [rng.integers(0, 60_000, events)] for name in ("play_time_ms", "duration_ms")}
    return datasets.Dataset.from_dict(row), embeddings


def main(events: int, dim: int, sizes: list[int], repeats: int, seed: int) -> list[dict]:
    """One report per maximum cluster size."""
    split, embeddings = simulated_user(events, dim, seed)
    reports = []
    for size in sizes:
        seconds, processor = [], []
        for _ in range(repeats):
            wall, own = time.perf_counter(), time.process_time()
            rows = compress_lifelong(split, embeddings, sparse=["is_like"], max_cluster_size=size, seed=seed)
            seconds.append(time.perf_counter() - wall)
            processor.append(time.process_time() - own)
        report = {"events": events, "dim": dim, "M": size, "clusters": len(rows[0]["lifelong"])}
        report |= {"seconds": median(seconds), "processor_seconds": median(processor)}
        reports.append(report | {"peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20})
        print(report)
    return reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(main(**arguments), indent=2))
