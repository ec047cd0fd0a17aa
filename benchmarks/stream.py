"""An epoch over the training split of a data folder, streamed and in memory: batches of OneRec-V2, no model.

python benchmarks/stream.py --data outputs/benchmark_prepare/data --users 40000
"""

import argparse
import json
import multiprocessing
import resource
import time

import numpy as np


def epoch(data: str, streamed: bool, users: int, found: dict) -> None:
    """Batches of 64 users in groups of similar length; fills `found` with seconds, processor seconds and peak GiB."""
    from datasets.utils.logging import disable_progress_bar
    from torch.utils.data import DataLoader
    from transformers.trainer_pt_utils import LengthGroupedSampler

    from onerec_hf.collators import OneRecCollator
    from onerec_hf.data import load_splits, stream_split

    disable_progress_bar()
    collator = OneRecCollator(np.zeros((10**6, 3), dtype=np.int64), max_history=50)
    start, used = time.perf_counter(), time.process_time()
    if streamed:
        loader = DataLoader(stream_split(data, group_size=64), batch_size=64, collate_fn=collator)
    else:
        rows = load_splits(data, ["train"])["train"].with_format("numpy")
        order = LengthGroupedSampler(64, lengths=list(rows["length"]))
        loader = DataLoader(rows, batch_size=64, sampler=order, collate_fn=collator)
    batches = iter(loader)
    next(batches)
    found["first batch"] = time.perf_counter() - start
    for _ in range(users // 64 - 1):
        next(batches)
    found |= {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - used}
    found["peak GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(data: str, streamed: bool, users: int, queue: multiprocessing.Queue) -> None:
    found: dict = {}
    epoch(data, streamed, users, found)
    queue.put(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--users", type=int, required=True)
    args = parser.parse_args()
    context, report = multiprocessing.get_context("spawn"), {}
    for name, streamed in (("streamed", True), ("in memory", False)):
        queue = context.Queue()
        process = context.Process(target=measured, args=(args.data, streamed, args.users, queue))
        process.start()
        report[name] = queue.get()
        process.join()
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
