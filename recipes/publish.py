"""Writes the card of a trained model, with results and pictures, and pushes the folder to the Hub in one commit.

    python recipes/publish.py --model outputs/mymodel --data outputs/mydata --baselines outputs/cooccurrence outputs/sasrec
    python recipes/publish.py --model outputs/mymodel --data outputs/mydata --repo org/mymodel --private true

Without `--repo` it writes the card alone: look at it first. Log in once with `hf auth login`. `--create_pr true` opens a pull
request, `--revision NAME` commits to a branch. Everything is checked before the first byte goes out; checkpoints, optimizer states
and predictions stay here.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import ModelCard
from transformers import AutoConfig
from trl import TrlParser

import onerec_hf  # noqa: F401  registers the models
from onerec_hf.data import load_splits
from onerec_hf.hub import model_card, plot_recall_by_frequency, push_to_hub, repository_files


@dataclass
class PublishArguments:
    model: str = field(
        metadata={"help": "Folder that recipes/sft.py wrote: model, tokenizer, metrics.json, predictions."}
    )
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    baselines: list[str] = field(
        default_factory=list, metadata={"help": "Folders of recipes/baseline.py, shown beside the model."}
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
    license: str = "apache-2.0"
    base_model: str | None = field(default=None, metadata={"help": "Repository this model was trained on from."})
    num_beams: int = field(default=50, metadata={"help": "Width of the search that the results were measured with."})
    repo: str | None = field(default=None, metadata={"help": "Where to push, org/name; default: nowhere."})
    private: bool | None = field(default=None, metadata={"help": "Whether a new repository is private."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to."})
    create_pr: bool = False
    commit_message: str = "Upload model"


CAPTIONS = {
    "training_curve.png": "Training curve",
    "codebook_usage.png": "Use of the codes",
    "recall_by_frequency.png": "Recall by item frequency: rare items on the left",
    "prediction_entropy.png": "Entropy of the prediction, per level",
}


def draw_recall(systems: dict[str, Path], splits: datasets.DatasetDict, path: Path) -> None:
    """Recall by frequency of the target; for splits with one target per user."""
    targets = splits["test"]["targets"]
    if any(len(row) != 1 for row in targets):
        return
    targets = np.array([row[0] for row in targets])
    trained = np.concatenate(splits["train"].with_format("numpy")["history"])
    counts = np.bincount(trained, minlength=targets.max() + 1)[targets]
    predictions = {name: folder / "predictions.parquet" for name, folder in systems.items()}
    recalls = {name: datasets.Dataset.from_parquet(str(file))["recall@10"] for name, file in predictions.items()}
    plot_recall_by_frequency({name: np.asarray(values) for name, values in recalls.items()}, counts, path)


def main(args: PublishArguments) -> str:
    """Runs the recipe; returns the URL of the commit, or the path of the card."""
    folder, data = Path(args.model), Path(args.data)
    title = args.title or (args.repo or folder.name).split("/")[-1]
    systems = {title: folder, **{Path(name).name: Path(name) for name in args.baselines}}
    reports = {name: json.loads((path / "metrics.json").read_text(encoding="utf-8")) for name, path in systems.items()}
    splits = load_splits(data)
    for name in ("codebook_usage.png", "tokenizer/quantizer_config.json", "tokenizer/quantizer.safetensors"):
        if (data / name).is_file():
            shutil.copy(data / name, folder)
    draw_recall(systems, splits, folder / "recall_by_frequency.png")
    # how it was trained stands in the card that the trainer wrote
    written = ModelCard.load(folder / "README.md").text if (folder / "README.md").is_file() else ""
    training = written.partition("\n## Training\n")[2].partition("\n## ")[0].strip()
    dataset_name = args.dataset_name or data.name
    card = model_card(
        AutoConfig.from_pretrained(folder),
        title=title,
        repo=args.repo or str(folder),
        summary=args.summary,
        data=f"{dataset_name}: " + ", ".join(f"{len(rows):,} {name} rows" for name, rows in splits.items()) + ".",
        training=training or "Not recorded.",
        results={name: (report["test"], report["test_exclude_seen"]) for name, report in reports.items()},
        dataset_name=dataset_name,
        dataset=args.dataset,
        simulated=args.simulated,
        pictures=[(name, caption) for name, caption in CAPTIONS.items() if (folder / name).is_file()],
        num_parameters=reports[title].get("num_parameters"),
        num_beams=args.num_beams,
        base_model=args.base_model,
        license=args.license,
    )
    card.save(folder / "README.md")
    if args.repo is None:
        print(f"card: {folder / 'README.md'}; these files would be pushed: {', '.join(repository_files(folder))}")
        return str(folder / "README.md")
    options = {"private": args.private, "revision": args.revision, "create_pr": args.create_pr}
    commit = push_to_hub(folder, args.repo, commit_message=args.commit_message, **options)
    print(commit.pr_url or commit.commit_url)
    return commit.pr_url or commit.commit_url


if __name__ == "__main__":
    main(TrlParser(PublishArguments).parse_args_and_config()[0])
