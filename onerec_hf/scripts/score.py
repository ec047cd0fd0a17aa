"""Scores a saved model on the test split, as the recipes that train do at their end: for one whose scoring failed.

    onerec score --model outputs/mymodel --data outputs/mydata

Writes `predictions.parquet`, `predictions_exclude_seen.parquet` and the test metrics of `metrics.json` into the
model's folder.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..data import DataFolder
from .checks import check_beams, check_output, check_splits
from .ending import score_model, some, write_metrics
from .model_arguments import load_policy
from .parser import ScriptParser


@dataclass
class ScoreArguments:
    model: str = field(metadata={"help": "Folder that `onerec sft`, `dpo` or `grpo` wrote."})
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote, of the same log."})
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})
    seed: int = field(default=0, metadata={"help": "Of the order of equal scores."})
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, cpu; default the processor."})


def main(args: ScoreArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    output = Path(args.model)
    check_beams(args.num_beams)
    check_output(args.model, replaces=False)
    data = DataFolder(args.data)
    check_splits(data.splits)
    recommender = load_policy(args.model, data, args.num_beams, rerank=True)
    recommender.model.to(args.device)
    path = output / "metrics.json"
    report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    report["num_parameters"] = recommender.model.num_parameters()
    report |= score_model(
        recommender.ranker, some(data.splits["test"], args.test_users, "test_users"), output, args.seed
    )
    write_metrics(output, report)
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec score`; `argv`: its arguments, by default those of the command line."""
    report = main(*ScriptParser("score", __doc__, [ScoreArguments]).parse(argv))
    print(json.dumps({name: report[name] for name in ("test", "test_exclude_seen")}, indent=2))


if __name__ == "__main__":
    run()
