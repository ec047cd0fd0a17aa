r"""Balanced residual k-means: time and entropy of a large fit, and time and inertia against `k-means-constrained` in
the same run.

    python benchmarks/semantic_ids.py --output outputs/semantic_ids.json
    python benchmarks/semantic_ids.py --memory 1000000 --dim 256 --output outputs/semantic_ids_memory.json
    python benchmarks/semantic_ids.py --exactness --embeddings outputs/beauty/item_embeddings.safetensors \
        --output outputs/exactness.json

The first command fits 100,000 x 384 items with 3 levels of 256 codes, balanced and plain, and reports entropy per
level for the codes of training (balanced) and for the nearest centroids of the same items (the rule for new items).
Then one level of 5,000 x 64 items and 64 codes: ours, `k-means-constrained` (PyPI: exact min-cost flow in every
iteration) with as many iterations, and Algorithm 1 of arXiv:2502.18965 as printed; every seed in turn, medians of time
and means of inertia. `assignment gap` is our final assignment against the exact one for the same centroids. The second
command fits that many items in a process of its own and reports peak memory beyond the embeddings. The third one
compares on small cases with the exact assignment: the prices alone and the prices with exchanges, both for the
starting centroids, and the whole fit, ours and Algorithm 1 as printed, against Lloyd's algorithm with exact
assignments from the same start.
"""

import argparse
import json
import os
import platform
import resource
import time
from pathlib import Path
from statistics import mean, median

import torch
from safetensors.torch import load_file

from onerec_hf.semantic_ids import ResidualKMeans, quality_report
from onerec_hf.semantic_ids.balance import Prices, balanced_sizes, cheapest, enforce_sizes
from onerec_hf.semantic_ids.exchange import exchange_items
from onerec_hf.semantic_ids.kmeans import cluster_means, train_codebook


def mixture(num_items: int, width: int, components: int, spread: float, seed: int = 0) -> torch.Tensor:
    """Gaussian mixture (num_items, width): components of unequal weight, centers of standard deviation `spread`, noise
    0.7.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = -torch.rand(components, generator=generator).log()  # a flat Dirichlet
    centers = spread * torch.randn(components, width, generator=generator)
    component = torch.multinomial(weights, num_items, replacement=True, generator=generator)
    items = torch.randn(num_items, width, generator=generator)
    for rows in torch.arange(num_items).split(65_536):
        items[rows] = 0.7 * items[rows] + centers[component[rows]]
    return items


def exact_codes(items: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The cheapest balanced assignment to these centroids (Hungarian method over one column per slot)."""
    from scipy.optimize import linear_sum_assignment

    slots = torch.arange(len(centroids)).repeat_interleave(balanced_sizes(len(items), len(centroids)))
    costs = torch.cdist(items, centroids).square()[:, slots].numpy()
    return slots[linear_sum_assignment(costs)[1]]


def inertia_of(items: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> float:
    return (items - centroids[codes]).square().sum().item()


def fit_inertia(items: torch.Tensor, codebook_size: int, balanced: bool | str, seed: int) -> float:
    """Inertia of 24 iterations, 4 of them over all items."""
    generator = torch.Generator().manual_seed(seed)
    fitted = train_codebook(
        items, codebook_size, balanced=balanced, num_iterations=20, num_full_iterations=4, generator=generator
    )
    return inertia_of(items, *fitted)


def exact_lloyd(items: torch.Tensor, codebook_size: int, seed: int) -> float:
    """Inertia of 24 Lloyd iterations from the same start whose every assignment is exact, the lowest of them."""
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    centroids, lowest = items[order[:codebook_size]].clone(), float("inf")
    for _ in range(24):
        codes = exact_codes(items, centroids)
        centroids, _ = cluster_means(items, codes, centroids)
        lowest = min(lowest, inertia_of(items, centroids, codes))
    return lowest


def exactness(args: argparse.Namespace) -> list[dict]:
    """Our assignment and our fit against exact ones, on three separated clumps, uniform and given embeddings."""
    rows = []
    for name in ("three clumps", "uniform", *([str(args.embeddings)] if args.embeddings else [])):
        for num_items, size in ((600, 8), (2000, 64), (3000, 100)):
            found: dict[str, list[float]] = {key: [] for key in ("prices", "exchanges", "ours", "printed")}
            for seed in range(args.seeds):
                items = some_items(name, num_items, args.embeddings, seed)
                order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
                start, prices = items[order[:size]], Prices(balanced_sizes(num_items, size))
                prices.solve(items, start)
                costs, clusters = cheapest(items, start, prices.values)
                codes, margins = clusters[0].long(), costs[1] - costs[0]
                codes = enforce_sizes(items, start, prices.values, codes, margins, balanced_sizes(num_items, size))
                exact = inertia_of(items, start, exact_codes(items, start))
                found["prices"].append(inertia_of(items, start, codes) / exact - 1)
                found["exchanges"].append(inertia_of(items, start, exchange_items(items, start, codes)) / exact - 1)
                lloyd = exact_lloyd(items, size, seed)
                found["ours"].append(fit_inertia(items, size, True, seed) / lloyd - 1)
                found["printed"].append(fit_inertia(items, size, "greedy", seed) / lloyd - 1)
            rows.append({"embeddings": name, "items": num_items, "codes": size} | found)
            print(rows[-1], flush=True)
    return rows


def some_items(name: str, num_items: int, path: Path | None, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "three clumps":
        centers = 10 * torch.randn(3, 8, generator=generator)
        clump = torch.multinomial(torch.tensor([0.5, 0.3, 0.2]), num_items, replacement=True, generator=generator)
        items = centers[clump] + torch.randn(num_items, 8, generator=generator)
    elif name == "uniform":
        items = torch.rand(num_items, 8, generator=generator)
    else:
        every = next(iter(load_file(str(path)).values())).float()
        items = every[torch.randperm(len(every), generator=generator)[:num_items]]
    return items - items.mean(dim=0)


def large_fit(args: argparse.Namespace) -> list[dict]:
    items = mixture(args.items, args.dim, args.components, spread=0.5)
    rows = []
    for balanced in (True, False):
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            quantizer = ResidualKMeans(args.levels, args.codebook_size, balanced=balanced, seed=args.seed).fit(items)
            seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
        nearest = quantizer.encode(items)
        encode_seconds = time.perf_counter() - start
        for name, codes in (("balanced codes", quantizer.train_codes), ("nearest centroids", nearest)):
            if balanced or name == "nearest centroids":
                row = {"k-means": "balanced" if balanced else "plain", "codes": name, "fit_seconds": min(seconds)}
                row |= {"fit_seconds_all": seconds, "encode_seconds": encode_seconds}
                rows.append(row | quality_report(codes, items, quantizer))
    return rows


def against_constrained(args: argparse.Namespace, spread: float) -> dict:
    from k_means_constrained import KMeansConstrained

    items, size, iterations = mixture(5000, 64, 100, spread), 64, 24
    ours, theirs, printed = [], [], []  # (seconds, inertia)
    gaps = []
    for seed in range(args.seeds):
        generator = torch.Generator().manual_seed(seed)
        start = time.perf_counter()
        centroids, codes = train_codebook(
            items, size, balanced=True, num_iterations=20, num_full_iterations=4, generator=generator
        )
        inertia = (items - centroids[codes]).square().sum().item()
        ours.append((time.perf_counter() - start, inertia))
        gaps.append(inertia / inertia_of(items, centroids, exact_codes(items, centroids)) - 1)
        start = time.perf_counter()
        peer = KMeansConstrained(
            size,
            size_min=len(items) // size,
            size_max=-(-len(items) // size),
            init="random",
            n_init=1,
            max_iter=iterations,
            random_state=seed,
        ).fit(items.numpy())
        theirs.append((time.perf_counter() - start, float(peer.inertia_)))
        start = time.perf_counter()
        inertia = fit_inertia(items, size, "greedy", seed)
        printed.append((time.perf_counter() - start, inertia))
    result = {"spread": spread, "seeds": args.seeds, "assignment_gap": mean(gaps)}
    for name, runs in (("ours", ours), ("k-means-constrained", theirs), ("algorithm 1 as printed", printed)):
        result[name] = {"seconds": median(s for s, _ in runs), "inertia": mean(i for _, i in runs)}
    return result


def memory(args: argparse.Namespace) -> dict:
    gib = 2**20  # ru_maxrss counts KiB on Linux
    items = torch.randn(args.memory, args.dim, generator=torch.Generator().manual_seed(0))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / gib
    start = time.perf_counter()
    ResidualKMeans(args.levels, args.codebook_size, seed=args.seed).fit(items)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / gib
    data = items.numel() * 4 / 2**30
    return {
        "items": args.memory,
        "dim": args.dim,
        "seconds": seconds,
        "embeddings_gib": data,
        "rss_with_embeddings_gib": before,
        "peak_rss_gib": peak,
        "peak_over_embeddings": (peak - before + data) / data,
    }


def print_tables(result: dict) -> None:
    if "memory" in result:
        row = result["memory"]
        print(f"\n{row['items']:,} x {row['dim']} float32: {row['embeddings_gib']:.2f} GiB of embeddings, ", end="")
        print(f"peak RSS {row['peak_rss_gib']:.2f} GiB, {row['seconds']:.0f} s")
        return
    if "exactness" in result:
        print("\n| embeddings | N x K | prices | exchanges | ours / Lloyd | as printed / Lloyd |")
        print("|---|---|---|---|---|---|")
        for row in result["exactness"]:
            cells = [f"{mean(row[key]):+.2%}" for key in ("prices", "exchanges", "ours", "printed")]
            print(f"| {row['embeddings']} | {row['items']} x {row['codes']} | {' | '.join(cells)} |")
        return
    print("\n| k-means | codes | fit, s | entropy, % of ln K | utilisation | relative error | collision rate |")
    print("|---|---|---|---|---|---|---|")
    for row in result["fit"]:
        entropy = " / ".join(f"{value:.2f}" for value in row["entropy_percent"])
        used = " / ".join(f"{value:.3f}" for value in row["utilisation"])
        print(f"| {row['k-means']} | {row['codes']} | {row['fit_seconds']:.1f} | {entropy} | {used} | ", end="")
        print(f"{row['reconstruction_relative']:.4f} | {row['collision_rate']:.3f} |")
    print("\n| spread | method | s | inertia | time / ours | inertia / ours |\n|---|---|---|---|---|---|")
    for peer in result["against k-means-constrained"]:
        ours = peer["ours"]
        for name in ("ours", "k-means-constrained", "algorithm 1 as printed"):
            row = peer[name]
            print(f"| {peer['spread']} | {name} | {row['seconds']:.2f} | {row['inertia']:.0f} | ", end="")
            print(f"{row['seconds'] / ours['seconds']:.1f} | {row['inertia'] / ours['inertia']:.4f} |")
        print(f"| {peer['spread']} | assignment gap to exact | | | | {1 - peer['assignment_gap']:.4f} |")


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--components", type=int, default=1000, help="Gaussians of the mixture")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codebook-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="fits of each kind; the fastest counts")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of the comparison; 0 skips it")
    parser.add_argument("--memory", type=int, metavar="N", help="only measure the memory of a fit of N items")
    parser.add_argument("--exactness", action="store_true", help="only measure what our assignments are dearer than")
    parser.add_argument("--embeddings", type=Path, help="item_embeddings.safetensors for --exactness")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": args.threads,
        "cores": os.cpu_count(),
        "settings": {name: value for name, value in vars(args).items() if not isinstance(value, Path)},
    }
    if args.exactness:
        result["exactness"] = exactness(args)
    elif args.memory:
        result["memory"] = memory(args)
    else:
        result["fit"] = large_fit(args)
        spreads = (1.0, 0.5) if args.seeds else ()  # clusters far apart, clusters that overlap
        result["against k-means-constrained"] = [against_constrained(args, spread) for spread in spreads]
    print_tables(result)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    main()
