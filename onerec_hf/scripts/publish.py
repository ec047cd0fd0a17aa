"""Writes the card of a trained model, with results and pictures, and pushes the folder to the Hub in one commit.

    onerec publish --model outputs/mymodel --data outputs/mydata --baselines outputs/cooccurrence outputs/sasrec
    onerec publish --model outputs/mymodel --data outputs/mydata --repo org/mymodel --private true

Without `--repo` it writes the card alone: look at it first. Log in once with `hf auth login`. `--create_pr true` opens
a pull request, `--revision NAME` commits to a branch. All is checked before the first byte; checkpoints and
predictions stay here.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from transformers import AutoConfig

from .. import Catalogue
from ..data import DataFolder, load_splits
from ..hub import (
    model_card,
    plot_recall_by_frequency,
    push_to_hub,
    repository_files,
    reranking_text,
    table_cell,
    training_text,
)
from ..recommender import Recommender
from .baseline import check_same_items
from .checks import check_columns, check_push, unique_names
from .parser import ScriptParser


@dataclass
class PublishArguments:
    model: str = field(
        metadata={"help": "Folder that `onerec sft` wrote: model, tokenizer, metrics.json, predictions."}
    )
    data: str = field(
        metadata={"help": "Folder that `onerec prepare` wrote, or one of `splits` alone, saved in Python."}
    )
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Folders of `onerec baseline`, shown beside the model."}
    )
    title: str | None = field(
        default=None, metadata={"help": "Of the card; default the name of the repository or folder."}
    )
    summary: str = field(default="", metadata={"help": "What the model is for, in a sentence or two."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "Of the log; default the name of the data folder."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Id of the data set on the Hub, if it is there."})
    simulated: bool = field(default=False, metadata={"help": "The log is simulated; the card says so."})
    license: str = field(default="apache-2.0", metadata={"help": "Of the weights, as the Hub writes it."})
    base_model: str | None = field(default=None, metadata={"help": "Repository this model was trained on from."})
    num_beams: int = field(default=50, metadata={"help": "Width of the search that the results were measured with."})
    repo: str | None = field(default=None, metadata={"help": "Where to push, org/name; default: nowhere."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    create_pr: bool = field(
        default=False, metadata={"help": "Open a pull request in place of a commit to the branch."}
    )
    commit_message: str = field(default="Upload model", metadata={"help": "Of the push."})


CAPTIONS = {
    "training_curve.png": "Training curve",
    "codebook_usage.png": "Use of the codes",
    "recall_by_frequency.png": "Recall by item frequency: rare items on the left",
    "prediction_entropy.png": "Entropy of the prediction, per level",
}


def load_systems(args: PublishArguments, title: str, item_ids: list) -> dict[str, tuple[Path, dict]]:
    """Folder and metrics of the model and of each baseline, by a name that each has alone; the model is the first.
    All are of the items `item_ids`.
    """
    model, baselines = Path(args.model), [Path(name) for name in args.baselines]
    places = [folder.resolve() for folder in (model, *baselines)]
    if twice := [str(folder) for i, folder in enumerate((model, *baselines)) if places[i] in places[:i]]:
        raise ValueError(f"{twice} is named twice among the model and its baselines: every system once.")
    systems = {}
    for name, folder in zip([title, *unique_names(title, baselines)], [model, *baselines]):
        path = folder / "metrics.json"
        report = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not {"test", "test_exclude_seen"} <= report.keys() or not (folder / "predictions.parquet").is_file():
            raise ValueError(
                f"{folder} has no test metrics, metrics.json and predictions.parquet. Of a model, `onerec score "
                f"--model {folder} --data {args.data}` makes them; of a baseline, `onerec baseline`."
            )
        systems[name] = folder, report
    check_same_items(dict([*systems.values()][1:]), item_ids, args.data)
    return systems


def results_of(systems: dict[str, tuple[Path, dict]]) -> dict[str, tuple[dict, dict]]:
    """The test metrics of each system, the model first; behind a re-ranked model its search alone."""
    results = {}
    for name, (_, report) in systems.items():
        results[name] = report["test"], report["test_exclude_seen"]
        if alone := report.get("search_alone"):
            results[f"{name}, search alone"] = alone["test"], alone["test_exclude_seen"]
    return results


def read_recalls(systems: dict[str, tuple[Path, dict]], users: list[int], data: str) -> dict[str, np.ndarray]:
    """recall@10 of every test user, by system; of the same users."""
    tables = {n: datasets.Dataset.from_parquet(str(f / "predictions.parquet")) for n, (f, _) in systems.items()}
    size = len(next(iter(tables.values())))
    for name, table in tables.items():
        check_columns(f"{systems[name][0]}/predictions.parquet", table.column_names, ["recall@10"])
        own = table["user"][:] if "user" in table.column_names else users[: len(table)]
        if len(table) != size or own != users[:size]:
            raise ValueError(
                f"{systems[name][0]} was scored on {len(table)} users of another test split, or on another number of "
                f"them ({size}) than the model: numbers of other users than those of {data} do not belong in one "
                "table. Score it again."
            )
    return {name: np.asarray(table["recall@10"]) for name, table in tables.items()}


def draw_recall(recalls: dict[str, np.ndarray], splits: datasets.DatasetDict, path: Path) -> None:
    """Recall by frequency of the target; for splits with one target per user."""
    path.unlink(missing_ok=True)  # of another run
    targets = splits["test"]["targets"][: len(next(iter(recalls.values())))]
    if any(len(row) != 1 for row in targets):
        return
    targets = np.array([row[0] for row in targets])
    trained = np.concatenate(splits["train"].with_format("numpy")["history"])
    counts = np.bincount(trained, minlength=targets.max() + 1)[targets]
    plot_recall_by_frequency(recalls, counts, path)


def open_data(args: PublishArguments) -> tuple[datasets.DatasetDict, list, DataFolder | None]:
    """
    The splits, the item ids, and the folder of `onerec prepare`. The last is None for a folder of splits alone,
    as `leave_last_out(...).save_to_disk` makes one: nothing in it tells items by name or makes codes of new ones.
    """
    folder, catalogue = Path(args.data), Catalogue.from_pretrained(args.model)
    if folder.is_dir() and [path.name for path in folder.iterdir()] == ["splits"]:
        print(f"{folder} has no codebooks: without them no new item can be added to what is published.")
        splits = load_splits(folder)
        known = 1 + max(max(row) for name in ("history", "targets") for row in splits["test"][name] if row)
        if known > len(catalogue):
            raise ValueError(f"{folder} has at least {known} items, {args.model} knows {len(catalogue)}: another log.")
        return splits, catalogue.item_ids.tolist(), None
    data = DataFolder(folder)
    data.check_model(args.model, catalogue)
    return data.splits, data.items["item_id"][:], data


def main(args: PublishArguments) -> str:
    """Runs the recipe; returns the URL of the commit, or the path of the card."""
    folder = Path(args.model)
    if args.repo:
        check_push(args.repo)
    title = args.title or (args.repo or folder.absolute().name).split("/")[-1]
    splits, item_ids, data = open_data(args)
    systems = load_systems(args, title, item_ids)
    recalls = read_recalls(systems, splits["test"]["user"][:], args.data)
    if data is not None:
        data.quantizer.save_pretrained(folder)
        if (data.path / "codebook_usage.png").is_file():
            shutil.copy(data.path / "codebook_usage.png", folder)
    draw_recall(recalls, splits, folder / "recall_by_frequency.png")
    # how it was trained stands in the card that the trainer wrote
    training = training_text(folder)
    dataset_name = args.dataset_name or Path(args.data).absolute().name
    card = model_card(
        AutoConfig.from_pretrained(folder),
        title=title,
        repo=args.repo or str(folder),
        summary=args.summary,
        data=f"{table_cell(dataset_name)}: "
        + ", ".join(f"{len(rows):,} {name} rows" for name, rows in splits.items())
        + ".",
        training=(training or "Not recorded.") + reranking_text(systems[title][1]),
        results=results_of(systems),
        dataset_name=dataset_name,
        dataset=args.dataset,
        simulated=args.simulated,
        pictures=[(name, caption) for name, caption in CAPTIONS.items() if (folder / name).is_file()],
        num_parameters=systems[title][1].get("num_parameters"),
        num_beams=args.num_beams,
        base_model=args.base_model,
        license=args.license,
    )
    card.save(folder / "README.md")
    if args.repo is None:
        print(f"card: {folder / 'README.md'}; these files would be pushed: {', '.join(repository_files(folder))}")
        return str(folder / "README.md")
    Recommender.from_pretrained(folder)  # it must load from here, or it loads from nowhere
    options = {name: getattr(args, name) for name in ("private", "revision", "create_pr", "commit_message")}
    commit = push_to_hub(folder, args.repo, **options)
    print(url := commit.pr_url or commit.commit_url)
    return url


def run(argv: list[str] | None = None) -> None:
    """`onerec publish`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("publish", __doc__, [PublishArguments]).parse(argv))


if __name__ == "__main__":
    run()
