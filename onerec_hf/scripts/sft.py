"""Trains a OneRec model on a prepared folder and scores it on the test split.

    onerec sft --config small_sft.yaml --data outputs/beauty --output_dir outputs/beauty_v2
    onerec sft --continue_from outputs/day_6 --data outputs/day_7_data --start 1704672000000 --output_dir outputs/day_7

`--model '{"model_type": "onerec_v2", ...}'` names the system: `onerec` (sessions), `onerec_v1` (pathways) or
`onerec_v2`; `--model_config models/onerec_v2_1b.yaml` is a size of the papers. Every `TrainingArguments` field works
on the command line and in the YAML file (`--report_to`, `--resume_from_checkpoint`, `--bf16`, `--seed`, ...). Model
choice is on the validation split. Writes the model, tokenizer and catalogue (one folder that
`AutoModel.from_pretrained` loads), `metrics.json` and the predictions of every test user.
"""

from functools import partial
from itertools import chain

from transformers import AutoModelForCausalLM, set_seed

from ..data import DataFolder, load_splits
from ..data.streams import column_parts
from ..recommender import ItemRanker, Recommender
from ..trainers import OneRecSFTConfig, OneRecSFTTrainer
from ..trainers.optimizer_state import KeepOptimizer
from .checks import check_beams, check_sessions, check_training, train_checked
from .continued import Drift, continued
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


def start_of(args: ModelArguments, training: OneRecSFTConfig) -> tuple[DataFolder, Recommender]:
    """The data, and what is trained on it: a new model, or that of `--continue_from`."""
    set_seed(training.seed)
    if args.continue_from:
        check_training(training, VALIDATION_METRICS if args.score else ())
        check_beams(args.num_beams)
        data = DataFolder(args.data)
        recommender = continued(args, data)
        check_newest_impressions(args, training, recommender.model.config.model_type)
        return data, recommender
    data, collator, config = check(args, training)
    model = AutoModelForCausalLM.from_config(config)
    model.catalogue = data.tokenizer.catalogue
    if args.item_vectors:
        model.model.context_processor.embed_features.fill(ITEM_VECTORS, item_vectors(data))
    return data, make_recommender(ItemRanker(model, collator, args.num_beams), data, args.metadata)


def main(args: ModelArguments, training: OneRecSFTConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    data, recommender = start_of(args, training)
    model, collator = recommender.model, recommender.ranker.collator
    if args.streaming:
        splits = load_splits(args.data, ["validation", "test"])
        train, sample = streamed_rows(args, model.config, training, collator.max_history)
    else:
        splits = data.splits
        rows = training_rows(splits["train"], model.config, collator.max_history, args.newest_impressions, args.start)
        train = sample = rows.with_format("numpy")
    scored = ("validation",) if training.eval_strategy != "no" else ()
    trained = iter(() if args.continue_from else [sample])
    if args.streaming and not args.continue_from:  # a sample does not say how long the longest session is
        trained = chain(trained, column_parts(args.data, "train", ["targets"]))
    held_out = {name: splits[name] for name in scored}
    check_sessions(model.config, {"training": sample} | held_out, trained)
    trainer = OneRecSFTTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=splits["validation"].with_format("numpy"),
        processing_class=data.tokenizer,
        generation_metrics=generation_metrics(recommender.ranker, splits["validation"], args.eval_users)
        if args.score
        else None,
    )
    if args.keep_optimizer:
        trainer.add_callback(KeepOptimizer(trainer, args.continue_from))
    drift = Drift(args, recommender, data) if args.continue_from else None
    if drift is not None and args.score:
        drift.measure("before")
    report = train_checked(trainer, recommender, sample, splits, args.score) | {
        "best_metric": trainer.state.best_metric
    }
    if drift is not None:
        report["drift"] = drift.report
    after = partial(drift.measure, "after") if drift is not None and args.score else None
    return finish_policy(trainer, recommender, data, splits["test"] if args.score else None, report, after)


def run(argv: list[str] | None = None) -> None:
    """`onerec sft`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("sft", __doc__, [ModelArguments, OneRecSFTConfig]).parse(argv))


if __name__ == "__main__":
    run()
