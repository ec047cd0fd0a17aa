"""A catalogue of many items: seconds and bytes of its index, of a subset mask, and a search that is checked.

    OMP_NUM_THREADS=1 python benchmarks/catalogue.py --items 1000000 10000000 100000000 --output outputs/catalogue.json

Semantic IDs of 3 levels with 8,192 codes each, drawn with a skew (a code is the square of a uniform number, so that
some are many times as frequent as others), an item for every row. `build` is `Catalogue(...)`; `subset` is what a
search needs of a mask of half of the items (`allowed_items`), for one user; both in processor seconds. `index` is what
the search reads: codes and children of all nodes, and the items of the leaves. The model is small and untrained: what
is checked is the index. A search with 512 beams among 200 allowed items prunes nothing, so it must find the ten items
of the largest probability, which are computed one by one; and every item of a search among half of the items must be
one of these. One process for each size, whose peak of memory is the operating system's.
"""

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import torch

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM

SIZES = [8192] * 3


def index_bytes(catalogue: Catalogue) -> int:
    parts = [*catalogue.codes, *catalogue.surplus, catalogue.item_order]
    return sum(part.numel() * part.element_size() for part in parts)


@torch.no_grad()
def check(model: OneRecV2ForCausalLM, rng: np.random.Generator, mask: torch.Tensor) -> float:
    """Searches among few items and among those of `mask` (1, N); returns seconds of the second, its mask included."""
    catalogue = model.catalogue
    context = {"context_ids": torch.from_numpy(rng.integers(0, 8192, (1, 8, 3))) + torch.tensor([4, 8196, 16388])}
    few = torch.from_numpy(rng.choice(catalogue.num_items, 200, replace=False))
    allowed = torch.zeros(1, catalogue.num_items, dtype=torch.bool)
    allowed[0, few] = True
    found = model.recommend_items(10, num_beams=512, allowed_items=allowed, **context)
    targets = catalogue.semantic_ids[few].long() + torch.tensor(model.config.level_offsets)
    scores = model(**context, target_ids=targets[None]).target_log_probs[0].sum(1)
    best = scores.topk(10)
    assert set(found.items[0].tolist()) == set(few[best.indices].tolist()), "the search missed one of the best items"
    torch.testing.assert_close(found.scores[0], best.values, rtol=1e-4, atol=1e-4)
    start = time.process_time()
    found = model.recommend_items(100, num_beams=128, allowed_items=mask, **context)
    seconds = time.process_time() - start
    assert bool(mask[0, found.items[0]].all()) and len(set(found.items[0].tolist())) == 100, "an item not allowed"
    return seconds


def measure(items: int, seed: int, results: multiprocessing.Queue) -> None:
    """One size, in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    config = OneRecV2Config(
        codebook_sizes=SIZES, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        context_embed_dim=16, initializer_range=0.3,
    )  # fmt: skip
    model = OneRecV2ForCausalLM(config).eval()
    codes = np.empty((items, 3), dtype=np.int16)
    for level in range(3):
        codes[:, level] = rng.random(items, dtype=np.float32) ** 2 * 8192
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    model.catalogue = catalogue = Catalogue(codes, SIZES)
    row = {"items": items, "build": time.process_time() - start, "index": index_bytes(catalogue)}
    row |= {"bytes per item": row["index"] / items, "semantic IDs": catalogue.num_semantic_ids}
    row["peak over the start"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
    mask = torch.from_numpy(rng.random(items, dtype=np.float32) < 0.5)[None]
    start = time.process_time()
    catalogue.node_masks(mask)
    row["subset"] = time.process_time() - start
    row["search with a subset"] = check(model, rng, mask)
    results.put(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/catalogue.json"))
    args = parser.parse_args()
    rows, spawn = [], multiprocessing.get_context("spawn")
    for items in args.items:
        results = spawn.Queue()
        process = spawn.Process(target=measure, args=(items, args.seed, results))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{items} items failed with exit code {process.exitcode}")
        rows.append(results.get())
        print(json.dumps(rows[-1]), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
