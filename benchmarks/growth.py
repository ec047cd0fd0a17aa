"""How cost grows: a training step over context, width and experts, a search over beams and catalogue, with the
expected slope of each.

    python benchmarks/growth.py --output outputs/growth.json --plot docs/growth.png

OneRec-V2 on one core. Expected, relative to the smallest size: of a training step its model FLOPs (train.py); of a
search the FLOPs of its matrix products, counted; of a larger catalogue, and of more experts with as many chosen, none.
Seconds are those of the process, medians; the sizes of one line alternate.
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from other_ways import alternate, count_flops, zipf_catalogue
from train import EVERY, inputs_of, model_flops

from onerec_hf import Catalogue, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.models.beam_search import beam_search

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
EXPERTS = {"num_experts_per_tok": 2, "num_shared_experts": 1, "moe_intermediate_size": 128, "first_dense_layers": 0}
SEARCH = BASE | {"num_hidden_layers": 4}


def training(context: int, codes: int = 1024, **settings):
    """A function that makes one step of one history, and its model FLOPs."""
    torch.manual_seed(0)
    model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=[codes] * 3, **(BASE | settings))).train()
    data = inputs_of(EVERY, context, 1, codes, "cpu")

    def step():
        model(**data).loss.backward()
        model.zero_grad()

    return step, model_flops(EVERY, model, context, 1)


@torch.no_grad()
def searching(beams: int, items: int, codes: int, context: int):
    """A function that makes one search of one user, and the FLOPs of its products."""
    torch.manual_seed(0)
    model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=[codes] * 3, **SEARCH)).eval()
    catalogue = Catalogue(zipf_catalogue(items, codes, 3, 0.5), [codes] * 3)
    context_ids = inputs_of(EVERY, context, 1, codes, "cpu")["context_ids"]

    @torch.no_grad()
    def search():
        return beam_search(model, catalogue, model.encode_context(context_ids=context_ids), beams)

    return search, count_flops(search)[1]


def lines(args: argparse.Namespace) -> dict[str, tuple[str, dict]]:
    """Of each picture: what the horizontal axis counts, and by size the function and its expected cost."""
    made = {size: training(args.context, num_experts=size, **EXPERTS) for size in args.experts}
    first = made[args.experts[0]][1]
    large = {size: searching(args.beams[2], size, args.codes, args.context) for size in args.items}
    return {
        "training step over the context": ("items of the history", {n: training(n) for n in args.contexts}),
        "training step over the parameters": (
            "width of the model",
            {n: training(args.context, hidden_size=n, intermediate_size=4 * n) for n in args.widths},
        ),
        "training step over the experts, two chosen": ("experts", {n: (made[n][0], first) for n in made}),
        "search over the beams": (
            "beams",
            {n: searching(n, args.items[1], args.codes, args.context) for n in args.beams},
        ),
        "search over the catalogue": ("items", {n: (way, large[args.items[0]][1]) for n, (way, _) in large.items()}),
    }


def draw(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(row["line"] for row in rows))
    figure, axes = plt.subplots(2, 3, figsize=(9, 6), layout="constrained")
    axes[1, 2].set_axis_off()
    for axis, name in zip(axes.flat, names):
        own = [row for row in rows if row["line"] == name]
        sizes = [row["size"] for row in own]
        axis.loglog(sizes, [row["expected"] for row in own], "--", color="#8a949c", label="expected")
        axis.loglog(sizes, [row["measured"] for row in own], "o-", color="#0072b2", label="measured")
        axis.set_title(name.replace(" over the ", "\nover the "), fontsize=9)
        axis.set_xlabel(own[0]["axis"], fontsize=8)
        axis.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=7, rotation=30)
        axis.set_xticks([], minor=True)
        top = max(max(row["measured"], row["expected"]) for row in own)
        ticks = [n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256) if n <= max(2, 1.3 * top)]
        axis.set_yticks(ticks, [str(n) for n in ticks], fontsize=7)
        axis.set_yticks([], minor=True)
        axis.set_ylim(0.7, max(2.2, 1.3 * top))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("processor seconds over those\nof the smallest size; lower is better", fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--beams", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--items", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--codes", type=int, default=1024, help="of each of three levels")
    parser.add_argument("--context", type=int, default=512, help="of all but the first line")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print("| | size | milliseconds | measured, over the smallest | expected |\n|---|---|---|---|---|")
    for name, (axis, ways) in lines(args).items():
        for way, _ in ways.values():
            way()  # the first call is slower
        seconds, _ = alternate({size: way for size, (way, _) in ways.items()}, args.repeats)
        first = next(iter(ways))
        for size, (_, flops) in ways.items():
            ratios = (seconds[size] / seconds[first], flops / ways[first][1])
            row = {"line": name, "axis": axis, "size": size, "milliseconds": 1e3 * seconds[size]}
            rows.append(row | dict(zip(("measured", "expected"), ratios)))
            print(f"| {name} | {size:,} | {row['milliseconds']:.1f} | {ratios[0]:.2f} | {ratios[1]:.2f} |", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2), encoding="utf-8")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
