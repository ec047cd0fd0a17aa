"""The loss of encoder-decoder 1:1 and 1:2, naive decoder-only and lazy decoder-only at equal parameters, and of K/V sharing.

    python benchmarks/loss_parity.py --data beauty=outputs/beauty kuairand=outputs/kuairand_long_views --threads 1 \
        --output outputs/loss_parity.json --plot docs/loss_parity.png

OneRec-V2 (arXiv:2508.20900), Tables 2 to 4, redone small, on folders that recipes/prepare.py wrote. Every contestant sees the same
examples (up to 20 items -> the next item) in the same batches and order, has the same tables, head, optimiser, constant learning
rate after a warm-up and moving average of its weights, and is scored alike: log-probability of a code within its level, summed over
the codes of an item. A context item is one token everywhere, the embeddings of its codes under one linear map. The feed-forward is
as wide as it takes for equally many parameters in the blocks. Encoder-decoders are `OneRecForCausalLM` with sessions of one item,
the naive decoder is transformers' stock Llama over [context items | BOS s1 .. of each target].

Each is trained the cheapest way it allows: the targets of a row share one pass of the decoder-only models, which mask what a target
must not see; an encoder mixes the items of a context, so there every target is a row of its own (of like length together).

The learning rate of each architecture is the best of `--learning_rates` on validation (first data set, first seed), then fixed. The
weights that are scored are the average, so a curve may be read at any time. Seconds are process CPU time of the training steps
alone. A cell (data set, variant, learning rate, seed) that the output holds already is not run again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, stdev

import datasets
import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from onerec_hf import OneRecConfig, OneRecForCausalLM, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.data import OneRecCollator

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, BLOCKS, HEADS, CODE_WIDTH, CONTEXT = 64, 6, 4, 32, 20
BUDGET = BLOCKS * (6 * WIDTH**2 + 3 * WIDTH * 2 * WIDTH)  # of the lazy decoder: 6 d^2 of attention, d_ff = 2 d
NAMES = ("encoder-decoder 1:1", "encoder-decoder 1:2", "naive decoder-only", "lazy decoder-only")
LAZY = NAMES[-1]
# the lazy decoder is L_kv = 1, S_kv = 1, G_kv = all heads; each of these changes one thing, on the first data set
CHANGES = {
    "S_kv = 2": {"context_key_value_split": 2},
    "L_kv = 6": {"num_context_layers": 6},
    "G_kv = 1": {"num_context_key_value_heads": 1},
    "no bias over ages": {"position_bias_buckets": 0},
    "L_kv = 2": {"num_context_layers": 2},
    "G_kv = 2": {"num_context_key_value_heads": 2},
}


class NaiveDecoder(nn.Module):
    """A stock causal language model: context items as one token each, then BOS and codes of every target."""

    def __init__(self, offsets: list[int], sizes: list[int], intermediate_size: int):
        super().__init__()
        self.offsets, self.sizes = offsets, sizes
        vocabulary = offsets[-1] + sizes[-1]
        self.embed_codes = nn.Embedding(vocabulary, CODE_WIDTH, padding_idx=0)
        self.item_proj = nn.Linear(len(sizes) * CODE_WIDTH, WIDTH, bias=False)
        self.decoder = LlamaModel(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=WIDTH,
                intermediate_size=intermediate_size,
                num_hidden_layers=BLOCKS,
                num_attention_heads=HEADS,
            )
        )
        self.lm_head = nn.Linear(WIDTH, vocabulary, bias=False)
        for module in (self.embed_codes, self.item_proj, self.lm_head):  # as transformers and our models start
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, context_ids, context_mask, target_ids, target_positions):
        """Log-probabilities (M, L) of the M real targets of a batch of `OneRecCollator`."""
        (batch, items, levels), count = context_ids.shape, target_ids.shape[1]
        tokens = self.decoder.embed_tokens(
            F.pad(target_ids[..., :-1], (1, 0), value=1).flatten(1)
        )  # BOS s1 .. of each
        states = torch.cat([self.item_proj(self.embed_codes(context_ids).flatten(2)), tokens], dim=1)
        step = torch.arange(items + count * levels)
        target = (step - items).div(levels, rounding_mode="floor").clamp(min=-1)  # -1: the context
        own = (step[:, None] >= step) & (target[:, None] == target)  # causal, the context or one target
        seen = target_positions.repeat_interleave(levels, 1)  # (B, n * L), items that each token of a target sees
        seen = torch.cat([torch.zeros(batch, items, dtype=torch.long), seen], dim=1)
        allowed = own | ((step < items) & (step < seen.unsqueeze(2)))
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        position = torch.where(target == -1, step, seen + (step - items) % levels)
        states = self.decoder(
            inputs_embeds=states, attention_mask=mask.unsqueeze(1), position_ids=position, use_cache=False
        ).last_hidden_state[:, items:]
        real = target_ids[..., 0] > 0
        states, codes = states.unflatten(1, (count, levels))[real], target_ids[real]  # (M, L, D), (M, L)
        result = []
        for level, (offset, size) in enumerate(zip(self.offsets, self.sizes)):
            logits = F.linear(states[:, level], self.lm_head.weight[offset : offset + size])
            result.append(-F.cross_entropy(logits, codes[:, level] - offset, reduction="none"))
        return torch.stack(result, dim=1)


class Lazy(nn.Module):
    """OneRec-V2, called as `NaiveDecoder` is."""

    def __init__(self, config: OneRecV2Config):
        super().__init__()
        self.model = OneRecV2ForCausalLM(config)

    def forward(self, target_ids, **batch):
        return self.model(target_ids=target_ids, **batch).target_log_probs[target_ids[..., 0] > 0]


class EncoderDecoder(nn.Module):
    """OneRec with sessions of one item, called as `NaiveDecoder` is: a row per target, in four parts of like length."""

    def __init__(self, config: OneRecConfig):
        super().__init__()
        self.model = OneRecForCausalLM(config)

    def forward(self, context_ids, context_mask, target_ids, target_positions):
        real = target_ids[..., 0] > 0
        row, length, target = real.nonzero()[:, 0], target_positions[real], target_ids[real]
        order, result = length.argsort(stable=True), []
        for part in order.chunk(4):
            longest = int(length[part].max())
            mask = torch.arange(longest) < length[part].unsqueeze(1)
            context = {"context_ids": context_ids[row[part], :longest], "context_mask": mask}
            result.append(self.model(**context, target_ids=target[part].unsqueeze(1)).target_log_probs[:, 0])
        return torch.cat(result)[order.argsort()]


def even(width: float) -> int:
    return 2 * round(width / 2)


def build(variant: str, sizes: list[int]) -> nn.Module:
    common = {"codebook_sizes": sizes, "hidden_size": WIDTH, "num_attention_heads": HEADS, "gated_mlp": True}
    common |= {"context_embed_dim": CODE_WIDTH}
    if variant == "naive decoder-only":
        offsets = OneRecV2Config(**common).level_offsets
        return NaiveDecoder(offsets, sizes, even((BUDGET / BLOCKS - 4 * WIDTH**2) / (3 * WIDTH)))
    if variant.startswith("encoder-decoder"):
        encoders = BLOCKS // (2 if variant.endswith("1:1") else 3)
        # 4 d^2 of attention in an encoder block, 8 d^2 in a decoder block with the keys and values of the context
        attention = (4 * encoders + 8 * (BLOCKS - encoders)) * WIDTH**2
        config = OneRecConfig(
            **common,
            intermediate_size=even((BUDGET - attention) / (3 * WIDTH * BLOCKS)),
            num_encoder_layers=encoders,
            num_hidden_layers=BLOCKS - encoders,
            num_session_items=1,
            max_context_items=CONTEXT,
            context_tokens="item",
            num_experts=0,
        )
        return EncoderDecoder(config)
    common |= {"intermediate_size": 2 * WIDTH, "num_hidden_layers": BLOCKS}
    return Lazy(OneRecV2Config(**common | CHANGES.get(variant, {})))


def block_parameters(model: nn.Module) -> int:
    if isinstance(model, NaiveDecoder):
        parts = [model.decoder.layers]
    else:
        base = model.model.model
        parts = [base.layers]
        if isinstance(model, EncoderDecoder):
            parts += [base.context_processor.layers, base.context_processor.key_values]
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


class Rows:
    """A split: rows with a history that is not empty, as batches of `OneRecCollator`."""

    def __init__(self, rows: datasets.Dataset, collator: OneRecCollator):
        least = 1 if "targets" in rows.column_names else 2
        columns = [name for name in ("user", "history", "targets") if name in rows.column_names]
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


@torch.no_grad()
def score(model: nn.Module, rows: Rows, limit: int | None = None) -> list[float]:
    """Mean negative log-probability of each code, in nats; their sum is that of an item."""
    model.eval()
    total, count = 0.0, 0
    for index in rows.scoring(limit):
        log_probs = model(**rows.batch(index)).double()
        total, count = total - log_probs.sum(0), count + len(log_probs)
    model.train()
    return (total / count).tolist()


def check(splits: dict[str, Rows], sizes: list[int]) -> None:
    """Every contestant scores a target the same alone and beside others, padded and together with the row's other targets."""
    rows = splits["train"]
    index = np.concatenate([rows.scoring(5000)[i][-2:] for i in (0, -1)])
    single = []
    for i in index:
        history = rows.rows[i]["history"][-CONTEXT - 1 :]
        targets = rows.rows[i].get("targets")
        pairs = [(history, targets)] if targets else [(history[:n], [history[n]]) for n in range(1, len(history))]
        single += [rows.collator([{"user": 0, "history": past, "targets": items}]) for past, items in pairs]
    for variant in (*NAMES, *CHANGES):
        torch.manual_seed(0)
        model = build(variant, sizes).eval()
        alone = torch.cat([model(**batch) for batch in single])
        assert torch.allclose(model(**rows.batch(index)), alone, atol=1e-4), f"{variant}: targets are not independent"


def mflops_per_target(variant: str, sizes: list[int], rows: Rows, size: int) -> float:
    """Forward and backward, every matrix product, on the first 20 batches of seed 0."""
    model, targets = build(variant, sizes), 0
    (model.decoder if isinstance(model, NaiveDecoder) else model.model).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        for index in itertools.islice(rows.training(size, 0), 20):
            log_probs = model(**rows.batch(index))
            (-log_probs.mean()).backward()
            targets += len(log_probs)
    return counter.get_total_flops() / targets / 1e6


def average(decay: float):
    """A moving average that forgets the first weights soon: the decay grows from .1 to `decay`."""

    def update(averaged, current, count):
        torch._foreach_lerp_(averaged, current, 1 - min(decay, (1 + count.item()) / (10 + count.item())))

    return update


def train(variant: str, sizes: list[int], splits: dict[str, Rows], rate: float, seed: int, plan: dict) -> dict:
    torch.manual_seed(seed)
    model = build(variant, sizes).train()
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    averaged = AveragedModel(model, multi_avg_fn=average(0.99))
    curve, seconds, every = [], 0.0, plan["steps"] // plan["points"]
    batches = splits["train"].training(plan["batch_size"], seed)
    for step in range(1, plan["steps"] + 1):
        batch = splits["train"].batch(next(batches))
        start = time.process_time()
        (-model(**batch).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        seconds += time.process_time() - start
        if step % every == 0:
            curve.append((step, round(seconds, 2), sum(score(averaged, splits["validation"], plan["curve_rows"]))))
    result = {"block_parameters": block_parameters(model), "parameters": sum(p.numel() for p in model.parameters())}
    result |= {"cpu_seconds": round(seconds, 1), "curve": curve, "validation": curve[-1][2]}
    result["test_by_level"] = score(averaged, splits["test"])
    return result | {"test": sum(result["test_by_level"])}


def load(folder: str) -> tuple[list[int], dict[str, Rows]]:
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
    collator = OneRecCollator(tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids), CONTEXT)
    splits = datasets.load_from_disk(str(Path(folder) / "splits"))
    return tokenizer.codebook_sizes, {name: Rows(rows, collator) for name, rows in splits.items()}


def run(args, data: dict, report: dict) -> None:
    """Grid of learning rates, then seed by seed every cell that is missing; the report is written after each."""
    cells, first = report["cells"], next(iter(data))
    plans = {
        name: {"steps": steps, "batch_size": size, "points": args.points, "curve_rows": args.curve_rows}
        for name, steps, size in zip(data, args.steps, args.batch_sizes, strict=True)
    }

    def cell(name: str, variant: str, rate: float, seed: int) -> dict:
        key = f"{name}/{variant}/{rate}/{seed}"
        if key not in cells:
            sizes, splits = data[name]
            cells[key] = {"data": name, "variant": variant, "rate": rate, "seed": seed}
            cells[key] |= train(variant, sizes, splits, rate, seed, plans[name])
            cells[key]["mflops_per_target"] = mflops_per_target(
                variant, sizes, splits["train"], plans[name]["batch_size"]
            )
            args.output.write_text(json.dumps(report, indent=1))
            print(f"{key}: test {cells[key]['test']:.4f}, {cells[key]['cpu_seconds']} CPU s", flush=True)
        return cells[key]

    for name in NAMES:
        grid = [cell(first, name, rate, args.seeds[0]) for rate in args.learning_rates]
        report["rates"][name] = min(grid, key=lambda cell: cell["validation"])["rate"]
    for seed, name in itertools.product(args.seeds, data):
        for variant in NAMES:
            cell(name, variant, report["rates"][variant], seed)
    for seed, variant in itertools.product(args.seeds, CHANGES if args.changes else ()):
        cell(first, variant, report["rates"][LAZY], seed)


def chosen(report: dict, name: str, variant: str) -> list[dict]:
    rate = report["rates"].get(variant, report["rates"][LAZY])
    key = {"data": name, "variant": variant, "rate": rate}
    return [cell for cell in report["cells"].values() if key.items() <= cell.items()]


def at_time(cells: list[dict], seconds: float) -> float:
    """Mean over seeds of the curve at a CPU time, between two points on a line."""
    curves = [np.array(cell["curve"]) for cell in cells]
    return float(np.mean([np.interp(seconds, curve[:, 1], curve[:, 2], left=np.nan) for curve in curves]))


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f}" + (f" ±{stdev(values):.3f}" if len(values) > 1 else "")


def table(report: dict, data: dict) -> None:
    columns = ("data", "variant", "lr", "seeds", "parameters in blocks", "all", "MFLOPs per target", "CPU s")
    columns += ("test NLL", "validation NLL", "the same at the lazy decoder's CPU time")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for name in data:
        limit = mean(cell["cpu_seconds"] for cell in chosen(report, name, LAZY))
        for variant in (*NAMES, *CHANGES):
            if not (cells := chosen(report, name, variant)):
                continue
            row = [name, variant, cells[0]["rate"], len(cells), f"{cells[0]['block_parameters']:,}"]
            row += [f"{cells[0]['parameters']:,}", f"{cells[0]['mflops_per_target']:.2f}"]
            row += [f"{mean(cell['cpu_seconds'] for cell in cells):.0f}"]
            row += [spread([cell[split] for cell in cells]) for split in ("test", "validation")]
            row += [f"{at_time(cells, limit):.3f}"]
            print("| " + " | ".join(map(str, row)) + " |")


def plot(report: dict, data: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, len(data), figsize=(5.5 * len(data), 4), squeeze=False)
    for axis, name in zip(axes[0], data):
        for variant in NAMES:
            curves = np.array([cell["curve"] for cell in chosen(report, name, variant)])  # (seeds, points, 3)
            _, seconds, loss = curves.mean(0).T
            line = axis.plot(seconds, loss, "o-", markersize=3, label=variant)[0]
            axis.fill_between(seconds, curves[..., 2].min(0), curves[..., 2].max(0), alpha=0.2, color=line.get_color())
        axis.set(xscale="log", xlabel="CPU seconds of training (log scale)", title=name)
        axis.set_ylabel("nats per item, validation")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", nargs="+", required=True, help="NAME=FOLDER; the first one has the grid and changes."
    )
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--changes", action=argparse.BooleanOptionalAction, default=True, help="K/V sharing too.")
    parser.add_argument("--steps", type=int, nargs="+", default=[704, 352], help="Per data set.")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[96, 192], help="Rows; per data set.")
    parser.add_argument("--points", type=int, default=8, help="Of the curve.")
    parser.add_argument("--curve_rows", type=int, default=3000, help="Of validation, per point.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = {name: getattr(args, name) for name in ("steps", "batch_sizes", "points", "curve_rows", "threads")}
    report = {"settings": settings, "torch": torch.__version__, "rates": {}, "cells": {}}
    if args.output.exists():
        report = json.loads(args.output.read_text())
        if report["settings"] != settings:
            raise ValueError(
                f"{args.output} was made with {report['settings']}, not {settings}: give another --output."
            )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    data = {name: load(folder) for name, folder in (entry.split("=", 1) for entry in args.data)}
    for sizes, splits in data.values():
        check(splits, sizes)
    run(args, data, report)
    table(report, data)
    if args.plot:
        plot(report, data, args.plot)


if __name__ == "__main__":
    main()
