"""The pictures of docs/results.md, "Constrained generation", from what generate.py and selection.py wrote.

    python benchmarks/pictures.py --generation outputs/generate_*.json --selection outputs/selection_*.json \\
        --output docs

A way has one colour in all of them.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"unconstrained": "#b8b8b8", "dict trie": "#e08214", "processor": "#8073ac", "flashrec": "#1b7837"}
COLOURS |= {"ours": "#08306b", "ours, compiled": "#4292c6"}


def _colour(name: str) -> str:
    return COLOURS.get(name, "#d6604d")


def _order(rows: list[dict]) -> list[str]:
    """The ways of all rows, ours last."""
    return sorted(dict.fromkeys(name for row in rows for name in row["seconds"]), key=lambda name: "ours" in name)


def bars(path: Path, rows: list[dict], label, title: str) -> None:
    """One group of bars per row: seconds of each way on a logarithmic axis, with the ratio to ours above it."""
    names = _order(rows)
    figure, axis = plt.subplots(figsize=(max(6, 1.5 * len(rows)), 4.5), layout="constrained")
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        group = [j for j, row in enumerate(rows) if name in row["seconds"]]
        place = [j + (i - (len(names) - 1) / 2) * width for j in group]
        drawn = axis.bar(place, [rows[j]["seconds"][name] for j in group], width, label=name, color=_colour(name))
        ratios = [rows[j]["seconds"][name] / rows[j]["seconds"]["ours"] for j in group]
        texts = [f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x" for ratio in ratios]
        axis.bar_label(drawn, texts if name != "ours" else None, fmt="", fontsize=8, rotation=90, padding=3)
    axis.set_yscale("log")
    axis.margins(x=0.02, y=0.15)
    axis.set_xticks(range(len(rows)), [label(row) for row in rows], fontsize=9)
    axis.set_ylabel("processor seconds")
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.19))
    _save(figure, path)


def curves(path: Path, rows: list[dict], title: str) -> None:
    """Milliseconds of each way over the items, a panel per codebook and batch; the band spans the catalogues."""
    rows = [row | {"codes": f"{len(row['sizes'])} x {row['sizes'][0]}"} for row in rows]
    panels = sorted({(row["codes"], row["batch"]) for row in rows})
    size = (3.6 * len(panels), 3.9)
    figure, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, panel in zip(axes[0], panels):
        inside = [row for row in rows if (row["codes"], row["batch"]) == panel]
        for name in _order(inside):
            found: dict[int, list[float]] = {}
            for row in inside:
                if name in row["seconds"]:
                    found.setdefault(row["items"], []).append(1e3 * row["seconds"][name])
            items = sorted(found)
            low, high = ([edge(found[n]) for n in items] for edge in (min, max))
            axis.fill_between(items, low, high, color=_colour(name), alpha=0.25, linewidth=0)
            middle = [sorted(found[n])[len(found[n]) // 2] for n in items]
            axis.plot(items, middle, marker="o", markersize=4, color=_colour(name), label=name)
        axis.set(xscale="log", yscale="log", xlabel="items", title=f"{panel[0]} codes, batch {panel[1]}")
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("processor milliseconds, all steps")
    handles, labels = max((axis.get_legend_handles_labels() for axis in axes[0]), key=lambda both: len(both[1]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    _save(figure, path)


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _read(paths: list[Path]) -> list[dict]:
    found = []
    for path in paths:
        written = json.loads(path.read_text())
        found += [written["arguments"] | row for row in written["rows"]]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generation", type=Path, nargs="+", default=[])
    parser.add_argument("--selection", type=Path, nargs="+", default=[])
    parser.add_argument("--beams", type=int, default=128)
    parser.add_argument("--output", type=Path, required=True, help="a folder")
    args = parser.parse_args()
    cases = {(row["model"], row["batch"], row["context"], row["beams"]): row for row in _read(args.generation)}
    rows = [
        row for row in cases.values() if row["beams"] == args.beams
    ]  # of a case measured twice, the file named last
    if rows:
        rows.sort(key=lambda row: (row["context"], row["model"]))
        label = "{model}\nbatch {batch}\ncontext {context}".format_map
        short = {"OneRecForCausalLM": "OneRec", "OneRecV2ForCausalLM": "OneRec-V2", "t5": "T5", "qwen3": "Qwen3"}
        rows = [row | {"model": short.get(row["model"], row["model"])} for row in rows]
        title = f"End to end, {args.beams} beams (how many times our time)"
        bars(args.output / "generation.png", rows, label, title)
    rows = [row for row in _read(args.selection) if row["beams"] == args.beams]
    if rows:
        title = f"Selection of all steps, {args.beams} beams; bands span uniform, Zipf .5 and Zipf .8 catalogues"
        curves(args.output / "selection.png", rows, title)


if __name__ == "__main__":
    main()
