"""The loss of encoder-decoder 1:1 and 1:2, naive decoder-only and lazy decoder-only at equal parameters; of K/V
sharing, of experts at equal active parameters, and of item ids in place of semantic IDs as input.

    python experiments/loss_parity.py --data beauty=outputs/beauty kuairand=outputs/kuairand_long_views --threads 1 \
        --output outputs/loss_parity.json --plot docs/loss_parity.png

OneRec-V2 (arXiv:2508.20900), Tables 2 to 4, redone small, on folders that recipes/prepare.py wrote. Every contestant
sees the same examples (up to 20 items -> the next item) in the same batches and order, has the same tables, head,
optimiser, constant learning rate after a warm-up and moving average of its weights, and the same loss: the
log-probability of a code among those that continue its prefix to an existing item (the paper's softmax over the level
also has to learn the catalogue, which takes longer). A context item is one token everywhere, the embeddings of its
codes under one linear map. The feed-forward is as wide as it takes for equally many parameters in the blocks.
Encoder-decoders are `OneRecForCausalLM` with sessions of one item, the naive decoder is transformers' stock Llama over
[context items | BOS s1 .. of each target].

Each is trained the cheapest way it allows: the targets of a row share one pass of the decoder-only models, which mask
what a target must not see; an encoder mixes the items of a context, so there every target is a row of its own (of like
length together).

The learning rate of each architecture is the best of `--learning_rates` on validation (first data set, first seed),
then fixed. What is scored, in nats per item, is the averaged weights, so a curve may be read at any time. Seconds are
process CPU time of the training steps alone. A cell (data set, variant, learning rate, seed, steps) that the output
holds already is not run again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import datasets
import matplotlib
import numpy as np
import torch
from parity_models import CHANGES, CONTEXT, LAZY, NAMES, block_parameters, build
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from onerec_hf import Catalogue
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import load_splits
from onerec_hf.hub.pictures import COLOURS
from onerec_hf.models import balance_experts

matplotlib.use("Agg")
import matplotlib.pyplot as plt

POINTS, CURVE_ROWS = 8, 3000  # of a curve, and rows of validation for each


class Rows:
    """A split: rows with a history that is not empty, as batches of `OneRecCollator`."""

    def __init__(self, rows: datasets.Dataset, collator: OneRecCollator):
        least = 1 if "targets" in rows.column_names else 2
        columns = [name for name in ("history", "targets") if name in rows.column_names]
        self.rows = [row for row in rows.select_columns(columns).to_list() if len(row["history"]) >= least]
        self.collator, self.lengths = collator, np.array([len(row["history"]) for row in self.rows]).clip(max=CONTEXT)

    def batch(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        return self.collator([self.rows[i] for i in index])

    def training(self, size: int, seed: int) -> Iterator[np.ndarray]:
        """Batches without end: a new order every epoch, rows of like length together."""
        generator = np.random.default_rng(seed)
        while True:
            order = generator.permutation(len(self.rows))
            pools = [order[i : i + 50 * size] for i in range(0, len(order), 50 * size)]
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
            parts = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
            yield from (parts[i] for i in generator.permutation(len(parts)))

    def scoring(self, limit: int | None = None) -> list[np.ndarray]:
        index = np.random.default_rng(0).permutation(len(self.rows))[:limit]
        index = index[np.argsort(self.lengths[index], kind="stable")]
        return [index[i : i + 500] for i in range(0, len(index), 500)]


class Task(NamedTuple):
    """A data set, and for how many steps of how many rows it is trained on."""

    catalogue: Catalogue
    splits: dict[str, Rows]
    plan: dict[str, int]  # steps, batch_size


@torch.no_grad()
def score(model: nn.Module, rows: Rows, limit: int | None = None) -> list[float]:
    """Mean negative log-probability of each code, in nats; their sum is that of an item."""
    model.eval()
    log_probs = torch.cat([model(**rows.batch(index)) for index in rows.scoring(limit)])
    model.train()
    return (-log_probs.double().mean(0)).tolist()


def check(task: Task) -> None:
    """Every contestant scores a target the same alone and beside others, padded and together with the row's other
    targets.
    """
    rows = task.splits["train"]
    index, single = np.concatenate([rows.scoring(5000)[i][-2:] for i in (0, -1)]), []
    for row in (rows.rows[i] for i in index):
        past = row["history"][-CONTEXT - 1 :]
        own = [(past[:n], [past[n]]) for n in range(1, len(past))]
        pairs = [(past, row["targets"])] if "targets" in row else own
        single += [rows.collator([{"history": context, "targets": items}]) for context, items in pairs]
    for variant in (*NAMES, *CHANGES):
        torch.manual_seed(0)
        model = build(variant, task.catalogue).eval()
        alone = torch.cat([model(**batch) for batch in single])
        assert torch.allclose(model(**rows.batch(index)), alone, atol=1e-4), f"{variant}: targets are not independent"


def mflops_per_target(variant: str, task: Task) -> float:
    """Forward and backward, every matrix product, on the first 20 batches of seed 0."""
    model, targets, rows = build(variant, task.catalogue), 0, task.splits["train"]
    getattr(model, "decoder", model).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for index in itertools.islice(rows.training(task.plan["batch_size"], 0), 20):
            log_probs = model(**rows.batch(index))
            (-log_probs.mean()).backward()
            targets += len(log_probs)
    return counter.get_total_flops() / targets / 1e6


def train(variant: str, task: Task, rate: float, seed: int) -> dict:
    torch.manual_seed(seed)
    model = build(variant, task.catalogue).train()
    weights = [parameter for name, parameter in model.named_parameters() if "norm" not in name]
    norms = [parameter for name, parameter in model.named_parameters() if "norm" in name]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))

    def average(old, new, count):  # forgets the first weights soon: the decay grows from .1 to .99
        torch._foreach_lerp_(old, new, 1 - min(0.99, (1 + count.item()) / (10 + count.item())))

    averaged = AveragedModel(model, multi_avg_fn=average)
    curve, seconds, splits = [], 0.0, task.splits
    batches = splits["train"].training(task.plan["batch_size"], seed)
    for step in range(1, task.plan["steps"] + 1):
        batch = splits["train"].batch(next(batches))
        start = time.process_time()
        (-model(**batch).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        balance_experts(model, 0.01)  # DeepSeek-V3's .001 moves next to nothing in so few steps
        averaged.update_parameters(model)
        seconds += time.process_time() - start
        if step % (task.plan["steps"] // POINTS) == 0:
            curve.append((step, round(seconds, 2), sum(score(averaged, splits["validation"], CURVE_ROWS))))
    result = {"block_parameters": block_parameters(model), "parameters": sum(p.numel() for p in model.parameters())}
    result["mflops_per_target"] = mflops_per_target(variant, task)
    result |= {"cpu_seconds": round(seconds, 1), "curve": curve, "validation": curve[-1][2]}
    result["test_by_level"] = score(averaged, splits["test"])
    return result | {"test": sum(result["test_by_level"])}


def load(folder: str, **plan: int) -> Task:
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    collator = OneRecCollator(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids), CONTEXT)
    splits = load_splits(folder)
    return Task(tokenizer.catalogue, {name: Rows(rows, collator) for name, rows in splits.items()}, plan)


def run(args, data: dict[str, Task], report: dict) -> None:
    """Grid of learning rates, then seed by seed every cell that is missing; the report is written after each."""
    cells, first = report["cells"], next(iter(data))

    def cell(name: str, variant: str, rate: float, seed: int) -> dict:
        key = {"data": name, "variant": variant, "rate": rate, "seed": seed} | data[name].plan
        if not (found := [cell for cell in cells if key.items() <= cell.items()]):
            found = [key | train(variant, data[name], rate, seed)]
            cells.extend(found)
            args.output.write_text(json.dumps(report, indent=1))
            print(f"{key}: test {found[0]['test']:.4f}, {found[0]['cpu_seconds']} CPU s", flush=True)
        return found[0]

    for variant in (name for name in args.variants if name in NAMES):
        grid = [cell(first, variant, rate, args.seeds[0]) for rate in args.learning_rates]
        report["rates"][variant] = min(grid, key=lambda cell: cell["validation"])["rate"]
    for seed, variant in itertools.product(args.seeds, args.variants):
        for name in data if variant in NAMES else [first]:
            cell(name, variant, report["rates"][LAZY if variant in CHANGES else variant], seed)


def chosen(report: dict, name: str, task: Task, variant: str) -> list[dict]:
    """The cells of all seeds."""
    rate = report["rates"].get(LAZY if variant in CHANGES else variant)
    key = {"data": name, "variant": variant, "rate": rate} | task.plan
    return [cell for cell in report["cells"] if key.items() <= cell.items()]


def table(report: dict, data: dict[str, Task]) -> None:
    columns = "data | variant | lr | seeds | parameters in blocks | all | MFLOPs per target | CPU s | test NLL"
    columns += " | validation NLL | the same at the lazy decoder's CPU time"
    print(f"| {columns} |\n" + "|---" * len(columns.split(" | ")) + "|")
    for name, task in data.items():
        limit = mean([cell["cpu_seconds"] for cell in chosen(report, name, task, LAZY)] or [0])
        for variant in (*NAMES, *CHANGES):
            if not (cells := chosen(report, name, task, variant)):
                continue
            same, seconds = cells[0], mean(cell["cpu_seconds"] for cell in cells)
            row = [name, variant, same["rate"], len(cells), f"{same['block_parameters']:,}"]
            row += [f"{same['parameters']:,}", f"{same['mflops_per_target']:.2f}", f"{seconds:.0f}"]
            for split in ("test", "validation"):
                values = [cell[split] for cell in cells]
                row.append(f"{mean(values):.3f}" + (f" ±{stdev(values):.3f}" if len(values) > 1 else ""))
            curves = (np.array(cell["curve"]).T for cell in cells)
            row += [f"{np.mean([np.interp(limit, seconds, loss) for _, seconds, loss in curves]):.3f}"]
            print("| " + " | ".join(map(str, row)) + " |")


def plot(report: dict, data: dict[str, Task], path: Path) -> None:
    figure, axes = plt.subplots(1, len(data), figsize=(5.5 * len(data), 4), squeeze=False)
    for axis, (name, task) in zip(axes[0], data.items()):
        axis.set_prop_cycle(color=COLOURS)
        for variant in NAMES:
            if not (cells := chosen(report, name, task, variant)):
                continue
            curves = np.array([cell["curve"] for cell in cells])  # (seeds, points, 3)
            _, seconds, loss = curves.mean(0).T
            line = axis.plot(seconds, loss, "o-", markersize=3, label=variant)[0]
            axis.fill_between(seconds, curves[..., 2].min(0), curves[..., 2].max(0), alpha=0.2, color=line.get_color())
        axis.set(xlim=(0, None), xlabel="CPU seconds of training", ylabel="nats per item, validation; lower is better")
        axis.set_title(name)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", type=lambda entry: entry.split("=", 1), required=True, help="NAME=FOLDER")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", default=[*NAMES, *CHANGES], choices=[*NAMES, *CHANGES])
    parser.add_argument("--steps", type=int, nargs="+", default=[528, 264], help="Per data set.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[96, 192], help="Rows; per data set.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if not len(args.data) == len(args.steps) == len(args.batch_sizes) or min(args.steps) < POINTS:
        parser.error(
            f"--data {args.data}, --steps {args.steps}, --batch_sizes {args.batch_sizes}: one of each per data set, "
            f"and at least {POINTS} steps."
        )
    torch.set_num_threads(args.threads)
    report = {"torch": torch.__version__, "threads": args.threads, "rates": {}, "cells": []}
    if args.output.exists():
        report = json.loads(args.output.read_text())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    plans = zip(args.data, args.steps, args.batch_sizes, strict=True)
    data = {name: load(folder, steps=n, batch_size=size) for (name, folder), n, size in plans}
    for task in data.values():
        check(task)
    run(args, data, report)
    table(report, data)
    if args.plot:
        plot(report, data, args.plot)


if __name__ == "__main__":
    main()
