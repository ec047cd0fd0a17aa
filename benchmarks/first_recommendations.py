"""From one's own CSV to printed recommendations: commands, lines and minutes, in Python and by the commands.

    python benchmarks/first_recommendations.py

The log is made here: 50,000 events of 5,000 users and 2,000 items, text ids, ISO times, as a shop exports them.
Each way runs as a user types it, in processes of its own, with the defaults of the package.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from onerec_hf.explanation import plot_explanation
from onerec_hf.recommender import Recommender

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """from onerec_hf import OneRec

model = OneRec().fit("log.csv")
print(model.recommend(["user-00001", "user-00002"], k=5))
"""
# as they are typed; `onerec` is started here as a module, which is the same
COMMANDS = [
    "onerec prepare --source log.csv --output data",
    "onerec sft --config small_sft.yaml --data data --output_dir model",
    'python -c "from onerec_hf.recommender import Recommender; '
    "print(Recommender.from_pretrained('model').recommend([['item-0001', 'item-0002']], k=5))\"",
]


def write_log(path: Path, num_users: int, num_items: int, events_per_user: int, seed: int = 0) -> None:
    """
    A log in which what comes next depends on what was there: every user walks on from item to item, by one of five
    steps that the item has, or jumps to a popular one.
    """
    generator = np.random.default_rng(seed)
    weights = 1 / np.arange(1, num_items + 1)
    steps = generator.integers(num_items, size=(num_items, 5))
    current = generator.choice(num_items, num_users, p=weights / weights.sum())
    rows = []
    for _ in range(events_per_user):
        rows.append(current)
        jumps = generator.choice(num_items, num_users, p=weights / weights.sum())
        walks = steps[current, generator.integers(5, size=num_users)]
        current = np.where(generator.random(num_users) < 0.2, jumps, walks)
    minutes = np.arange(events_per_user)[:, None] * 1440 + generator.integers(1440, size=(events_per_user, num_users))
    times = pd.Timestamp("2026-01-01T00:00:00Z") + pd.to_timedelta(minutes.ravel(), unit="min")
    frame = pd.DataFrame({"user_id": np.tile(np.arange(num_users), events_per_user), "item_id": np.concatenate(rows)})
    frame["user_id"] = "user-" + frame["user_id"].astype(str).str.zfill(5)
    frame["item_id"] = "item-" + frame["item_id"].astype(str).str.zfill(4)
    frame["timestamp"] = times.strftime("%Y-%m-%dT%H:%M:%SZ")
    frame.sort_values("timestamp").to_csv(path, index=False)


def run(commands: list[str], folder: Path) -> tuple[float, float]:
    """Runs shell commands one after the other; their wall time and processor time, in seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for command in commands:
        command = command.replace("onerec ", f"{sys.executable} -m onerec_hf.cli ", 1)
        command = command.replace("python ", f"{sys.executable} ", 1) if command.startswith("python ") else command
        subprocess.run(command, shell=True, check=True, cwd=folder, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - start, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--events_per_user", type=int, default=10)
    parser.add_argument("--picture", help="PNG of why the model recommends an item, for docs/natural_calls.md.")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_log(folder / "log.csv", arguments.users, arguments.items, arguments.events_per_user)
        (folder / "first.py").write_text(PYTHON, encoding="utf-8")
        ways = {"Python": ["python first.py"], "commands": COMMANDS}
        lines = {"Python": len([line for line in PYTHON.split("\n") if line]), "commands": len(COMMANDS)}
        found = {way: run(commands, folder) for way, commands in ways.items()}
        for way, (wall, used) in found.items():
            numbers = f"{wall / 60:.1f} minutes, {used / 60:.1f} of a processor"
            print(f"{way:8} {len(ways[way])} commands, {lines[way]} lines: {numbers}", flush=True)
        if arguments.picture:
            recommender = Recommender.from_pretrained(folder / "model")
            log = pd.read_csv(folder / "log.csv")
            history = log[log["user_id"] == log["user_id"][0]]["item_id"].tolist()[-6:]
            best = recommender.recommend([history], k=1, exclude_seen=True)[0][0]
            plot_explanation(recommender.explain(history, best.item_id), arguments.picture)


if __name__ == "__main__":
    main()
