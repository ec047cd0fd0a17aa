r"""Balanced residual k-means as items and codes grow: processor seconds, peak memory, error; in memory and from files.

    python benchmarks/semantic_ids_growth.py --cases 100000x256 300000x256 100000x1024 --output outputs/growth.json
    python benchmarks/semantic_ids_growth.py --levels 1 --cases 1000000x256:files --output outputs/growth_files.json

Every case is fitted in a process of its own. A case that ends in `:files` is written to a file first and read from it,
a few rows at a time; `:sample` iterates over all items once, after the sample, instead of four times.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.semantic_ids import mixture
from onerec_hf.semantic_ids import EmbeddingFiles, ResidualKMeans, quality_report


def peak() -> float:
    """GiB of this process at most; `ru_maxrss` would begin with what the parent had when it started this one."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 2**20


def fit(case: str, path: Path, args: argparse.Namespace, found: dict) -> None:
    """Fills `found`; the process that calls it ends afterwards, so that its peak is that of this fit."""
    torch.set_num_threads(args.threads)
    size, *words = case.split(":")
    codes = int(size.split("x")[1])
    items = EmbeddingFiles([path]) if "files" in words else torch.from_numpy(np.load(path))
    start = time.process_time()
    iterations = 1 if {"files", "sample"} & set(words) else 4
    quantizer = ResidualKMeans(args.levels, codes, num_full_iterations=iterations, seed=args.seed).fit(items)
    found["processor seconds"] = time.process_time() - start
    found["peak GiB"] = peak()
    report = quality_report(quantizer.train_codes, items, quantizer)
    counts = [torch.bincount(column, minlength=codes) for column in quantizer.train_codes.T]
    found["relative reconstruction"] = report["reconstruction_relative"]
    found["collision rate"] = report["collision_rate"]
    found["largest code less smallest"] = max(int(count.max() - count.min()) for count in counts)


def write(case: str, path: Path, width: int, seed: int) -> None:
    np.save(path, mixture(int(case.split("x")[0]), width, 1000, 0.5, seed).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", nargs="+", default=["100000x256"], help="items x codes, with :files or :sample")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/semantic_ids_growth.json"))
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    path = args.output.with_suffix(".npy")
    context, rows = multiprocessing.get_context("spawn"), []
    for case in args.cases:
        for function, own in ((write, (case, path, args.width, args.seed)), (fit, (case, path, args))):
            with context.Manager() as manager:
                found = manager.dict()
                process = context.Process(target=function, args=(*own, *([found] if function is fit else [])))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{case} stopped with exit code {process.exitcode}.")
                if function is fit:
                    rows.append({"case": case, **found})
                    print(rows[-1], flush=True)
        args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    path.unlink()


if __name__ == "__main__":
    main()
