"""What item pairs do to content embeddings and to semantic IDs (OneRec Technical Report 2.1.1), before any model is
trained.

    python experiments/item_alignment.py --data outputs/beauty --columns 0 384 --output outputs/item_alignment.json
    # the caption loss, too
    python experiments/item_alignment.py ... --text_fields title brand --label category_path

`--data` is a folder that recipes/prepare.py wrote; `--columns` the content part of its embeddings (text comes first).
Pairs and projection see the training split. On the validation split: how often a user's target is among the 10 nearest
neighbours of his last item, and how often the two share the first code, or the first two, of balanced residual
k-means, against two items of the same popularity that have nothing to do with each other (the targets shuffled among
the users). With `--text_fields`, a third row whose vectors must tell that text, of nine items in ten; of the tenth,
nats per token that its own vector leaves open, and another item's vector. `--label`: how many of an item's ten nearest
share its value of that column, that is how much content is left.
"""

import argparse
import json
import time
from pathlib import Path

import datasets
import numpy as np
import torch
from safetensors.numpy import load_file

from onerec_hf.data import load_splits
from onerec_hf.item_embeddings import CaptionDecoder, ItemAlignment, behaviour_pairs, item_texts
from onerec_hf.semantic_ids import ResidualKMeans, quality_report


def label_share(unit: torch.Tensor, labels: np.ndarray) -> float:
    """Of the ten nearest items, how many have an item's label; mean over items."""
    codes, shares = torch.from_numpy(np.unique(labels, return_inverse=True)[1]), []
    for rows in torch.arange(len(unit)).split(1024):
        cosine = unit[rows] @ unit.T
        cosine[torch.arange(len(rows)), rows] = -2.0
        shares.append((codes[cosine.topk(10).indices] == codes[rows, None]).double().mean(1))
    return torch.cat(shares).mean().item()


@torch.no_grad()
def caption_loss(captions: CaptionDecoder, vectors: np.ndarray, of: np.ndarray, items: np.ndarray) -> float:
    """Nats per token of the texts of `items`, given the vectors of `of`."""
    return captions(torch.from_numpy(vectors[of]), torch.from_numpy(items)).item()


def judge(embeddings: np.ndarray, last: np.ndarray, target: np.ndarray, args: argparse.Namespace, labels=None) -> dict:
    unit = torch.from_numpy(embeddings - embeddings.mean(0))
    unit = torch.nn.functional.normalize(unit, dim=1)
    hits = []
    for rows in torch.arange(len(last)).split(1024):
        cosine = unit[last[rows]] @ unit.T
        cosine[torch.arange(len(rows)), last[rows]] = -2.0
        hits.append((cosine.topk(10).indices == torch.from_numpy(target[rows])[:, None]).any(1))
    result = {"label_share": label_share(unit, labels)} if labels is not None else {}
    quantizer = ResidualKMeans(3, 256, balanced=True, seed=args.seed)
    codes = quantizer.fit(unit).train_codes.numpy()
    shuffled = np.random.default_rng(args.seed).permutation(target)
    result["neighbour_recall@10"] = torch.cat(hits).double().mean().item()
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
    splits = load_splits(folder).with_format("numpy")
    train, start = list(splits["train"]["history"]), time.process_time()
    pairs = behaviour_pairs(train, len(content), seed=args.seed)
    report = {"swing_pairs": len(pairs[0]), "co_click_pairs": len(pairs[1])}
    report["pairs_seconds"] = time.process_time() - start
    table = datasets.Dataset.from_parquet(str(folder / "items.parquet"))
    last = np.array([history[-1] for history in splits["validation"]["history"]])
    target = np.array([targets[0] for targets in splits["validation"]["targets"]])
    labels = np.array([str(value) for value in table[args.label]]) if args.label else None
    report["content"] = judge(content, last, target, args, labels)
    for name in ("aligned", "aligned and told") if args.text_fields else ("aligned",):
        alignment, captions = ItemAlignment(content.shape[1], seed=args.seed), None
        if name == "aligned and told":
            texts = item_texts({field: table[field] for field in args.text_fields}, args.text_fields)
            captions = CaptionDecoder(texts, alignment.settings["output_dim"], seed=args.seed)
            lengths, kept = captions.lengths.clone(), np.arange(0, len(texts), 10)
            captions.lengths[kept] = 0  # as if these had no text
        start = time.process_time()
        alignment.fit(
            content,
            np.concatenate(pairs),
            captions=captions,
            caption_weight=args.caption_weight,
            num_epochs=args.epochs,
        )
        seconds, vectors = time.process_time() - start, alignment.embed(content)
        report[name] = judge(vectors, last, target, args, labels) | {"fit_seconds": seconds}
        if captions is not None:
            captions.lengths.copy_(lengths)
            report[name]["nats"] = caption_loss(captions, vectors, kept, kept)
            report[name]["nats_of_another_item"] = caption_loss(captions, vectors, np.roll(kept, 1), kept)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps({"arguments": vars(args), **report}, indent=2))
    print(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--columns", type=int, nargs=2, help="first and last + 1 column of the embeddings")
    parser.add_argument("--text_fields", nargs="+", default=[])
    parser.add_argument("--label", help="column of the items")
    parser.add_argument("--caption_weight", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    main(parser.parse_args())
