"""Aligns a trained OneRec model with a reward by Iterative Preference Alignment (OneRec, Algorithm 2).

    accelerate launch recipes/dpo.py --config recipes/configs/small_dpo.yaml --data outputs/mydata --policy outputs/mymodel \
        --reward outputs/reward --output_dir outputs/aligned

`--policy` is a folder that recipes/sft.py wrote, or a repository of the Hub; `--reward` a folder that recipes/reward.py wrote, from
the same log. Without a reward model, `--pairs FOLDER` takes a saved `datasets` set of `row`, `chosen`, `rejected` (plain DPO; as
another run's `pairs/iteration_000`). One epoch is one iteration. `--loss_type`, `--dpo_ratio`, `--beta` and all `TrainingArguments`
work on the command line and in the YAML file; `--lora_r 8` trains an adapter and writes the merged model. Writes the model folder,
`metrics.json` and predictions of the test split, and the pairs.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from model_arguments import load_policy, training_rows
from peft import LoraConfig
from reward_arguments import reward_function
from sft import score
from transformers import AutoTokenizer, set_seed
from trl import TrlParser

from onerec_hf.data import load_splits
from onerec_hf.evaluation import evaluate
from onerec_hf.trainers import IPAConfig, IPATrainer, load_pairs


@dataclass
class DPOArguments:
    policy: str = field(metadata={"help": "Folder of the model to align, with its tokenizer."})
    data: str = field(metadata={"help": "Folder that recipes/prepare.py wrote."})
    reward: str | None = field(default=None, metadata={"help": "Folder of the reward model, with its tokenizer."})
    reward_data: str | None = field(default=None, metadata={"help": "Its data folder, where that has moved."})
    pairs: str | None = field(default=None, metadata={"help": "Saved pairs instead of a reward model."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default trains all weights."})
    num_beams: int = 50
    eval_users: int | None = field(
        default=None, metadata={"help": "Validation users that are generated for; default all."}
    )
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})


def main(args: DPOArguments, training: IPAConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    set_seed(training.seed)
    splits = load_splits(args.data)
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    recommender = load_policy(args.policy, args.data, args.num_beams)
    model, ranker = recommender.model, recommender.ranker
    train = training_rows(splits["train"], model.config, ranker.collator.max_history)
    validation = splits["validation"]
    sample = validation.shuffle(seed=0).select(range(min(args.eval_users or len(validation), len(validation))))

    def generation_metrics(model) -> dict[str, float]:
        return evaluate(ranker, sample, num_items=model.catalogue.num_items, ks=(10,), progress=False).metrics

    reward = None
    if args.reward:
        reward = reward_function(args.reward, args.reward_data, model, args.data, training.num_candidates)
    trainer = IPATrainer(
        model,
        training,
        data_collator=ranker.collator,
        train_dataset=train.with_format("numpy"),
        eval_dataset=validation.with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics,
        reward=reward,
        pairs=load_pairs(args.pairs, len(train), model.catalogue) if args.pairs else None,
        peft_config=LoraConfig(r=args.lora_r, task_type="CAUSAL_LM") if args.lora_r else None,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report = {"train_seconds": time.perf_counter() - start}
    output = Path(training.output_dir)
    if args.lora_r:  # what is saved and pushed is the whole model
        ranker.model = trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    if trainer.is_world_process_zero():
        recommender.save_beside(output)
        trainer.create_model_card()
    trainer.save_model()  # with --push_to_hub true it goes up now, in one commit
    if trainer.is_world_process_zero():
        report["num_parameters"] = ranker.model.num_parameters()
        test = splits["test"].select(range(min(args.test_users or len(splits["test"]), len(splits["test"]))))
        report |= score(ranker, test, output, training.seed)
        report["log"] = trainer.state.log_history
        (output / "metrics.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
        print(json.dumps({name: report[name] for name in ("train_seconds", "test", "test_exclude_seen")}, indent=2))
    return report


if __name__ == "__main__":
    main(*TrlParser((DPOArguments, IPAConfig)).parse_args_and_config())
