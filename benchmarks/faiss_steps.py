"""The step of balanced k-means that Faiss could take over: the nearest centroid, and the 16 cheapest, of every item.

    python benchmarks/faiss_steps.py --cases 100000x256 100000x1024 50000x8192

`pip install faiss-cpu` first: the package does not need it. One thread. Prints processor seconds of the package's own
step and of Faiss's exact index in the same run (the faster of two), the share of equal answers, and the share of such
steps in a whole level of the fit.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import faiss
import numpy as np
import torch

from onerec_hf.semantic_ids import kmeans
from onerec_hf.semantic_ids.balance import cheapest
from onerec_hf.semantic_ids.residual import ResidualKMeans

WIDTH = 128


def seconds(step: Callable[[], Any]) -> tuple[float, Any]:
    best = float("inf")
    for _ in range(2):
        start = time.process_time()
        found = step()
        best = min(best, time.process_time() - start)
    return best, found


def with_faiss(items: np.ndarray, centroids: np.ndarray, prices: np.ndarray, count: int) -> np.ndarray:
    """A price is one more coordinate of the centroid: its square is added to the distance."""
    items = np.concatenate([items, np.zeros((len(items), 1), np.float32)], axis=1)
    index = faiss.IndexFlatL2(WIDTH + 1)
    index.add(np.concatenate([centroids, np.sqrt(prices)[:, None]], axis=1))
    return index.search(items, count)[1]


def share_in_fit(items: torch.Tensor, size: int) -> float:
    """Of the processor seconds of a level, those in the steps that Faiss could take over."""
    spent = {"steps": 0.0}

    def timed(step: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            found = step(*arguments)
            spent["steps"] += time.process_time() - start
            return found

        return call

    kmeans.nearest_centroids, kmeans.cheapest = timed(kmeans.nearest_centroids), timed(kmeans.cheapest)
    start = time.process_time()
    ResidualKMeans(1, size, num_full_iterations=1).fit(items)
    return spent["steps"] / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=["100000x256"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    own = kmeans.nearest_centroids, kmeans.cheapest
    print("| items x codes | nearest: own | Faiss | 16 cheapest: own | Faiss | equal | share of a level |")
    print("|---" * 7 + "|")
    for case in args.cases:
        rows, size = map(int, case.split("x"))
        draw = np.random.default_rng(0)
        items, prices = draw.normal(size=(rows, WIDTH)).astype(np.float32), draw.random(size, np.float32)
        tensors = torch.from_numpy(items), torch.from_numpy(items[:size]), torch.from_numpy(prices)
        nearest, _ = seconds(partial(kmeans.nearest_centroids, *tensors[:2]))
        faiss_nearest, _ = seconds(partial(with_faiss, items, items[:size], 0 * prices, 1))
        sixteen, (_, clusters) = seconds(partial(cheapest, *tensors))
        faiss_sixteen, found = seconds(partial(with_faiss, items, items[:size], prices, 16))
        equal = (clusters.T.numpy() == found).mean()
        share = share_in_fit(tensors[0], size)
        kmeans.nearest_centroids, kmeans.cheapest = own
        times = (nearest, faiss_nearest, sixteen, faiss_sixteen)
        print(f"| {case} | " + " | ".join(f"{value:.3f}" for value in times) + f" | {equal:.5f} | {share:.3f} |")


if __name__ == "__main__":
    main()
