"""What the recipes that train do after their last step: the model is saved before anything else can fail."""

import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainingArguments

from ..data import DataFolder
from ..evaluation import evaluate
from ..hub import push_to_hub
from ..item_ranker import ItemRanker
from ..recommender import Recommender

# what a run leaves beside its weights: of an earlier run in the same folder, it would be taken for the new model's
RESULTS: tuple[str, ...] = (
    "metrics.json",
    "predictions*.parquet",
    "*_scores.parquet",
    "README.md",
    "arguments.json",
    "items.jsonl",
)
RESULTS += ("quantizer*", "collator*", "model.safetensors.index.json", "training_curve.png", "codebook_usage.png")
RESULTS += ("prediction_entropy.png", "recall_by_frequency.png", "reranker.json", "scorers/*/*")
RESULTS += ("item_values.safetensors",)

PREDICTIONS = {"test": "predictions", "test_exclude_seen": "predictions_exclude_seen"}
VALIDATION_METRICS = ("recall@10", "ndcg@10", "hit@10", "coverage@10", "invalid_rate")


def some(split: datasets.Dataset, users: int | None, name: str) -> datasets.Dataset:
    """The first rows of a split; all without a number."""
    if users is not None and users < 1:
        raise ValueError(f"{name}={users}: at least one user, or leave it out for all.")
    return split.select(range(min(users or len(split), len(split))))


def earlier_results(folder: Path) -> list[Path]:
    """The files of an earlier run in an output folder, without its weights and checkpoints."""
    return sorted({file for pattern in RESULTS for file in folder.glob(pattern) if file.is_file()})


def score(system: Any, split: datasets.Dataset, num_items: int, output: Path, seed: int) -> dict:
    """Test metrics of a model or baseline, seen items kept and masked; writes each user's predictions."""
    report = {}
    for kind, name in PREDICTIONS.items():
        exclude_seen = kind == "test_exclude_seen"
        result = evaluate(system, split, num_items=num_items, exclude_seen=exclude_seen, seed=seed)
        result.save(output / f"{name}.parquet")
        report[kind] = result.to_dict()
    return report


def score_model(ranker: ItemRanker, split: datasets.Dataset, output: Path, seed: int) -> dict:
    """[`score`] of a model, without dropout."""
    was_training = ranker.model.training
    ranker.model.eval()
    report = score(ranker, split, ranker.model.catalogue.num_items, output, seed)
    ranker.model.train(was_training)
    return report


def make_recommender(ranker: ItemRanker, data: DataFolder, columns: list[str]) -> Recommender:
    """The recommender that goes into the repository: with codebooks, and what it tells about an item."""
    metadata = {}
    if columns:
        values = data.columns("items", list(dict.fromkeys(columns)))
        rows = (dict(zip(values, row)) for row in zip(*values.values()))
        metadata = dict(zip(data.items["item_id"][:], rows))
    return Recommender(ranker, metadata, data.quantizer)


def generation_metrics(ranker: ItemRanker, validation: datasets.Dataset, users: int | None) -> Callable[..., dict]:
    """`VALIDATION_METRICS` of a model, on some users of the validation split: for the trainer's evaluations."""
    sample = some(validation.shuffle(seed=0), users, "eval_users")

    def metrics(model) -> dict[str, float]:
        return evaluate(ranker, sample, num_items=model.catalogue.num_items, ks=(10,), progress=False).metrics

    return metrics


def write_metrics(output: Path, report: dict) -> None:
    """`metrics.json`, whole or not at all."""
    partial = output / "metrics.json.partial"
    partial.write_text(json.dumps(report, indent=2), encoding="utf-8")
    partial.replace(output / "metrics.json")


def remove_earlier_results(folder: Path) -> None:
    """Once the new model is there: what an earlier one left would be taken for its results."""
    for file in earlier_results(folder):
        file.unlink()


def save(trainer: Trainer, save_beside: Callable[[Path], None]) -> None:
    """The model and what it is served with, by all processes; `save_beside` writes into the folder, in the first
    one.
    """
    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        remove_earlier_results(output)
    trainer.save_model(_internal_call=True)  # not pushed yet
    if trainer.is_world_process_zero():
        save_beside(output)
    trainer.accelerator.wait_for_everyone()


def finish(trainer: Trainer, steps: Mapping[str, Callable[[], object]], advice: str, push: bool) -> None:
    """
    What the first process does with the saved model while the others wait; one step that fails does not cost the next.

    Args:
        steps: By what each of them makes.
        advice: How to get what is missing where a step fails.
        push: Whether the folder goes to the Hub after them.

    Raises:
        RuntimeError: At the end, where a step failed: what is missing, and `advice`.
    """
    training, group, failed = trainer.args, None, {}
    if push:
        repo = training.hub_model_id or Path(training.output_dir).absolute().name
        steps = {**steps, f"push to {repo}": lambda: push_folder(training, repo)}
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # scoring may take longer than the half hour after which the training's own group gives up
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=30))
    if trainer.is_world_process_zero():
        for name, step in steps.items():
            try:
                step()
            except Exception as error:
                failed[name] = error
    if group is not None:
        torch.distributed.barrier(group)
    if failed:
        reasons = "\n".join(f"- {name}: {type(error).__name__}: {error}" for name, error in failed.items())
        raise RuntimeError(
            f"the model is trained, and saved complete in {training.output_dir}. What failed after "
            f"that:\n{reasons}\n{advice}"
        ) from next(iter(failed.values()))


def push_folder(training: TrainingArguments, repo: str) -> None:
    """The output folder of a training, in one commit."""
    push_to_hub(
        training.output_dir,
        repo,
        private=training.hub_private_repo,
        revision=training.hub_revision,
        token=training.hub_token,
        commit_message="End of training",
    )


def finish_policy(
    trainer: Trainer,
    recommender: Recommender,
    data: DataFolder,
    test: datasets.Dataset | None,
    report: dict,
    also: Callable[[], object] | None = None,
) -> dict:
    """
    Saves the model, writes its card, scores it on the test split, pushes it: the ending of `sft`, `dpo` and `grpo`.

    Args:
        data: For the advice where something fails.
        test: Rows to score the model on; None: it is not scored.
        report: What is known of the training; becomes `metrics.json` together with the test metrics.
        also: Called with the saved model, before `metrics.json` is written.
    """
    training, ranker = trainer.args, recommender.ranker
    output = Path(training.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):  # an adapter: what is saved and pushed is the whole model
        ranker.model = trainer.model = model.merge_and_unload()
    report |= {"num_parameters": ranker.model.num_parameters()}
    save(trainer, recommender.save_beside)

    def metrics() -> None:
        report.update(score_model(ranker, test, output, training.seed) if test is not None else {})
        if also is not None:
            also()
        report["log"] = trainer.state.log_history
        write_metrics(output, report)

    place = f"--model {output} --data {data.path}"
    advice = f"`onerec score {place}` scores the model, `onerec publish {place}` writes its card and pushes it."
    steps = {"card (README.md)": trainer.create_model_card, "metrics (metrics.json, predictions)": metrics}
    finish(trainer, steps, advice, training.push_to_hub)
    if trainer.is_world_process_zero():
        print(json.dumps({name: value for name, value in report.items() if name != "log"}, indent=2))
    return report
