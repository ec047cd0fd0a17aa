"""KuaiRand-Pure: how many of the seconds that users watched in the test days lay in videos of their lists.

    onerec leaderboard --dataset outputs/kuairand --output outputs/kuairand_board
    python experiments/found_watch_time.py --source FOLDER --data outputs/kuairand --start 1651766400000 \\
        --board outputs/kuairand_board --output outputs/found_watch_time.json

A list is made before the test days from what a user viewed long until then; its first ten videos are looked up in all
that the user was shown in these days, with the seconds watched. Only videos that the service of that time chose to
show can be found, so the number compares lists and is no forecast of watch time. Per entry of the board and kind of
list (seen videos may come back, or not): the mean of a user's seconds over users, then over seeds; and the paired 95%
interval of the difference to `--reference`, over users whose seconds are averaged over the seeds.
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np

from onerec_hf.data import DataFolder, Interactions, load_kuairand
from onerec_hf.evaluation import paired_bootstrap

TOP = 10
KINDS = {"kept": "predictions.parquet", "masked": "predictions_exclude_seen.parquet"}


def watched_seconds(log: Interactions, start: int) -> dict[tuple[int, int], float]:
    """Seconds by (user index, item index) from `start` on."""
    late = log.where(log.timestamp >= start)
    seconds: dict[tuple[int, int], float] = {}
    for user, item, time in zip(late.user_index.tolist(), late.item_index.tolist(), late.feedback["play_time_ms"]):
        seconds[user, item] = seconds.get((user, item), 0.0) + float(time) / 1000
    return seconds


def found(folder: Path, kind: str, users: list[int], seconds: dict[tuple[int, int], float]) -> np.ndarray:
    """Seconds (U,) of each user's list."""
    table = datasets.Dataset.from_parquet(str(folder / KINDS[kind]))
    if table["user"][:] != users:
        raise ValueError(f"{folder} ranks other users than the test split: give the board of this data folder.")
    return np.array(
        [sum(seconds.get((u, item), 0.0) for item in own[:TOP]) for u, own in zip(users, table["predictions"])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="folder of KuaiRand-Pure")
    parser.add_argument("--data", required=True, help="folder that `onerec prepare` wrote of it, split by time")
    parser.add_argument("--start", type=int, required=True, help="begin of the test days: --test_start of prepare")
    parser.add_argument("--board", type=Path, required=True, help="folder that `onerec leaderboard` wrote")
    parser.add_argument("--reference", default="ensemble", help="entry to compare with")
    parser.add_argument("--output", type=Path, default=Path("outputs/found_watch_time.json"))
    args = parser.parse_args()
    log, data = load_kuairand(args.source, drop_duplicates=True), DataFolder(args.data)
    same = np.array_equal(log.item_ids, data.catalogue.item_ids) and log.num_users == data.num_users
    if not same:
        raise ValueError(f"{args.data} has other items or users than {args.source}: prepare it from there.")
    seconds, users = watched_seconds(log, args.start), data.splits["test"]["user"][:]
    by_user: dict[int, float] = {}
    for (user, _), time in seconds.items():
        by_user[user] = by_user.get(user, 0.0) + time
    total = float(np.mean([by_user.get(user, 0.0) for user in users]))
    report: dict = {"users": len(users), "seconds watched per user": total, "reference": args.reference}
    runs = {
        folder.name: sorted(run.parent for run in folder.glob("seed*/metrics.json"))
        for folder in sorted(args.board.iterdir())
    }
    for kind in KINDS:
        own = {
            name: np.stack([found(run, kind, users, seconds) for run in each]) for name, each in runs.items() if each
        }
        for name, values in own.items():
            means = values.mean(1)
            row = {"mean": float(means.mean()), "std": float(means.std(ddof=1)) if len(means) > 1 else None}
            row |= {"seeds": len(means), "share": float(means.mean() / total)}
            row["minus the reference"] = paired_bootstrap(values.mean(0), own[args.reference].mean(0))
            report.setdefault(kind, {})[name] = row
            print(kind, name, json.dumps(row), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
