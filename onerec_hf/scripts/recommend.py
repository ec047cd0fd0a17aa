"""Recommends items for every row of a data set of histories, and writes parquet.

    onerec recommend --repo org/onerec-1b --dataset histories.parquet --output outputs/recommended --k 20

Each row's `history` holds item ids, oldest first. Event columns and user features that the model was trained with are
read from columns of the same names; what is absent is unknown, which a warning says. Several processes share the rows,
each row is served once; process r writes `part-<r>-of-<processes>.parquet` with the columns of the data set,
`item_ids` and `scores`.

    onerec recommend --repo org/onerec-1b --dataset shards --output outputs/recommended --by_file true

For a folder of many parquet files: each becomes a file of the same name in the output, whole or not at all. Files that
are there are left out, so the same command goes on where a run was stopped, also with another number of processes.
Where the model or a file that is done has changed since, it refuses; `--overwrite true` makes all files anew. Beside
each file, `.NAME.made_of.json` says what it was made of.
`--ray_actors 4` hands the files to four actors of Ray Data, on a cluster where there is one (needs `onerec_hf[ray]`).
"""

import hashlib
import importlib.util
import json
import os
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging
from transformers.utils.hub import cached_file

from ..data import arrow_dataset, read_table
from ..models.item_ids import is_text
from ..recommendation_files import check_rows, read_rows, recommend_rows, write_part
from ..recommender import Recommender
from ..rewards import RewardModel
from .checks import check_columns
from .parser import ScriptParser
from .prepare_work import changed_files, content_of, read_json, write_json

logger = logging.get_logger(__name__)


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
HOW = ("batch_size", "device", "overwrite", "ray_actors", "actor_gpus", "output")  # what changes no result
MODELS = {"model_files": "repo", "reward_files": "reward"}  # what run.json calls their files, by argument
MODEL_FILES = ("*.safetensors", "config.json", "generation_config.json", "collator*", "reranker.json", "scorers/*/*")


def model_files(repo: str | None) -> dict[str, str]:
    """What decides the recommendations of a loaded model, by file: not its card or metrics, which may come later."""
    if repo is None:
        return {}
    folder = Path(repo) if os.path.isdir(repo) else Path(str(cached_file(repo, "config.json"))).parent
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    used = sorted(file for file in files if not file.name.startswith("quantizer"))  # makes codes of new items alone
    return {file.relative_to(folder).as_posix(): content_of(file) for file in used}


def input_files(args: RecommendArguments) -> list[Path]:
    """The parquet files of the data set, in one order; a ValueError where there are none."""
    source = Path(args.dataset)
    if files := sorted(source.rglob("*.parquet")) if source.is_dir() else []:
        return files
    raise ValueError(f"--dataset {source} with --by_file: a folder of parquet files is needed.")


def begin_run(args: RecommendArguments, recommender: Recommender) -> str:
    """
    Writes run.json, or compares it with that of an earlier run; returns what tells the loaded model from others.

    Raises:
        ValueError: For an output that other arguments, another catalogue or other weights have begun.
    """
    output = Path(args.output)
    settings = {name: value for name, value in asdict(args).items() if name not in HOW}
    settings["catalogue"] = recommender.model.catalogue.fingerprint()
    settings |= {name: model_files(getattr(args, argument)) for name, argument in MODELS.items()}
    output.mkdir(parents=True, exist_ok=True)
    if args.overwrite:  # by every process, each the same
        partial = output / f"{RUN_NAME}.{os.environ.get('RANK', 0)}.partial"
        partial.write_text(json.dumps(settings, indent=2), encoding="utf-8")
        partial.replace(output / RUN_NAME)
    try:
        with open(output / RUN_NAME, "x", encoding="utf-8") as file:  # the first process makes it
            json.dump(settings, file, indent=2)
    except FileExistsError:
        check_same_run(output, settings)
    model = {name: settings[name] for name in ("catalogue", *MODELS)}
    return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()[:16]


def check_same_run(output: Path, settings: dict) -> None:
    """Refuses to go on with a run of other settings or weights: its files would be of two kinds."""
    for _ in range(50):  # another process may be writing it
        text = (output / RUN_NAME).read_text(encoding="utf-8")
        if text.endswith("}"):
            break
        time.sleep(0.1)
    before = json.loads(text)
    other = [name for name in settings if name not in MODELS and settings[name] != before.get(name)]
    if other:
        raise ValueError(
            f"{output} was begun with {other[0]}={before.get(other[0])!r}, this is {settings[other[0]]!r}: go on with "
            "the same arguments, or choose another folder."
        )
    for name, argument in MODELS.items():
        if changed := changed_files(before.get(name, settings[name]), settings[name]):
            raise ValueError(
                f"{output} was begun with another model than {argument}={settings[argument]!r} is now: {changed}. Its "
                "files are of that one. `--overwrite true` makes all of them anew; to keep them, choose another "
                "folder."
            )


def made_of(place: Path) -> Path:
    """The file that says what `place` was made of; hidden, so that whoever reads the folder does not take it for
    rows.
    """
    return place.with_name(f".{place.name}.made_of.json")


def files_to_do(args: RecommendArguments, model: str) -> list[dict[str, str]]:
    """
    The files of this process's turn that are still to be done, and where each is written.

    Raises:
        ValueError: For files that have changed since they were done.
    """
    output, files = Path(args.output), input_files(args)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    places = {file: output / file.relative_to(args.dataset) for file in files}
    if args.overwrite and rank == 0:
        remove_left_over(output, set(places.values()))
    # whose turn it is does not depend on what is done already
    turn = {file: places[file] for file in files[rank::world]}
    done = {file: place for file, place in turn.items() if place.is_file()}
    if args.overwrite:
        for place in done.values():
            place.unlink()
        done = {}
    known = {file: read_json(made_of(place)) for file, place in done.items()}
    other = [str(file) for file in done if known[file] and known[file] != {"file": content_of(file), "model": model}]
    if other:
        raise ValueError(
            f"{', '.join(other[:3])}{f' and {len(other) - 3} more' if other[3:] else ''}: changed since {output} has "
            "their recommendations, or these are of a model that was replaced. `--overwrite true` makes all files "
            "anew; remove theirs from that folder, and the same command makes them alone; or choose another folder."
        )
    if old := [file for file in done if not known[file]]:
        logger.warning(
            f"{output} has {len(old)} files of an earlier version, which did not write down what they were made of: "
            "whether model and rows are still the same cannot be checked. To be sure, add `--overwrite true`."
        )
    return [
        {"file": str(file), "place": str(place), "model": model} for file, place in turn.items() if file not in done
    ]


def remove_left_over(output: Path, places: set[Path]) -> None:
    """Of an earlier run, what no file of the data set becomes any more: the new run would not replace it."""
    for note in output.rglob(made_of(Path("*.parquet")).name):
        place = note.with_name(note.name.removeprefix(".").removesuffix(".made_of.json"))
        if place not in places:
            print(f"{place} is of a file that is not in the data set any more: removed", flush=True)
            place.unlink(missing_ok=True)
            note.unlink()


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
        args, file, place = self.args, Path(places["file"]), Path(places["place"])
        content = content_of(file)  # first: a change while it is read is found later, too
        rows = read_rows(file)
        check_rows(rows, args.column)
        found = recommend_rows(self.recommender, rows, args.k, args.column, args.batch_size, **self.options)
        place.parent.mkdir(parents=True, exist_ok=True)
        write_json(made_of(place), {"file": content, "model": places["model"]})
        write_part(place, rows, *found, is_text(self.recommender.model.catalogue.item_ids), args.session)
        return places


def main_by_file(args: RecommendArguments) -> list[Path]:
    """Recommends for the files that are this process's turn; returns what it wrote."""
    input_files(args)
    own = FileRecommender(args)
    todo = files_to_do(args, begin_run(args, own.recommender))
    written = [own(places) for places in todo] if args.ray_actors is None else on_ray(args, todo)
    print(f"-> {args.output}: {len(written)} files by process {os.environ.get('RANK', 0)}")
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
    files = [places | {name: os.path.abspath(places[name]) for name in ("file", "place")} for places in todo]
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
