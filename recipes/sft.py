"""Trains OneRec-V2 on a prepared folder and scores it on the test split.

    accelerate launch recipes/sft.py --config recipes/configs/small_sft.yaml --data outputs/beauty --output_dir outputs/beauty_v2

Built on `transformers.Trainer`: every `TrainingArguments` field works on the command line and in the YAML file (`--report_to`,
`--resume_from_checkpoint`, `--bf16`, `--seed`, ...). Model choice is on the validation split. Writes the model, tokenizer and
catalogue (one folder that `AutoModel.from_pretrained` loads), `metrics.json` and the predictions of every test user.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import datasets
from transformers import AutoTokenizer, set_seed
from trl import TrlParser

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.data import EventFeature, OneRecCollator, category_codes
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import Recommender
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer


@dataclass
class ModelArguments:
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    model: str = field(default="{}", metadata={"help": "Arguments of OneRecV2Config, YAML mapping or JSON."})
    max_history: int = field(default=50, metadata={"help": "Items of context."})
    event_features: str = field(
        default="{}", metadata={"help": 'Event columns as context features, e.g. {"play_time_ms": ["log", 24]}.'}
    )
    item_features: list[str] = field(
        default_factory=list, metadata={"help": "Columns of items.parquet as context features."}
    )
    user_features: list[str] = field(default_factory=list, metadata={"help": "Columns of users.parquet."})
    max_categories: int | None = field(
        default=None, metadata={"help": "Values kept per item or user feature, the rarer ones share 0; default all."}
    )
    num_beams: int = 50
    eval_users: int | None = field(
        default=None, metadata={"help": "Validation users that are generated for; default all."}
    )


def make_collator(args: ModelArguments, tokenizer) -> OneRecCollator:
    """The collator, with the features that were asked for."""

    def categories(table: str, names: list[str]) -> dict:
        if not names:
            return {}
        rows = datasets.Dataset.from_parquet(str(Path(args.data) / table))
        if absent := [name for name in names if name not in rows.column_names]:
            raise ValueError(f"{table} has no {absent}; it has {rows.column_names}.")
        return {name: category_codes(rows[name], args.max_categories) for name in names}

    events = json.loads(args.event_features) if isinstance(args.event_features, str) else args.event_features
    return OneRecCollator(
        tokenizer.encode_semantic_ids(tokenizer.catalogue.semantic_ids),
        args.max_history,
        event_features={name: EventFeature(*feature) for name, feature in events.items()},
        item_features=categories("items.parquet", args.item_features),
        user_features=categories("users.parquet", args.user_features),
    )


def score(recommender: Recommender, split: datasets.Dataset, output: Path, seed: int) -> dict:
    """Metrics on a split, seen items kept and masked; writes each user's predictions."""
    report = {}
    for name, exclude_seen in (("predictions", False), ("predictions_exclude_seen", True)):
        result = evaluate(
            recommender, split, num_items=recommender.model.catalogue.num_items, exclude_seen=exclude_seen, seed=seed
        )
        result.save(output / f"{name}.parquet")
        report["test_exclude_seen" if exclude_seen else "test"] = result.to_dict()
    return report


def main(args: ModelArguments, training: OneRecSFTConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    set_seed(training.seed)
    splits = datasets.load_from_disk(str(Path(args.data) / "splits"))
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer)
    settings = json.loads(args.model) if isinstance(args.model, str) else args.model
    config = OneRecV2Config(
        codebook_sizes=tokenizer.codebook_sizes,
        context_features=collator.context_feature_sizes,
        user_features=collator.user_feature_sizes,
        **settings,
    )
    model = OneRecV2ForCausalLM(config)
    model.catalogue = tokenizer.catalogue
    recommender = Recommender(model, collator, args.num_beams)
    validation = splits["validation"]
    sample = validation.shuffle(seed=0).select(range(min(args.eval_users or len(validation), len(validation))))

    def generation_metrics(model) -> dict[str, float]:
        return evaluate(recommender, sample, num_items=model.catalogue.num_items, ks=(10,), progress=False).metrics

    train = splits["train"].filter(lambda length: length > 1, input_columns="length").with_format("numpy")
    trainer = OneRecSFTTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation.with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report = {"train_seconds": time.perf_counter() - start, "num_parameters": model.num_parameters()}
    trainer.save_model()
    if trainer.is_world_process_zero():
        output = Path(training.output_dir)
        report |= score(recommender, splits["test"], output, training.seed)
        report["best_metric"], report["log"] = trainer.state.best_metric, trainer.state.log_history
        (output / "metrics.json").write_text(json.dumps(report, indent=2))
        print(
            json.dumps(
                {name: report[name] for name in ("train_seconds", "num_parameters", "test", "test_exclude_seen")},
                indent=2,
            )
        )
    return report


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, OneRecSFTConfig)).parse_args_and_config())
