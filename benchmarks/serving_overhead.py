"""What `Recommender.recommend` costs beside the search of the model: reading ids, collating, naming the found items.

    python benchmarks/serving_overhead.py

Both ways search for the same users in one run, in turns; the ratio of their processor seconds is what counts.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.other_ways import alternate, zipf_catalogue
from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.collators.histories import history_rows
from onerec_hf.recommender import ItemRanker, Recommender


def served(num_items: int, text_ids: bool, hidden_size: int) -> Recommender:
    """A recommender with random weights; every item has a title."""
    sizes = [256, 256, 256]
    ids = [f"item-{i}" for i in range(num_items)] if text_ids else range(10**6, 10**6 + num_items)
    catalogue = Catalogue(zipf_catalogue(num_items, 256, 3, exponent=0.5), sizes, ids)
    torch.manual_seed(0)
    model = OneRecV2ForCausalLM(
        OneRecV2Config(codebook_sizes=sizes, hidden_size=hidden_size, intermediate_size=4 * hidden_size)
    ).eval()
    model.catalogue = catalogue
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    metadata = {item: {"title": f"Title {i}"} for i, item in enumerate(catalogue.item_ids.tolist())}
    return Recommender(ItemRanker(model, OneRecCollator(tokens, 50)), metadata)


def overhead(recommender: Recommender, num_users: int, repeats: int, k: int = 10) -> dict[str, float]:
    """Milliseconds of a call and of its search alone, and their ratio."""
    catalogue, generator = recommender.model.catalogue, np.random.default_rng(0)
    histories = catalogue.item_ids[generator.integers(len(catalogue), size=(num_users, 50))].tolist()
    collator = recommender.ranker.collator
    context = collator.context(history_rows(catalogue, collator.for_users({}, num_users), histories, {}))
    ways = {
        "recommend": lambda: recommender.recommend(histories, k),
        "search": lambda: recommender.model.recommend_items(k, num_beams=50, **context),
    }
    median, _ = alternate(ways, repeats)
    return {
        **{name: 1000 * seconds for name, seconds in median.items()},
        "ratio": median["recommend"] / median["search"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args()
    for text_ids in (False, True):
        recommender = served(arguments.num_items, text_ids, arguments.hidden_size)
        for users in arguments.users:
            found = overhead(recommender, users, arguments.repeats)
            kind = "text" if text_ids else "integers"
            numbers = f"{found['recommend']:8.1f} ms, search {found['search']:8.1f} ms, ratio {found['ratio']:.3f}"
            print(f"{kind:8} {users:4} users: {numbers}", flush=True)


if __name__ == "__main__":
    main()
