"""Recommends items for every row of a data set of histories, and writes parquet.

    onerec recommend --repo org/onerec-1b --dataset histories.parquet --output outputs/recommended --k 20

Each row's `history` holds item ids, oldest first. Several processes share the rows, each row is served once; process r
writes `part-<r>-of-<processes>.parquet` with the columns of the data set, `item_ids` and `scores`.
"""

from dataclasses import dataclass, field
from pathlib import Path

import datasets

from ..data import arrow_dataset, read_table
from ..recommender import Recommender
from ..rewards import RewardModel
from .checks import check_columns
from .parser import ScriptParser


@dataclass
class RecommendArguments:
    repo: str = field(metadata={"help": "Folder or Hub repository of a trained model."})
    dataset: str = field(
        metadata={"help": "parquet or JSONL file, folder of parquet or of datasets.save_to_disk, or Hub data set."}
    )
    output: str = field(metadata={"help": "Folder to write."})
    column: str = "history"
    split: str = field(default="train", metadata={"help": "Of a Hub data set or a saved DatasetDict."})
    k: int = 10
    num_beams: int = 50
    session: bool = field(
        default=False, metadata={"help": "Whole sessions of a OneRec model, k per row, in place of single items."}
    )
    reward: str | None = field(
        default=None, metadata={"help": "Reward model, folder or Hub: the best of the candidates by its judgement."}
    )
    num_candidates: int | None = field(
        default=None, metadata={"help": "Items, or sessions, that --reward judges for each row; default all it finds."}
    )
    rerank: bool = field(default=True, metadata={"help": "Whether the repository's re-ranker orders the items."})
    exclude_seen: bool = False
    unknown_items: str = field(default="error", metadata={"help": "error, or ignore: drop unknown ids of a history."})
    batch_size: int = 256
    overwrite: bool = field(default=False, metadata={"help": "Replace the parts of an earlier run in the folder."})
    device: str | None = None


def load(args: RecommendArguments) -> datasets.Dataset:
    """The rows, of any kind of source."""
    return arrow_dataset(read_table(args.dataset, args.split))


def main(args: RecommendArguments) -> Path:
    """Runs the recipe; returns the file that this process wrote."""
    rows = load(args)
    check_columns(f"--dataset {args.dataset}", rows.column_names, [args.column])
    recommender = Recommender.from_pretrained(args.repo, args.num_beams, args.device)
    path = recommender.recommend_dataset(
        rows,
        args.output,
        args.k,
        column=args.column,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
        session=args.session,
        item_scorer=None if args.reward is None else RewardModel.from_pretrained(args.reward, device=args.device),
        num_candidates=args.num_candidates,
        rerank=args.rerank,
        exclude_seen=args.exclude_seen,
        unknown_items=args.unknown_items,
    )
    print(f"-> {path}")
    return path


def run(argv: list[str] | None = None) -> None:
    """`onerec recommend`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("recommend", __doc__, [RecommendArguments]).parse(argv))


if __name__ == "__main__":
    run()
