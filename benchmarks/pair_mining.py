"""What a round of pair mining costs (OneRec, Algorithm 2), per 1,000 users: this package's search against
transformers' generate.

    python benchmarks/pair_mining.py --output outputs/pair_mining.json

`mine_pairs` with a OneRec-V2 of 4 layers and d=256: N = 128 candidates of each user by constrained beam search, a
P-Score that picks best and worst, their log-probabilities. `transformers` is the same with `model.generate` replaced
by transformers' own beam search under a dict trie, which must lead to the same pairs first. Seconds are processor time
of one thread, medians, alternating.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from generate import make_model, ways_of
from other_ways import alternate, dict_trie, zipf_catalogue

from onerec_hf import Catalogue, OneRecPScoreConfig, OneRecPScoreModel
from onerec_hf.collators import OneRecCollator, RewardCollator
from onerec_hf.rewards import reward_of_model
from onerec_hf.trainers.pair_mining import mine_pairs


def main(num_items: int, users: int, context: int, candidates: int, repeats: int, output: Path) -> dict:
    """Runs both; returns what it writes."""
    torch.set_num_threads(1)
    sizes = [8192] * 3
    catalogue = Catalogue(zipf_catalogue(num_items, sizes[0], len(sizes), 0.5), sizes)
    policy = make_model("OneRecV2ForCausalLM", sizes, {})
    policy.catalogue, offsets = catalogue, policy.config.level_offsets
    tokens = catalogue.semantic_ids.numpy() + offsets
    # the histories of `ways_of`
    items = torch.randint(num_items, (users, context), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"user": i, "history": history, "targets": history[-1:]} for i, history in enumerate(items)]
    collator = OneRecCollator(tokens, max_history=context)
    judge = RewardCollator(tokens, max_history=context, targets=["swt"], session_wise=False)
    torch.manual_seed(0)
    reward_model = OneRecPScoreModel(OneRecPScoreConfig(codebook_sizes=sizes, targets=["swt"]))
    reward = reward_of_model(reward_model, judge, policy)
    searches = ways_of(
        policy, catalogue, dict_trie(catalogue.semantic_ids.numpy(), offsets), users, context, candidates
    )

    def mined(generate) -> list[dict]:
        policy.generate = generate
        return mine_pairs(policy, rows, list(range(users)), collator, reward, candidates, batch_size=users)[0]

    own = policy.generate
    ways = {
        "ours": partial(mined, own),
        "transformers": partial(mined, lambda **_: searches["dict trie"]()["sequences"]),
    }
    pairs = [[(pair["chosen"], pair["rejected"]) for pair in way()] for way in ways.values()]
    if pairs[0] != pairs[1]:
        raise AssertionError("the two searches led to other pairs.")
    ways |= {"generation, ours": searches["ours"], "generation, transformers": searches["dict trie"]}
    report = {name: value * 1000 / users for name, value in alternate(ways, repeats)[0].items()}
    report["ratio"] = report["transformers"] / report["ours"]
    for name, value in report.items():
        print(f"{name}: {value:.1f}" + ("x" if name == "ratio" else " s per 1,000 users"))
    report["arguments"] = {"num_items": num_items, "users": users, "context": context, "candidates": candidates}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_items", type=int, default=100_000)
    parser.add_argument("--users", type=int, default=16, help="Users of a batch.")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--candidates", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("outputs/pair_mining.json"))
    main(**vars(parser.parse_args()))
