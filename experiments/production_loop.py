"""Four ways to treat a new day, in `onerec loop`: frozen weights, daily training, and it with preferences or GBPO.

    python experiments/production_loop.py --seeds 0 1 2 --num_days 10 --output outputs/loops --record loop

Each seed is a world of its own. All policies of a world begin with the same log and the same model of day 0, so day 1
is the same for all of them. Finished loops are not run again. `--record NAME` writes results/NAME.json and
results/NAME_days.json. Simulated numbers are no results on real data.
"""

import argparse
import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from onerec_hf.scripts import loop
from onerec_hf.scripts.loop_state import POLICIES, LoopArguments

NAMES = {
    "frozen": "frozen weights, new videos get codes",
    "sft": "daily SFT",
    "ipa": "daily SFT, IPA every third day",
    "gbpo": "daily SFT + GBPO",
}
BY_DAY = {
    "true_watch_time": "true watch time of a list, s",
    "new_share": "views on new videos, %",
    "coverage": "coverage, %",
    "concentration": "views on the top tenth, %",
    "diversity": "diversity",
    "sampled_legality": "legality of samples, %",
}
PERCENT = ("new_share", "coverage", "concentration", "sampled_legality")
PORT = 8040


def run(folder: Path, policy: str, seed: int, settings: dict[str, Any]) -> list[dict]:
    """The days of one loop; it begins with the log and the model of the world's first loop."""
    own, first = folder / f"{policy}_{seed}", folder / f"{POLICIES[0]}_{seed}"
    for part in ("impressions", "trained"):
        source, target = first / part / "day-000", own / part / "day-000"
        if own != first and not target.exists():
            partial = target.with_name(".day-000.copy")
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source, partial)
            partial.rename(target)
    return loop.main(LoopArguments(output=str(own), policy=policy, seed=seed, port=PORT + seed, **settings))


def interval(values: np.ndarray) -> dict[str, float]:
    """95% of a mean over worlds, by Student's t."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return {"low": float(values.mean() - half), "high": float(values.mean() + half)}


def mean(values: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation over worlds."""
    return {"mean": float(values.mean()), "std": float(values.std(ddof=1))}


def summary(days: dict[str, np.ndarray]) -> list[list]:
    """A row per policy. `days`: metric -> (policies, worlds, days); means are over the days that follow the first."""
    rows = []
    after = {name: values[:, :, 1:].mean(2) for name, values in days.items()}  # (policies, worlds)
    for i, policy in enumerate(POLICIES):
        row: list[Any] = [NAMES[policy], mean(after["true_watch_time"][i])]
        change = 100 * (after["true_watch_time"][i] / after["true_watch_time"][0] - 1)
        row += [None, None] if i == 0 else [mean(change), interval(change)]
        row += [mean(after["watch_time"][i]), mean(100 * after["likes"][i]), mean(100 * after["new_share"][i])]
        for name in ("coverage", "concentration", "diversity"):
            row.append(mean(days[name][i, :, -1] * (100 if name in PERCENT else 1)))
        row += [mean(100 * days["sampled_legality"][i, :, -1]), mean(days["staleness"][i, :, -1])]
        rows.append(row)
    return rows


def columns(num_days: int) -> list[dict[str, str]]:
    last = f"on day {num_days}"
    return [
        {"name": "policy"},
        {"name": "true watch time of a list, s", "picture": "0.0"},
        {"name": "over frozen, %", "picture": "+0.0"},
        {"name": "95% over worlds", "picture": "+0.0"},
        {"name": "watch time per user and day, s", "picture": "0.0"},
        {"name": "likes per 100 users and day", "picture": "0.0"},
        {"name": "views on new videos, %", "picture": "0.00"},
        {"name": f"coverage {last}, %", "picture": "0"},
        {"name": f"views on the top tenth {last}, %", "picture": "0"},
        {"name": f"diversity {last}", "picture": "0.00"},
        {"name": f"legality of samples {last}, %", "picture": "0"},
        {"name": f"staleness {last}, days", "picture": "0.0"},
    ]


def write_records(name: str, args: argparse.Namespace, days: dict[str, np.ndarray], commit: str) -> None:
    """The two records: means, and day by day."""
    num_days = args.num_days
    shared = {"commands": [args.command], "seeds": args.seeds, "hardware": args.hardware}
    shared |= {"date": time.strftime("%Y-%m-%d"), "commit": commit}
    title = f"The production loop in {len(args.seeds)} simulated worlds: means of days 2 to {num_days}, ± over worlds"
    whole = {"title": title, **shared, "columns": columns(num_days), "rows": summary(days)}
    rows = []
    for metric, text in BY_DAY.items():
        factor = 100 if metric in PERCENT else 1
        for i, policy in enumerate(POLICIES):
            values = factor * days[metric][i]  # (worlds, days)
            rows.append([f"{text}: {policy}", *(mean(values[:, day]) for day in range(num_days))])
    numbered = [{"name": f"day {day + 1}", "picture": "0.00"} for day in range(num_days)]
    by_day = {"title": title.replace("means of days 2 to", "day 1 to"), **shared}
    by_day |= {"columns": [{"name": "what, policy"}, *numbered], "rows": rows}
    for own, record in ((name, whole), (f"{name}_days", by_day)):
        path = Path(__file__).resolve().parents[1] / "results" / f"{own}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_days", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("outputs/loops"))
    parser.add_argument("--settings", default="{}", help="More arguments of onerec loop, JSON.")
    parser.add_argument("--hardware", default="", help="What the record says of the machine.")
    parser.add_argument("--record", help="Name of the records in results/ that are written.")
    args = parser.parse_args()
    git = ["git", "rev-parse", "--short", "HEAD"]  # before the run: there may be another commit behind it
    commit = subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    args.command = f"python experiments/production_loop.py --seeds {' '.join(map(str, args.seeds))} "
    args.command += f"--num_days {args.num_days} --output {args.output}"
    args.command += f" --settings '{args.settings}'" if args.settings != "{}" else ""
    args.command += f" --record {args.record}" if args.record else ""
    settings = {"num_days": args.num_days} | json.loads(args.settings)
    found = [[run(args.output, policy, seed, settings) for policy in POLICIES] for seed in args.seeds]
    days = {
        metric: np.array([[[row[metric] for row in own] for own in world] for world in found]).swapaxes(0, 1)
        for metric in (*BY_DAY, "watch_time", "likes", "staleness")
    }
    for row in summary(days):
        print(json.dumps(row))
    if args.record:
        write_records(args.record, args, days, commit)


if __name__ == "__main__":
    main()
