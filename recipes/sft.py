"""Trains a OneRec model on a prepared folder and scores it on the test split.

    accelerate launch recipes/sft.py --config recipes/configs/small_sft.yaml --data outputs/beauty --output_dir outputs/beauty_v2

`--model '{"model_type": "onerec_v2", ...}'` names the system: `onerec` (sessions), `onerec_v1` (pathways) or `onerec_v2`; presets
lie in recipes/configs/models (`--model_config FILE`). Built on TRL's `SFTTrainer`: every field of `OneRecSFTConfig` works on the
command line and in the YAML file (`--report_to`, `--resume_from_checkpoint`, `--bf16`, `--seed`, ...). Model choice is on the
validation split. Writes the model, tokenizer and catalogue (one folder that `AutoModel.from_pretrained` loads), `metrics.json` and
the predictions of every test user.
"""

import time
from pathlib import Path

from checks import check_beams, check_training, rehearse
from ending import VALIDATION_METRICS, finish, generation_metrics, serve
from model_arguments import ITEM_VECTORS, ModelArguments, item_vectors, make_collator, make_config, training_rows
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from onerec_hf.data import load_splits
from onerec_hf.recommender import ItemRanker
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer


def check(args: ModelArguments, training: OneRecSFTConfig) -> tuple:
    """All that can be said of the arguments before there is a model; returns splits, tokenizer, collator and config."""
    check_training(training, VALIDATION_METRICS)
    check_beams(args.num_beams)
    splits = load_splits(args.data)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer)
    return splits, tokenizer, collator, make_config(args, tokenizer, collator)


def main(args: ModelArguments, training: OneRecSFTConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    splits, tokenizer, collator, config = check(args, training)
    set_seed(training.seed)
    model = AutoModelForCausalLM.from_config(config)
    model.catalogue = tokenizer.catalogue
    if args.item_vectors:
        model.model.context_processor.embed_features.fill(ITEM_VECTORS, item_vectors(args))
    recommender = serve(ItemRanker(model, collator, args.num_beams), args.data, args.metadata)
    train = training_rows(splits["train"], config, args.max_history).with_format("numpy")
    trainer = OneRecSFTTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=splits["validation"].with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics(recommender.ranker, splits["validation"], args.eval_users),
    )
    rehearse(recommender, train, splits)
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report = {"train_seconds": time.perf_counter() - start, "best_metric": trainer.state.best_metric}
    return finish(trainer, recommender, args.data, splits["test"], report)


if __name__ == "__main__":
    main(*TrlParser((ModelArguments, OneRecSFTConfig)).parse_args_and_config())
