"""What item pairs do to content embeddings and to semantic IDs (OneRec Technical Report 2.1.1), before any model is trained.

    python benchmarks/item_alignment.py --data outputs/beauty --columns 0 384 --output outputs/item_alignment.json

`--data` is a folder that recipes/prepare.py wrote; `--columns` the content part of its embeddings (text comes first). Pairs and
projection see the training split. On the validation split: how often a user's target is among the 10 nearest neighbours of his last
item, and how often the two share the first code, or the first two, of balanced residual k-means, against two items of the same
popularity that have nothing to do with each other (the targets shuffled among the users).
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.numpy import load_file

from onerec_hf.data import ItemAlignment, item_to_item_pairs, swing_neighbors, user_to_item_pairs
from onerec_hf.semantic_ids import ResidualKMeans, quality_report


def judge(embeddings: np.ndarray, last: np.ndarray, target: np.ndarray, args: argparse.Namespace) -> dict:
    unit = torch.from_numpy(embeddings - embeddings.mean(0))
    unit = torch.nn.functional.normalize(unit, dim=1)
    hits = []
    for rows in torch.arange(len(last)).split(1024):
        cosine = unit[last[rows]] @ unit.T
        cosine[torch.arange(len(rows)), last[rows]] = -2.0
        hits.append((cosine.topk(10).indices == torch.from_numpy(target[rows])[:, None]).any(1))
    quantizer = ResidualKMeans(3, 256, balanced=True, seed=args.seed)
    codes = quantizer.fit(unit).train_codes.numpy()
    shuffled = np.random.default_rng(args.seed).permutation(target)
    result = {"neighbour_recall@10": torch.cat(hits).double().mean().item()}
    for levels in (1, 2):
        same = (codes[last, :levels] == codes[target, :levels]).all(1).mean()
        chance = (codes[last, :levels] == codes[shuffled, :levels]).all(1).mean()
        result[f"same_{levels}_codes"], result[f"same_{levels}_codes_shuffled"] = float(same), float(chance)
    return result | {"quality": quality_report(quantizer.train_codes, unit, quantizer)}


def main(args: argparse.Namespace) -> dict:
    torch.set_num_threads(args.threads)
    folder = Path(args.data)
    content = load_file(folder / "item_embeddings.safetensors")["item_embeddings"]
    content = content[:, slice(*args.columns)] if args.columns else content
    splits = datasets.load_from_disk(str(folder / "splits")).with_format("numpy")
    train, start = list(splits["train"]["history"]), time.process_time()
    neighbors, scores = swing_neighbors(train, len(content), seed=args.seed)
    pairs = item_to_item_pairs(neighbors), user_to_item_pairs(train, neighbors, scores)
    report = {"swing_pairs": len(pairs[0]), "co_click_pairs": len(pairs[1])}
    report["pairs_seconds"], start = time.process_time() - start, time.process_time()
    alignment = ItemAlignment(content.shape[1], seed=args.seed)
    alignment.fit(content, np.concatenate(pairs), num_epochs=args.epochs)
    report["fit_seconds"] = time.process_time() - start
    last = np.array([history[-1] for history in splits["validation"]["history"]])
    target = np.array([targets[0] for targets in splits["validation"]["targets"]])
    report["content"] = judge(content, last, target, args)
    report["aligned"] = judge(alignment.embed(content), last, target, args)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"arguments": vars(args), **report}, indent=2))
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--columns", type=int, nargs=2, help="first and last + 1 column of the embeddings")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
