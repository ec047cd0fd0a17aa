"""RQ-VAE, plain and balanced residual k-means on the same item embeddings: the OneRec Technical Report's Table 11,
redone.

    python experiments/quantizers.py --data outputs/beauty --output outputs/quantizers.json
    python experiments/quantizers.py --data outputs/beauty --columns 0 384 --output outputs/quantizers_text.json

`--data` is a folder that recipes/prepare.py wrote; `--columns` takes a part of the embeddings (the text part comes
first). Every quantizer runs with every seed; prints means over seeds of reconstruction, utilisation, entropy (in
percent of ln K) and collisions.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from onerec_hf.semantic_ids import RQVAE, ResidualKMeans, quality_report


def quantizers(args: argparse.Namespace, seed: int) -> dict:
    sizes = args.levels, args.codebook_size
    return {
        "RQ-VAE": RQVAE(*sizes, num_epochs=args.epochs, seed=seed),
        "plain residual k-means": ResidualKMeans(*sizes, balanced=False, seed=seed),
        "balanced residual k-means": ResidualKMeans(*sizes, balanced=True, seed=seed),
    }


def main(args: argparse.Namespace) -> list[dict]:
    torch.set_num_threads(args.threads)
    items = load_file(Path(args.data) / "item_embeddings.safetensors")["item_embeddings"]
    items = items[:, slice(*args.columns)] if args.columns else items
    rows = []
    for seed in args.seeds:
        for name, quantizer in quantizers(args, seed).items():
            start = time.process_time()
            codes = quantizer.fit(items).train_codes
            row = {"quantizer": name, "seed": seed, "processor_seconds": time.process_time() - start}
            rows.append(row | quality_report(codes, items, quantizer))
            if name.startswith("balanced"):
                row = row | {"quantizer": "balanced, nearest centroids"}
                rows.append(row | quality_report(quantizer.encode(items), items, quantizer))
            machine = {"processor": platform.processor(), "cores": os.cpu_count(), "threads": args.threads}
            Path(args.output).parent.mkdir(parents=True, exist_ok=True)
            Path(args.output).write_text(json.dumps({"arguments": vars(args), **machine, "rows": rows}, indent=2))
    print(
        "| quantizer | relative reconstruction | utilisation | entropy, % of ln K | collision rate | distinct | "
        "seconds |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["quantizer"] for row in rows):
        own = [row for row in rows if row["quantizer"] == name]
        means = {key: np.mean([row[key] for row in own], axis=0) for key in own[0] if key not in ("quantizer", "seed")}
        utilisation = " / ".join(f"{value:.3f}" for value in means["utilisation"])
        entropy = " / ".join(f"{value:.1f}" for value in means["entropy_percent"])
        print(
            f"| {name} | {means['reconstruction_relative']:.4f} | {utilisation} | {entropy} | "
            f"{means['collision_rate']:.3f} | {means['distinct_share']:.3f} | {means['processor_seconds']:.0f} |"
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--columns", type=int, nargs=2, help="first and last + 1 column of the embeddings")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--codebook_size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=200, help="of the RQ-VAE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
