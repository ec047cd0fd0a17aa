"""Loss of OneRec-V2 over its size and over compute, at equal data, with the fit L(N) = E + A N^-alpha.

    python experiments/scaling.py --data outputs/kuairand --output outputs/scaling.json --plot docs/scaling.png
    python experiments/scaling.py --simulated_users 20000 --data outputs/world --epochs 1 --output outputs/scaling.json

The Technical Report and OneRec-V2 fit the loss of models of .015B to 8B on their own data. Here every size sees the
same rows in the same order, `--epochs` times; the learning rate falls with the root of the width. N is the weights of
the blocks, of a mixture those of the chosen experts; compute is the FLOPs of the matrix products of all steps
(benchmarks/train.py). The loss is that of the validation split, in nats per item: one row per user, the next item, by
a softmax over codes that lead to an item, since catalogues are small here. `--mixtures` have eight experts, two of
them chosen and one shared.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from scipy.optimize import curve_fit
from torch import nn

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM, balance_experts
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import DataFolder
from onerec_hf.scripts.quickstart import prepare_data, simulate

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))
from train import EVERY, model_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LAYERS, HEADS, BATCH, MAX_HISTORY, CHECKS = 2, 4, 64, 50, 6
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1, "first_dense_layers": 0}


def build(data: DataFolder, width: int, mixture: bool, seed: int) -> OneRecV2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": LAYERS}
    experts = EXPERTS | {"moe_intermediate_size": 4 * width // 24 * 8} if mixture else {}
    config = OneRecV2Config(
        codebook_sizes=data.tokenizer.codebook_sizes,
        num_attention_heads=HEADS,
        context_embed_dim=32,
        dropout=0.1,
        score_normalization="valid",
        **sizes,
        **experts,
    )
    model = OneRecV2ForCausalLM(config)
    model.catalogue = data.tokenizer.catalogue
    return model


def active_weights(model: OneRecV2ForCausalLM) -> int:
    """Of the blocks: of eight experts, the two that a token chooses."""
    config, total = model.config, 0
    for name, weights in model.model.decoder.layers.named_parameters():
        share = config.num_experts_per_tok / config.num_experts if ".experts." in name else 1.0
        total += int(weights.numel() * share)
    return total


@torch.no_grad()
def validation_loss(model: OneRecV2ForCausalLM, rows: list[dict], collator: OneRecCollator) -> float:
    """Nats per item."""
    model.eval()
    total = 0.0
    for start in range(0, len(rows), 256):
        some = rows[start : start + 256]
        total += float(model(**collator(some)).target_log_probs.double().sum())
    model.train()
    return -total / len(rows)


def train(data: DataFolder, width: int, mixture: bool, seed: int, args: argparse.Namespace) -> dict:
    """One model; its validation loss and the FLOPs until then, at `CHECKS` times."""
    tokens = data.tokenizer.encode_semantic_ids(data.tokenizer.catalogue.semantic_ids)
    collator = OneRecCollator(tokens, MAX_HISTORY)
    rows = [row for row in data.splits["train"].select_columns(["history"]).to_list() if len(row["history"]) > 1]
    held = data.splits["validation"].select_columns(["history", "targets"])
    held = held.select(range(min(len(held), args.validation_users))).to_list()
    held = [{"history": row["history"], "targets": row["targets"][:1]} for row in held]
    model = build(data, width, mixture, seed).train()
    rate = 3e-3 * (64 / width) ** 0.5
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    generator, steps = np.random.default_rng(0), args.epochs * (len(rows) // BATCH)
    order = np.concatenate(
        [generator.permutation(len(rows))[: len(rows) // BATCH * BATCH] for _ in range(args.epochs)]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * step / steps))
    )
    curve, flops, start = [], 0.0, time.process_time()
    for step in range(steps):
        batch = collator([rows[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if mixture:
            balance_experts(model, 0.01)
        flops += model_flops(EVERY, model, batch["context_ids"].shape[1], BATCH)
        if (step + 1) % max(1, steps // CHECKS) == 0:
            curve.append((flops, validation_loss(model, held, collator)))
    row = {"width": width, "mixture": mixture, "seed": seed, "weights": active_weights(model)}
    row |= {"all_weights": model.num_parameters(), "loss": curve[-1][1], "curve": curve}
    return row | {"seconds": time.process_time() - start}


def law(weights, floor, scale, alpha):
    return floor + scale * (np.asarray(weights) / 1e5) ** -alpha


def fit(rows: list[dict]) -> dict:
    """E, A and alpha of the dense models, with standard errors, and the root mean square of what is left."""
    dense = [row for row in rows if not row["mixture"]]
    weights, loss = np.array([(row["weights"], row["loss"]) for row in dense]).T
    start = (loss.min() - 0.1, 0.2, 0.3)
    found, covariance = curve_fit(
        law, weights, loss, start, bounds=([0, 0, 0.01], [np.inf, np.inf, 3]), max_nfev=20_000
    )
    left = float(np.sqrt(np.mean((law(weights, *found) - loss) ** 2)))
    return {
        "E": found[0],
        "A": found[1],
        "alpha": found[2],
        "errors": np.sqrt(np.diag(covariance)).tolist(),
        "rms": left,
    }


def draw(rows: list[dict], found: dict, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for mixture, marker, colour, label in ((False, "o", "#0072b2", "dense"), (True, "s", "#e69f00", "mixture")):
        own = [row for row in rows if row["mixture"] == mixture]
        left.plot([r["weights"] for r in own], [r["loss"] for r in own], marker, color=colour, label=label)
        for i, row in enumerate(own):
            right.plot(
                *zip(*row["curve"]), f"{marker}-", color=colour, alpha=0.4 + 0.6 * i / max(1, len(own) - 1), ms=3
            )
    span = np.geomspace(min(r["weights"] for r in rows), max(r["weights"] for r in rows), 100)
    values = law(span, found["E"], found["A"], found["alpha"])
    left.plot(span, values, "--", color="#8a949c", label=f"fit, alpha {found['alpha']:.2f}")
    left.set_xlabel("weights of the blocks, active")
    right.set_xlabel("FLOPs of training until then")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_ylabel("validation loss, nats per item\nlower is better")
        axis.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder that `onerec prepare` wrote, or that a world is put in")
    parser.add_argument(
        "--simulated_users", type=int, help="makes that folder: the quickstart's world of so many users"
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64, 96, 128, 192])
    parser.add_argument("--mixtures", type=int, nargs="*", default=[32, 64])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validation_users", type=int, default=4000)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.simulated_users:
        folder = Path(args.data)
        prepare_data(folder, folder / "data", simulate(folder, args.simulated_users, 2000, 0), 0)
        args.data = folder / "data"
    data, rows = DataFolder(args.data), []
    wanted = [(width, False) for width in args.widths] + [(width, True) for width in args.mixtures]
    for seed in args.seeds:
        for width, mixture in wanted:
            rows.append(train(data, width, mixture, seed, args))
            shown = {name: value for name, value in rows[-1].items() if name != "curve"}
            print(shown, flush=True)
            args.output.write_text(json.dumps({"rows": rows}, indent=1), encoding="utf-8")
    found = fit(rows)
    print(found)
    args.output.write_text(json.dumps({"rows": rows, "fit": found}, indent=1), encoding="utf-8")
    if args.plot:
        draw(rows, found, args.plot)


if __name__ == "__main__":
    main()
