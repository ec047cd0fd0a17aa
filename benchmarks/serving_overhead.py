"""What `Recommender.recommend` costs beside the search of the model: reading ids, collating, naming the found items.

    python benchmarks/serving_overhead.py
    python benchmarks/serving_overhead.py --repo outputs/mymodel --users 1 16 64     # with and without its re-ranker
    python benchmarks/serving_overhead.py --repo outputs/mymodel --reward outputs/reward --users 1 16    # best of K

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
from onerec_hf.rewards import RewardModel

CANDIDATES = (16, 64, 512)


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


def reranking(recommender: Recommender, num_users: int, repeats: int, k: int = 10) -> dict[str, float]:
    """Milliseconds of `recommend` with the repository's re-ranker and without, and their ratio."""
    items, generator = recommender.model.catalogue.item_ids, np.random.default_rng(0)
    histories = items[generator.integers(len(items), size=(num_users, 30))].tolist()
    median, _ = alternate(
        {
            "re-ranked": lambda: recommender.recommend(histories, k),
            "search": lambda: recommender.recommend(histories, k, rerank=False),
        },
        repeats,
    )
    return {name: 1000 * seconds for name, seconds in median.items()} | {
        "ratio": median["re-ranked"] / median["search"]
    }


def selection(recommender: Recommender, reward: RewardModel, num_users: int, repeats: int, k: int = 10) -> dict:
    """Milliseconds of `recommend` with a reward model that picks from K candidates, by K; 0 is the search alone."""
    items, generator = recommender.model.catalogue.item_ids, np.random.default_rng(0)
    histories = items[generator.integers(len(items), size=(num_users, 30))].tolist()

    def call(candidates: int):
        if not candidates:
            return lambda: recommender.recommend(histories, k, rerank=False)
        return lambda: recommender.recommend(histories, k, item_scorer=reward, num_candidates=candidates)

    median, _ = alternate({candidates: call(candidates) for candidates in (0, *CANDIDATES)}, repeats)
    return {f"best of {n}" if n else "search": 1000 * seconds for n, seconds in median.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--users", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--repo", help="A repository of `onerec rerank`, in place of random weights.")
    parser.add_argument("--reward", help="A reward model of --repo's items: the cost of selection by it instead.")
    arguments = parser.parse_args()
    if arguments.repo:
        recommender = Recommender.from_pretrained(arguments.repo)
        reward = RewardModel.from_pretrained(arguments.reward) if arguments.reward else None
        for users in arguments.users:
            if reward is None:
                found = reranking(recommender, users, arguments.repeats)
            else:
                found = selection(recommender, reward, users, arguments.repeats)
            print(f"{users:4} users: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        return
    for text_ids in (False, True):
        recommender = served(arguments.num_items, text_ids, arguments.hidden_size)
        for users in arguments.users:
            found = overhead(recommender, users, arguments.repeats)
            kind = "text" if text_ids else "integers"
            numbers = f"{found['recommend']:8.1f} ms, search {found['search']:8.1f} ms, ratio {found['ratio']:.3f}"
            print(f"{kind:8} {users:4} users: {numbers}", flush=True)


if __name__ == "__main__":
    main()
