"""How long processes wait for one another in a step of training, by the order in which histories are drawn.

    python benchmarks/balance.py --output outputs/balance.json
    python benchmarks/balance.py --data outputs/mydata --processes 2 --batch_size 32

Nothing is trained. The orders are those of `--train_sampling_strategy`; `group_by_length` sorts for a step of all
processes here, and for the batch of one of them in transformers, which stands beside it. The cost of a batch is the
FLOPs of a model (`--size`) with every item as a target, for as many rows and as many items as its longest history. All
processes of a step take as long as the slowest. `waiting` is the share of the processes' time that is spent so,
`padding` the share of the FLOPs that padding takes, and `over needed` the time over that without both. Without
`--data`, lengths are drawn: lognormal around 100, 3,000 items at most.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler
from train import EVERY, build, model_flops
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from onerec_hf.data import DataFolder


def drawn_lengths() -> np.ndarray:
    drawn = np.random.default_rng(0).lognormal(np.log(100), 1.0, 100_000)
    return np.clip(drawn, 2, 3000).astype(int)


def shards_of(order: str, lengths: np.ndarray, processes: int, batch_size: int) -> list[list[list[int]]]:
    """The batches of each process in one epoch: indices of rows. What fills no step of all of them is left out."""
    torch.manual_seed(0)
    if order == "batch_rebalance":
        given = (lengths.tolist(), batch_size * processes, processes, 1)
        return [list(BatchRebalanceSampler(*given, rank=own)) for own in range(processes)]
    sampler = RandomSampler(lengths)
    if order.startswith("group_by_length"):
        rows = batch_size if order.endswith("transformers") else batch_size * processes
        sampler = LengthGroupedSampler(rows, lengths=lengths.tolist())
    batches = list(BatchSampler(sampler, batch_size, drop_last=True))
    whole = len(batches) // processes * processes
    return [batches[own:whole:processes] for own in range(processes)]  # as accelerate deals them out


def measure(shards: list[list[list[int]]], lengths: np.ndarray, cost: np.ndarray) -> dict[str, float]:
    """`cost` is that of one row, by the length of its history."""
    spent = np.array([[len(rows) * cost[lengths[rows].max()] for rows in shard] for shard in shards])
    needed = sum(cost[lengths[rows]].sum() for shard in shards for rows in shard)
    slowest = spent.max(axis=0).sum() * len(shards)
    waiting, padding = 1 - spent.sum() / slowest, 1 - needed / spent.sum()
    return {"waiting": waiting, "padding": padding, "over needed": slowest / needed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder that `onerec prepare` wrote; default: lengths that are drawn")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=16, help="of a process")
    parser.add_argument("--size", default="1b")
    parser.add_argument("--output", type=Path, default=Path("outputs/balance.json"))
    args = parser.parse_args()
    lengths = np.asarray(DataFolder(args.data).splits["train"]["length"]) if args.data else drawn_lengths()
    args.layers, args.config = None, {}
    with torch.device("meta"):
        model = build(EVERY, 0, args)
    cost = np.array([model_flops(EVERY, model, items, 1) for items in range(lengths.max() + 1)])
    rows = []
    for order in ("random", "group_by_length of transformers", "group_by_length", "batch_rebalance"):
        shards = shards_of(order, lengths, args.processes, args.batch_size)
        rows.append({"order": order, "median length": int(np.median(lengths)), **measure(shards, lengths, cost)})
        print(json.dumps(rows[-1]), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
