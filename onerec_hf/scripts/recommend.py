"""Recommends items for every row of a data set of histories, and writes parquet.

    onerec recommend --repo org/onerec-1b --dataset histories.parquet --output outputs/recommended --k 20

Each row's `history` holds item ids, oldest first. Several processes share the rows, each row is served once; process r
writes `part-<r>-of-<processes>.parquet` with the columns of the data set, `item_ids` and `scores`.

    onerec recommend --repo org/onerec-1b --dataset shards --output outputs/recommended --by_file true

For a folder of many parquet files: each becomes a file of the same name in the output, whole or not at all. Files that
are there are left out, so the same command goes on where a run was stopped, also with another number of processes.
`--ray_actors 4` hands the files to four actors of Ray Data, on a cluster where there is one (needs `onerec_hf[ray]`).
"""

import importlib.util
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets

from ..data import arrow_dataset, read_table
from ..models.item_ids import is_text
from ..recommendation_files import check_rows, read_rows, recommend_rows, write_part
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
    column: str = field(
        default="history", metadata={"help": "Column of the histories, lists of item ids, oldest first."}
    )
    split: str = field(default="train", metadata={"help": "Of a Hub data set or a saved DatasetDict."})
    k: int = field(default=10, metadata={"help": "Items of a row."})
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
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
    exclude_seen: bool = field(default=False, metadata={"help": "Leave out the items of the history."})
    unknown_items: str = field(default="error", metadata={"help": "error, or ignore: drop unknown ids of a history."})
    batch_size: int = field(default=256, metadata={"help": "Rows that are searched together."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the parts of an earlier run in the folder."})
    by_file: bool = field(
        default=False, metadata={"help": "Of a folder of parquet files: a file for each of them; resumes."}
    )
    device: str | None = field(default=None, metadata={"help": "cuda, cuda:1, cpu; default the processor."})
    ray_actors: int | None = field(
        default=None, metadata={"help": "With --by_file: processes that Ray Data hands the files to."}
    )
    actor_gpus: float = field(default=0.0, metadata={"help": "GPUs, or a share of one, of each of --ray_actors."})


def load(args: RecommendArguments) -> datasets.Dataset:
    """The rows, of any kind of source."""
    return arrow_dataset(read_table(args.dataset, args.split))


RUN_NAME = "run.json"
HOW = ("batch_size", "device", "overwrite", "ray_actors", "actor_gpus")  # what changes no result


def shards(args: RecommendArguments, recommender: Recommender) -> list[tuple[Path, Path]]:
    """
    The parquet files that are still to be done, and where each is written.

    Raises:
        ValueError: For a folder without parquet files, and for an output that other arguments, or another catalogue,
            have begun.
    """
    source, output = Path(args.dataset), Path(args.output)
    files = sorted(source.rglob("*.parquet")) if source.is_dir() else []
    if not files:
        raise ValueError(f"--dataset {source} with --by_file: a folder of parquet files is needed.")
    settings = {name: value for name, value in asdict(args).items() if name not in HOW}
    settings["catalogue"] = recommender.model.catalogue.fingerprint()
    output.mkdir(parents=True, exist_ok=True)
    try:
        with open(output / RUN_NAME, "x", encoding="utf-8") as file:  # the first process makes it
            json.dump(settings, file, indent=2)
    except FileExistsError:
        check_same_run(output, settings)
    places = ((file, output / file.relative_to(source)) for file in files)
    return [(file, place) for file, place in places if not place.is_file()]


def check_same_run(output: Path, settings: dict) -> None:
    """Refuses to go on with a run of other settings: its files would be of two kinds."""
    for _ in range(50):  # another process may be writing it
        text = (output / RUN_NAME).read_text(encoding="utf-8")
        if text.endswith("}"):
            break
        time.sleep(0.1)
    before = json.loads(text)
    if other := [name for name in settings if settings[name] != before.get(name)]:
        raise ValueError(
            f"{output} was begun with {other[0]}={before.get(other[0])!r}, this is {settings[other[0]]!r}: go on with "
            "the same arguments, or choose another folder."
        )


class FileRecommender:
    """A loaded model that does file after file; an actor of Ray Data is one."""

    def __init__(self, args: RecommendArguments):
        self.args = args
        self.recommender = Recommender.from_pretrained(args.repo, args.num_beams, args.device)
        reward = None if args.reward is None else RewardModel.from_pretrained(args.reward, device=args.device)
        self.options = {"session": args.session, "item_scorer": reward, "num_candidates": args.num_candidates}
        self.options |= {"rerank": args.rerank, "exclude_seen": args.exclude_seen, "unknown_items": args.unknown_items}

    def __call__(self, places: dict[str, str]) -> dict[str, str]:
        """Reads `places["file"]`, writes `places["place"]`: whole, or not at all."""
        args, place = self.args, Path(places["place"])
        rows = read_rows(Path(places["file"]))
        check_rows(rows, args.column)
        found = recommend_rows(self.recommender, rows, args.k, args.column, args.batch_size, **self.options)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_part(place, rows, *found, is_text(self.recommender.model.catalogue.item_ids), args.session)
        return places


def main_by_file(args: RecommendArguments) -> list[Path]:
    """Recommends for the files that are this process's turn; returns what it wrote."""
    own = FileRecommender(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    every = sorted(Path(args.dataset).rglob("*.parquet"))  # whose turn it is does not depend on what is done already
    turn, left = set(every[rank::world]), shards(args, own.recommender)
    todo = [{"file": str(file), "place": str(place)} for file, place in left if file in turn]
    written = [own(places) for places in todo] if args.ray_actors is None else on_ray(args, todo)
    print(f"-> {args.output}: {len(written)} files by process {rank}")
    return [Path(places["place"]) for places in written]


def on_ray(args: RecommendArguments, todo: list[dict[str, str]]) -> list[dict[str, str]]:
    """The files by actors of Ray Data, which does again what a dead actor had begun."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--ray_actors needs Ray: pip install 'onerec_hf[ray]'")
    if not todo:
        return []
    import ray.data

    models = {name: value for name, value in (("repo", args.repo), ("reward", args.reward)) if value is not None}
    here: dict[str, Any] = {name: os.path.abspath(v) for name, v in models.items() if os.path.isdir(v)}
    files = [{name: str(Path(path).absolute()) for name, path in places.items()} for places in todo]
    rows: Any = ray.data.from_items(files, override_num_blocks=len(files))  # Ray's types know no class of actors
    actors = rows.map(
        FileRecommender,
        fn_constructor_args=(replace(args, **here),),  # an actor runs in another folder
        compute=ray.data.ActorPoolStrategy(size=args.ray_actors),
        num_cpus=1,
        num_gpus=args.actor_gpus,
    )
    return actors.take_all()


def main(args: RecommendArguments) -> Path:
    """Runs the recipe; returns the file that this process wrote, or the folder of them."""
    if args.by_file:
        main_by_file(args)
        return Path(args.output)
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
