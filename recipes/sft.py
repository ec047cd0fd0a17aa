"""Trains a OneRec model on a prepared folder and scores it on the test split.

    accelerate launch recipes/sft.py --config recipes/configs/small_sft.yaml --data outputs/beauty --output_dir outputs/beauty_v2

`--model '{"model_type": "onerec_v2", ...}'` names the system: `onerec` (sessions), `onerec_v1` (pathways) or `onerec_v2`; presets
lie in recipes/configs/models (`--model_config FILE`). Built on `transformers.Trainer`: every `TrainingArguments` field works on the
command line and in the YAML file (`--report_to`, `--resume_from_checkpoint`, `--bf16`, `--seed`, ...). Model choice is on the
validation split. Writes the model, tokenizer and catalogue (one folder that `AutoModel.from_pretrained` loads), `metrics.json` and
the predictions of every test user.
"""

import json
import time
from pathlib import Path

import datasets
from model_arguments import (
    ITEM_VECTORS,
    ModelArguments,
    item_vectors,
    make_collator,
    make_config,
    serve,
    training_rows,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from onerec_hf.data import load_splits
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import ItemRanker
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer


def score(recommender: ItemRanker, split: datasets.Dataset, output: Path, seed: int) -> dict:
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
    splits = load_splits(args.data)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer)
    config = make_config(args, tokenizer, collator)
    model = AutoModelForCausalLM.from_config(config)
    model.catalogue = tokenizer.catalogue
    if args.item_vectors:
        model.model.context_processor.embed_features.fill(ITEM_VECTORS, item_vectors(args))
    recommender = ItemRanker(model, collator, args.num_beams)
    validation = splits["validation"]
    sample = validation.shuffle(seed=0).select(range(min(args.eval_users or len(validation), len(validation))))

    def generation_metrics(model) -> dict[str, float]:
        return evaluate(recommender, sample, num_items=model.catalogue.num_items, ks=(10,), progress=False).metrics

    train = training_rows(splits["train"], config, args.max_history).with_format("numpy")
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
    output = Path(training.output_dir)
    if trainer.is_world_process_zero():
        serve(recommender, args).save_beside(output)
        trainer.create_model_card()
    trainer.save_model()  # with --push_to_hub true it goes up now, in one commit
    if trainer.is_world_process_zero():
        report |= score(recommender, splits["test"], output, training.seed)
        report["best_metric"], report["log"] = trainer.state.best_metric, trainer.state.log_history
        (output / "metrics.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        print(json.dumps({name: value for name, value in report.items() if name != "log"}, indent=2))
    return report


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, OneRecSFTConfig)).parse_args_and_config())
