"""Peak memory and processor seconds of `onerec prepare` on a synthetic log of any size.

    python benchmarks/prepare.py --events 20000000 --users 400000 --items 100000

The log: users of unequal activity, each with three tastes; items of unequal popularity, a thousand per taste; 30 days,
in the order of time. It is written to `--output`, once, and read in another process, which the numbers are of.
"""

import argparse
import functools
import json
import multiprocessing
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

STEPS = ("load", "write_splits", "embed")
DAY_MS = 86_400_000


def write_log(path: Path, events: int, users: int, items: int, seed: int = 0) -> None:
    """A log of `user_id`, `item_id`, `timestamp` (ms) and `is_like`, a million events at a time."""
    rng = np.random.default_rng(seed)
    groups = max(items // 1000, 1)
    taste = rng.integers(0, groups, (users, 3)).astype(np.int32)
    kinds = {"user_id": pa.int64(), "item_id": pa.int64(), "timestamp": pa.int64(), "is_like": pa.int8()}
    now, partial = 1_700_000_000_000, path.with_suffix(".partial")
    with pyarrow.parquet.ParquetWriter(partial, pa.schema(kinds)) as writer:
        for start in range(0, events, 1_000_000):
            n = min(1_000_000, events - start)
            user = (users * rng.random(n) ** 1.5).astype(np.int64)
            own = taste[user, rng.integers(0, 3, n)] + groups * _rank(rng, n, 1000)
            item = np.minimum(np.where(rng.random(n) < 0.8, own, _rank(rng, n, items)), items - 1)
            moment = now + np.sort(rng.integers(0, 30 * DAY_MS * n // events, n))
            now = int(moment[-1])
            like = (rng.random(n) < 0.05).astype(np.int8)
            # ids with gaps, as those of logs are
            columns = {"user_id": user * 7 + 3, "item_id": item * 11 + 5, "timestamp": moment, "is_like": like}
            writer.write_table(pa.table(columns))
    partial.rename(path)


def _rank(rng: np.random.Generator, n: int, size: int) -> np.ndarray:
    """Ranks 0..size - 1, rank r with a probability that falls as 1 / (r + 1)."""
    return np.minimum((np.exp(rng.random(n) * np.log(size)) - 1).astype(np.int64), size - 1)


def prepare(source: str, output: str, found: dict, steps: tuple[str, ...] = STEPS) -> None:
    """Runs `onerec prepare` with its defaults; fills `found`: (processor seconds, seconds, peak GiB) behind each
    step.
    """
    from onerec_hf.scripts import prepare as script

    def measure(name: str) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        found[name] = (used.ru_utime + used.ru_stime, time.perf_counter(), used.ru_maxrss / 2**20)

    def wrapped(name: str):
        function = getattr(script, name)

        @functools.wraps(function)
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            measure(name)
            print(name, found[name], flush=True)
            return result

        setattr(script, name, call)

    for name in steps:
        wrapped(name)
    measure("start")
    script.run(["--source", source, "--output", output, "--feedback", "is_like"])
    measure("semantic IDs and saving")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--events", type=int, default=20_000_000)
    parser.add_argument("--users", type=int, default=400_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_prepare"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / f"log_{args.events}_{args.users}_{args.items}.parquet"
    if not log.is_file():
        write_log(log, args.events, args.users, args.items)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        process = context.Process(target=prepare, args=(str(log), str(args.output / "data"), found))
        process.start()
        process.join()
        points = dict(found)
    before, report = points.pop("start"), {}
    for name, point in points.items():
        seconds, wall = point[0] - before[0], point[1] - before[1]
        report[name] = {"processor seconds": seconds, "seconds": wall, "peak GiB": point[2]}
        before = point
    report["log MB"] = log.stat().st_size / 1e6
    print(json.dumps(report, indent=2))
    if process.exitcode:
        raise SystemExit(f"prepare stopped with exit code {process.exitcode}; the steps before are above.")


if __name__ == "__main__":
    main()
