"""Weights of fewer bits: recall, invalid rate, agreement with float32, memory and time of a trained repository.

    pip install torchao
    python benchmarks/quantized.py --model outputs/mymodel --data outputs/mydata --output outputs/quantized.json

Every precision is what `from_pretrained` makes of the same repository: `dtype`, or `quantization_config` with
torchao's weight-only formats, which keep embeddings, norms and the router of experts. `agreement` is the share of
float32's ten best items that are among the ten best. `invalid` is the share of a search's codes that are no item when
nothing constrains it (of a model with the softmax over existing children, 0 by its design). Times are medians of
batches of 16 users, in ways that alternate, over float32's; on a processor, weights of 8 bits are widened before each
product, so only a GPU with such products can gain time.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
from transformers import TorchAoConfig

from onerec_hf.data import DataFolder
from onerec_hf.evaluation import evaluate
from onerec_hf.item_ranker import ItemRanker
from onerec_hf.recommender import Recommender

PRECISIONS = {
    "float32": dict,
    "bfloat16": lambda: {"dtype": torch.bfloat16},
    "int8 weights": lambda: {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig())},
    "float8 weights": lambda: {"quantization_config": TorchAoConfig(Float8WeightOnlyConfig())},
}


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters, with the scales of quantised ones."""
    total = 0
    for weight in model.parameters():
        names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
        parts = [getattr(weight, name) for name in names] or [weight]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@torch.no_grad()
def invalid_rate(ranker: ItemRanker, rows: list[dict], num_beams: int = 50) -> float:
    """Share of the codes of an unconstrained beam search that no item of the catalogue has."""
    model, catalogue = ranker.model, ranker.model.catalogue
    context = {name: tensor.to(model.device) for name, tensor in ranker.collator.context(rows).items()}
    found = model.generate(**context, constrained=False, num_beams=num_beams, num_return_sequences=num_beams)
    codes = found[:, 1:].cpu() - torch.tensor(model.config.level_offsets)
    return float((catalogue.to("cpu").leaves_of(codes) < 0).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that `onerec sft` wrote")
    parser.add_argument("--data", required=True, help="folder that `onerec prepare` wrote, of the same log")
    parser.add_argument("--split", default="test", help="of the data: test or validation")
    parser.add_argument("--users", type=int, help="of the split; default all")
    parser.add_argument("--repeats", type=int, default=20, help="batches that are timed")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("outputs/quantized.json"))
    args = parser.parse_args()
    split = DataFolder(args.data).splits[args.split]
    split = split.select(range(min(args.users or len(split), len(split))))
    rankers, rows = {}, []
    for name, settings in PRECISIONS.items():
        ranker = Recommender.from_pretrained(args.model, device=args.device, **settings()).ranker
        ranker.reranker = None
        rankers[name] = ranker
    few = [list(split.select(range(start, start + 16))) for start in range(0, 16 * args.repeats, 16)]
    seconds: dict[str, list[float]] = {name: [] for name in rankers}
    for batch in few:
        for name, ranker in rankers.items():
            start = time.perf_counter()
            ranker.search(batch, 10).items.cpu()
            seconds[name].append(time.perf_counter() - start)
    best = {}
    for name, ranker in rankers.items():
        lists = [ranker.search(batch, 10).items.cpu().numpy() for batch in few]
        best[name] = np.concatenate(lists)
        same = np.mean([len(np.intersect1d(*pair)) / 10 for pair in zip(best[name], best["float32"])])
        scores = [evaluate(ranker, split, exclude_seen=masked, progress=False) for masked in (False, True)]
        row = {"weights": name, "agreement": float(same), "bytes": weight_bytes(ranker.model)}
        row |= {key: [score.metrics[key] for score in scores] for key in ("recall@10", "ndcg@10")}
        row["invalid"] = float(np.mean([invalid_rate(ranker, batch) for batch in few]))
        row["seconds"] = median(seconds[name])
        row["over float32"] = row["seconds"] / median(seconds["float32"])
        rows.append(row)
        print(json.dumps(row), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
