"""What the recipes that train do after their last step: the model is saved before anything else can fail."""

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import datasets
import torch
from transformers import Trainer

from onerec_hf.evaluation import evaluate
from onerec_hf.hub import push_to_hub
from onerec_hf.item_ranker import ItemRanker
from onerec_hf.recommender import Recommender
from onerec_hf.semantic_ids import load_quantizer

# what a run leaves beside its weights: of an earlier run in the same folder, it would be taken for the new model's
RESULTS = ("metrics.json", "predictions*.parquet", "*_scores.parquet", "README.md", "arguments.json", "items.jsonl")
RESULTS += ("quantizer*", "collator*", "model.safetensors.index.json", "training_curve.png", "codebook_usage.png")
RESULTS += ("prediction_entropy.png", "recall_by_frequency.png")

VALIDATION_METRICS = ("recall@10", "ndcg@10", "hit@10", "coverage@10", "invalid_rate")


def some(split: datasets.Dataset, users: int | None, name: str) -> datasets.Dataset:
    """The first rows of a split; all without a number."""
    if users is not None and users < 1:
        raise ValueError(f"{name}={users}: at least one user, or leave it out for all.")
    return split.select(range(min(users or len(split), len(split))))


def earlier_results(folder: Path) -> list[Path]:
    """The files of an earlier run in an output folder, without its weights and checkpoints."""
    return sorted({file for pattern in RESULTS for file in folder.glob(pattern) if file.is_file()})


def score(ranker: ItemRanker, split: datasets.Dataset, output: Path, seed: int) -> dict:
    """Metrics on a split, seen items kept and masked; writes each user's predictions."""
    report, was_training = {}, ranker.model.training
    ranker.model.eval()
    for name, exclude_seen in (("predictions", False), ("predictions_exclude_seen", True)):
        result = evaluate(
            ranker, split, num_items=ranker.model.catalogue.num_items, exclude_seen=exclude_seen, seed=seed
        )
        result.save(output / f"{name}.parquet")
        report["test_exclude_seen" if exclude_seen else "test"] = result.to_dict()
    ranker.model.train(was_training)
    return report


def serve(ranker: ItemRanker, data: str, columns: list[str]) -> Recommender:
    """The recommender that goes into the repository: with codebooks, and what it tells about an item."""
    metadata = {}
    if columns:
        rows = datasets.Dataset.from_parquet(str(Path(data) / "items.parquet"))
        if absent := [name for name in columns if name not in rows.column_names]:
            raise ValueError(f"metadata={absent}: items.parquet has no such column; it has {rows.column_names}.")
        names = dict.fromkeys(["item_id", *columns])
        metadata = {row.pop("item_id"): row for row in rows.select_columns(list(names))}
    return Recommender(ranker, metadata, load_quantizer(Path(data) / "tokenizer"))


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


def save(trainer: Trainer, beside: Callable[[Path], None]) -> None:
    """The model and what it is served with, by all processes; `beside` writes into the folder, in the first one."""
    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        for file in earlier_results(output):
            file.unlink()
    trainer.save_model(_internal_call=True)  # not pushed yet
    if trainer.is_world_process_zero():
        beside(output)
    trainer.accelerator.wait_for_everyone()


def after_saving(trainer: Trainer, steps: dict[str, Callable[[], object]], advice: str) -> None:
    """
    What the first process does with the saved model while the others wait; one step that fails does not cost the next.

    Raises:
        RuntimeError: At the end, where a step failed: what is missing, and how to get it.
    """
    group, failed = None, {}
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
            f"the model is trained, and saved complete in {trainer.args.output_dir}. What failed after that:\n{reasons}\n{advice}"
        ) from next(iter(failed.values()))


def finish(trainer: Trainer, recommender: Recommender, data: str, test: datasets.Dataset, report: dict) -> dict:
    """
    Saves the model, writes its card, scores it on the test split, pushes it; the ending of sft.py, dpo.py and grpo.py.

    Args:
        data: The data folder, for the advice where something fails.
        report: What is known of the training; becomes `metrics.json` together with the test metrics.
    """
    training, ranker = trainer.args, recommender.ranker
    output = Path(training.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):  # an adapter: what is saved and pushed is the whole model
        ranker.model = trainer.model = model.merge_and_unload()
    report |= {"num_parameters": ranker.model.num_parameters()}
    save(trainer, recommender.save_beside)

    def metrics():
        report.update(score(ranker, test, output, training.seed), log=trainer.state.log_history)
        write_metrics(output, report)

    def push():
        repo, private = training.hub_model_id or output.absolute().name, training.hub_private_repo
        options = {"revision": training.hub_revision, "token": training.hub_token}
        push_to_hub(output, repo, private=private, commit_message="End of training", **options)

    steps = {"card (README.md)": trainer.create_model_card, "test metrics (metrics.json, predictions)": metrics}
    steps |= {f"push to {training.hub_model_id or output.absolute().name}": push} if training.push_to_hub else {}
    place = f"--model {output} --data {data}"
    advice = f"`python recipes/score.py {place}` scores the model, "
    advice += f"`python recipes/publish.py {place}` writes its card and pushes it."
    after_saving(trainer, steps, advice)
    if trainer.is_world_process_zero():
        print(json.dumps({name: value for name, value in report.items() if name != "log"}, indent=2))
    return report
