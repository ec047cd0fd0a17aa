"""Trains a OneRec model on a prepared folder and scores it on the test split.

    onerec sft --config small_sft.yaml --data outputs/beauty --output_dir outputs/beauty_v2

`--model '{"model_type": "onerec_v2", ...}'` names the system: `onerec` (sessions), `onerec_v1` (pathways) or
`onerec_v2`; `--model_config models/onerec_v2_1b.yaml` is a size of the papers. Every `TrainingArguments` field works
on the command line and in the YAML file (`--report_to`, `--resume_from_checkpoint`, `--bf16`, `--seed`, ...). Model
choice is on the validation split. Writes the model, tokenizer and catalogue (one folder that
`AutoModel.from_pretrained` loads), `metrics.json` and the predictions of every test user.
"""

from transformers import AutoModelForCausalLM, set_seed

from ..data import DataFolder, load_splits
from ..recommender import ItemRanker
from ..trainers import OneRecSFTConfig, OneRecSFTTrainer
from .checks import check_beams, check_training, train_checked
from .ending import VALIDATION_METRICS, finish_policy, generation_metrics, make_recommender
from .model_arguments import (
    ITEM_VECTORS,
    ModelArguments,
    check_newest_impressions,
    item_vectors,
    make_collator,
    make_config,
    streamed_rows,
    training_rows,
)
from .parser import ScriptParser


def check(args: ModelArguments, training: OneRecSFTConfig) -> tuple:
    """All that can be said of the arguments before there is a model; returns data folder, collator and config."""
    check_training(training, VALIDATION_METRICS if args.score else ())
    check_beams(args.num_beams)
    data = DataFolder(args.data)
    collator = make_collator(args, data)
    config = make_config(args, data, collator)
    check_newest_impressions(args, training, config.model_type)
    return data, collator, config


def main(args: ModelArguments, training: OneRecSFTConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    data, collator, config = check(args, training)
    tokenizer = data.tokenizer
    if args.streaming:
        splits = load_splits(args.data, ["validation", "test"])
        train, sample = streamed_rows(args, config, training)
    else:
        splits = data.splits
        train = training_rows(splits["train"], config, args.max_history, args.newest_impressions).with_format("numpy")
        sample = train
    set_seed(training.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.catalogue = tokenizer.catalogue
    if args.item_vectors:
        model.model.context_processor.embed_features.fill(ITEM_VECTORS, item_vectors(data))
    recommender = make_recommender(ItemRanker(model, collator, args.num_beams), data, args.metadata)
    trainer = OneRecSFTTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=splits["validation"].with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics(recommender.ranker, splits["validation"], args.eval_users)
        if args.score
        else None,
    )
    report = train_checked(trainer, recommender, sample, splits, args.score) | {
        "best_metric": trainer.state.best_metric
    }
    return finish_policy(trainer, recommender, data, splits["test"] if args.score else None, report)


def run(argv: list[str] | None = None) -> None:
    """`onerec sft`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("sft", __doc__, [ModelArguments, OneRecSFTConfig]).parse(argv))


if __name__ == "__main__":
    run()
