"""One table of everything: runs or resumes each entry with each seed, then compares them on the same test users.

    python recipes/leaderboard.py --dataset outputs/beauty --entries recipes/configs/leaderboard.yaml --output outputs/leaderboard

`--dataset` is a folder that `recipes/prepare.py` wrote. An entry of the YAML file names a recipe of this folder, its arguments, and
`seeds` where one is enough. A run lies in `OUTPUT/<entry>/seed<n>`; it is taken as it is if it ended with the same arguments,
resumed if it left a checkpoint, and made anew otherwise. Writes `leaderboard.md` (means ± standard deviation over seeds; paired
bootstrap intervals against the best baseline, which is chosen on validation; recall by how often the target occurs in training),
`leaderboard.json` and a picture. `--run false`: of what has ended.
"""

import json
import runpy
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import yaml
from matplotlib.figure import Figure
from trl import TrlParser

from onerec_hf.data import load_splits
from onerec_hf.evaluation import frequency_strata, paired_bootstrap, recall_by_frequency
from onerec_hf.trainers.resume import checkpoints_of, why_incomplete

METRICS = ("recall@5", "recall@10", "recall@20", "ndcg@10")
KINDS = {"test": "predictions", "test_exclude_seen": "predictions_exclude_seen"}


@dataclass
class LeaderboardArguments:
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote.", "aliases": ["--dataset"]})
    output: str = field(metadata={"help": "Folder to write."})
    entries: str = field(
        default=str(Path(__file__).parent / "configs" / "leaderboard.yaml"), metadata={"help": "YAML file of entries."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of entries; default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    run: bool = True


def run(args: LeaderboardArguments, entry: dict, folder: Path, seed: int) -> None:
    """Runs one recipe in this process unless `folder` holds its result."""
    output = "--output_dir" if entry["recipe"] == "sft.py" else "--output"
    settings = {"data": args.data} | {name: value for name, value in entry.items() if name not in ("recipe", "seeds")}
    argv = ["--seed", str(seed)]
    for name, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    done, command = folder / "command.json", [entry["recipe"], *argv]
    same = done.is_file() and json.loads(done.read_text(encoding="utf-8")) == command
    if same and (folder / "metrics.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    done.write_text(json.dumps(command), encoding="utf-8")
    for checkpoint in [] if same else checkpoints_of(folder):  # of other arguments
        shutil.rmtree(checkpoint)
    if not all(map(why_incomplete, checkpoints_of(folder))):
        argv += ["--resume_from_checkpoint", "true"]
    print(f"-> {folder}: {' '.join(command)}", flush=True)
    sys.argv = [entry["recipe"], *argv, output, str(folder)]
    runpy.run_path(str(Path(__file__).parent / entry["recipe"]), run_name="__main__")


def collect(folders: list[Path], test: datasets.Dataset, counts: np.ndarray, strata: list) -> dict:
    """Means and deviations over the seeds of one entry, and each user's recall@10, averaged over them."""
    reports = [json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in folders]
    result = {"seeds": len(folders), "seconds": [r.get("fit_seconds", r.get("train_seconds")) for r in reports]}
    if all("validation" in report for report in reports):
        result["validation"] = float(np.mean([report["validation"]["ndcg@10"] for report in reports]))
    for kind, name in KINDS.items():
        tables = [datasets.Dataset.from_parquet(str(folder / f"{name}.parquet")) for folder in folders]
        if any(table["user"] != test["user"] for table in tables):
            raise ValueError(f"{folders[0].parent} was run on other test users than --dataset has: delete it.")
        values = {metric: [report[kind][metric] for report in reports] for metric in METRICS}
        result[kind] = {m: (float(np.mean(v)), float(np.std(v, ddof=1)) if v[1:] else None) for m, v in values.items()}
        result[f"users_{kind}"] = np.mean([table["recall@10"] for table in tables], axis=0)
        if kind == "test":
            recalls = [
                recall_by_frequency(np.array(table["predictions"]), test["targets"], counts, strata)
                for table in tables
            ]
            result["strata"] = [float(np.mean([recall[i][0] for recall in recalls])) for i in range(len(strata))]
    return result


def tables(results: dict, reference: str, strata: list) -> str:
    """Markdown; kept / masked in every cell, best recall@10 first."""

    def number(mean, deviation):
        return f"{mean:.4f}" + (f" ±{deviation:.4f}" if deviation is not None else "")

    lines = [f"| model | seeds | {' | '.join(METRICS)} | recall@10 - {reference}, 95% | seconds |", "|---" * 8 + "|"]
    for name, result in results.items():
        cells = [" / ".join(number(*result[kind][metric]) for kind in KINDS) for metric in METRICS]
        intervals = " / ".join("[{:+.4f}, {:+.4f}]".format(*result["interval"][kind]) for kind in KINDS)
        against, seconds = "-" if name == reference else intervals, f"{np.mean(result['seconds']):.0f}"
        lines.append(f"| {' | '.join([name, str(result['seeds']), *cells, against, seconds])} |")
    heads = ["recall@10, target seen so often in training", *(f"{low}-{high}" for low, high in strata)]
    lines += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, result in results.items():
        lines.append(f"| {name} | {' | '.join(f'{recall:.4f}' for recall in result['strata'])} |")
    return "\n".join(lines) + "\n"


def picture(results: dict, strata: list, path: Path) -> None:
    """Left: recall@10, seen items masked, with its deviation. Right: recall@10 by frequency of the target."""
    figure = Figure(figsize=(11, 1.6 + 0.34 * len(results)), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(results)[::-1]
    for kind, color, shift in (("test", "#b6c8de", -0.19), ("test_exclude_seen", "#4c78a8", 0.19)):
        means, deviations = zip(*(results[name][kind]["recall@10"] for name in names))
        label = "seen items " + ("masked" if kind.endswith("seen") else "kept")
        left.barh(
            np.arange(len(names)) + shift, means, 0.36, xerr=[d or 0 for d in deviations], color=color, label=label
        )
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("recall@10")
    left.legend(frameon=False, fontsize=8)
    for name in results:
        right.plot(results[name]["strata"], marker="o", markersize=3, linewidth=1.2, label=name)
    right.set_xticks(range(len(strata)), [str(low) if low == high else f"{low}-{high}" for low, high in strata])
    right.set_xlabel("training occurrences of the target")
    right.legend(frameon=False, fontsize=8, ncols=2)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(args: LeaderboardArguments) -> dict:
    """Runs the recipe; returns what it writes to `leaderboard.json`."""
    output, entries = Path(args.output), yaml.safe_load(Path(args.entries).read_text(encoding="utf-8"))
    if unknown := set(args.only) - set(entries):
        raise ValueError(f"{args.entries} has no entries {sorted(unknown)}; it has {sorted(entries)}.")
    splits = load_splits(args.data)
    num_items = len(datasets.Dataset.from_parquet(str(Path(args.data) / "items.parquet")))
    train = np.concatenate(splits["train"].with_format("numpy")["history"])
    counts, targets = np.bincount(train, minlength=num_items), splits["test"]["targets"]
    strata, results = frequency_strata(counts, targets), {}
    for name in args.only or entries:
        seeds = entries[name].get("seeds", args.seeds)
        folders = [output / name / f"seed{seed}" for seed in seeds]
        if args.run:
            for seed, folder in zip(seeds, folders):
                run(args, entries[name], folder, seed)
        if folders := [folder for folder in folders if (folder / "metrics.json").is_file()]:
            results[name] = collect(folders, splits["test"], counts, strata)
    baselines = [name for name in results if "validation" in results[name]]
    if not baselines:
        raise ValueError(f"no baseline has ended in {output}: there is nothing to compare with.")
    reference = max(baselines, key=lambda name: results[name]["validation"])
    results = dict(sorted(results.items(), key=lambda item: -item[1]["test_exclude_seen"]["recall@10"][0]))
    users = {kind: {name: result.pop(f"users_{kind}") for name, result in results.items()} for kind in KINDS}
    for name, result in results.items():
        result["interval"] = {kind: paired_bootstrap(users[kind][name], users[kind][reference]) for kind in KINDS}
    report = {"reference": reference, "strata": strata, "results": results}
    (output / "leaderboard.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (output / "leaderboard.md").write_text(tables(results, reference, strata), encoding="utf-8")
    picture(results, strata, output / "leaderboard.png")
    return report


if __name__ == "__main__":
    arguments = TrlParser(LeaderboardArguments).parse_args_and_config()[0]
    main(arguments)
    print((Path(arguments.output) / "leaderboard.md").read_text(encoding="utf-8"))
