"""Table 1 of OneRec (arXiv:2502.18965) on a real log: what a reward model that nobody trained against says about
served lists.

    python experiments/judge.py --judge outputs/reward_judge --data outputs/policy --runs outputs/sft outputs/ipa

`--runs` are folders with `predictions.parquet`, as every recipe writes them, for the test split of `--data`; several
seeds of a system are given as `NAME=FOLDER,FOLDER`. For every objective of the judge: its probability, mean over the
first ten items of a list and largest of the ten, averaged over test rows; recall@10 beside. The judge must be trained
on other days than the reward model that picked the pairs. It is an opinion all the same, not what people would do.
"""

import argparse
import json
from pathlib import Path

import datasets
import numpy as np
import torch

from onerec_hf.data import DataFolder, load_splits
from onerec_hf.rewards import CandidateCollator
from onerec_hf.scripts.reward_arguments import load_reward

TOP = 10


@torch.no_grad()
def judged(lists: np.ndarray, rows: datasets.Dataset, model, collate, item_token_ids: np.ndarray) -> np.ndarray:
    """Probabilities (users, TOP, X) of every objective for the first items of each list."""
    found = []
    for start in range(0, len(rows), 200):
        some = [dict(row) for row in rows.select(range(start, min(start + 200, len(rows))))]
        for row, items in zip(some, lists[start : start + 200, :TOP]):
            row["completion_ids"] = item_token_ids[items].tolist()
        found.append(model(**collate(some)).logits.sigmoid().view(len(some), TOP, -1))
    return torch.cat(found).numpy()


def main(judge: str, data: str, runs: list[str], output: Path, users: int | None = None) -> dict:
    """Prints the table; returns what it writes."""
    reward = load_reward(judge, DataFolder(data))
    model, collator, catalogue = reward.model, reward.collator, reward.catalogue
    rows = load_splits(data)["test"]
    rows = rows.select(range(min(users or len(rows), len(rows))))
    collate = CandidateCollator(collator, catalogue)
    targets, report = model.config.targets, {}
    print("| system | " + " | ".join(f"{target} mean / max" for target in targets) + " | recall@10 |")
    print("|---" * (len(targets) + 2) + "|")
    for run in runs:
        name, _, folders = run.rpartition("=")
        values = []
        for folder in folders.split(","):
            table = datasets.Dataset.from_parquet(str(Path(folder) / "predictions.parquet")).with_format("numpy")
            lists, wanted = np.stack(table["predictions"][: len(rows)]), [set(row) for row in rows["targets"]]
            if len(lists) < len(rows):
                raise ValueError(f"{folder} has predictions for {len(lists)} of {len(rows)} test rows: set --users.")
            found = judged(lists, rows, model, collate, collator.item_token_ids)
            recall = np.mean([len(own & set(items)) / len(own) for own, items in zip(wanted, lists[:, :TOP].tolist())])
            values.append([*found.mean((0, 1)), *found.max(1).mean(0), recall])
        mean, spread = np.mean(values, axis=0), np.std(values, axis=0, ddof=len(values) > 1)
        cells = [f"{m:.4f} ±{s:.4f}" for m, s in zip(mean, spread)]
        both = [f"{cells[x]} / {cells[x + len(targets)]}" for x in range(len(targets))]
        report[name or folders] = {"seeds": len(values), "values": np.array(values).tolist()}
        print(f"| {name or folders} | " + " | ".join(both) + f" | {cells[-1]} |", flush=True)
    report["columns"] = [f"{target} {how}" for how in ("mean", "max") for target in targets] + ["recall@10"]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=2))
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judge", required=True, help="Folder that recipes/reward.py wrote.")
    parser.add_argument("--data", required=True, help="Data folder of the policies.")
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--users", type=int, help="Only the first test rows, as recipes' --test_users.")
    parser.add_argument("--output", type=Path, default=Path("outputs/table1.json"))
    torch.set_num_threads(1)
    main(**vars(parser.parse_args()))
