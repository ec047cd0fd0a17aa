"""Aligns a trained OneRec model with a reward by Iterative Preference Alignment (OneRec, Algorithm 2).

    accelerate launch recipes/dpo.py --config recipes/configs/small_dpo.yaml --data outputs/mydata --policy outputs/mymodel \
        --reward outputs/reward --reward_config recipes/configs/mydata/reward.yaml --reward_data outputs/exposures \
        --output_dir outputs/aligned

`--policy` is a folder that recipes/sft.py wrote, and the feature arguments are those it was trained with; `--reward` one that
recipes/reward.py wrote, `--reward_config` the file it was run with, `--reward_data` its data folder, from the same log. Without a
reward model, `--pairs FOLDER` takes a saved `datasets` set of `row`, `chosen`, `rejected` (plain DPO; such as another run's
`pairs/iteration_000`). One epoch is one iteration. `--loss_type`, `--dpo_ratio`, `--beta` and all `TrainingArguments` work on the
command line and in the YAML file; `--lora_r 8` trains an adapter and writes the merged model. Writes the model folder,
`metrics.json` and predictions of the test split, and the pairs.
"""

import json
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import datasets
import reward
import yaml
from model_arguments import ModelArguments, make_collator, serve, training_rows
from peft import LoraConfig
from sft import score
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import TrlParser

from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import ItemRanker
from onerec_hf.rewards import reward_of_model
from onerec_hf.trainers import IPAConfig, IPATrainer


@dataclass
class DPOArguments(ModelArguments):
    policy: str = field(default="", metadata={"help": "Folder of the model to align, with its tokenizer."})
    reward: str | None = field(default=None, metadata={"help": "Folder of the reward model, with its tokenizer."})
    reward_config: str | None = field(default=None, metadata={"help": "The YAML file that reward.py was run with."})
    reward_data: str | None = field(default=None, metadata={"help": "Its data folder; default `data`."})
    pairs: str | None = field(default=None, metadata={"help": "Saved pairs instead of a reward model."})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default trains all weights."})


def make_reward(args: DPOArguments, policy, num_candidates: int):
    """The reward model as a reward function, with the collator that recipes/reward.py made for it."""
    if args.reward_config is None:
        raise ValueError(
            "--reward needs --reward_config: the YAML file with the features that reward.py was run with."
        )
    folder, names = Path(args.reward_data or args.data), {f.name for f in fields(reward.RewardArguments)}
    given = yaml.safe_load(Path(args.reward_config).read_text())
    settings = {name: value for name, value in given.items() if name in names} | {"data": str(folder)}
    users = [datasets.Dataset.from_parquet(str(Path(f) / "users.parquet"))["user_id"][:] for f in (args.data, folder)]
    if users[0] != users[1]:
        raise ValueError(
            f"{args.data} and {folder} hold other users: prepare both from one log, with the same k_core."
        )
    tokenizer = AutoTokenizer.from_pretrained(args.reward)  # with the catalogue it was trained with
    splits = datasets.load_from_disk(str(folder / "splits"))
    collator = reward.make_collator(reward.RewardArguments(**settings), tokenizer, splits)
    model = AutoModel.from_pretrained(args.reward)
    return reward_of_model(model, collator, policy, num_candidates, tokenizer.catalogue)


def main(args: DPOArguments, training: IPAConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    set_seed(training.seed)
    splits = datasets.load_from_disk(str(Path(args.data) / "splits"))
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    model = AutoModelForCausalLM.from_pretrained(args.policy)
    args.model = model.config.to_diff_dict()
    collator = make_collator(args, tokenizer)
    recommender = ItemRanker(model, collator, args.num_beams)
    validation = splits["validation"]
    sample = validation.shuffle(seed=0).select(range(min(args.eval_users or len(validation), len(validation))))

    def generation_metrics(model) -> dict[str, float]:
        return evaluate(recommender, sample, num_items=model.catalogue.num_items, ks=(10,), progress=False).metrics

    trainer = IPATrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=training_rows(splits["train"], model.config, args.max_history).with_format("numpy"),
        eval_dataset=validation.with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics,
        reward=make_reward(args, model, training.num_candidates) if args.reward else None,
        pairs=datasets.load_from_disk(args.pairs) if args.pairs else None,
        peft_config=LoraConfig(r=args.lora_r, task_type="CAUSAL_LM") if args.lora_r else None,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    report = {"train_seconds": time.perf_counter() - start}
    output = Path(training.output_dir)
    if args.lora_r:  # what is saved and pushed is the whole model
        recommender.model = trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    if trainer.is_world_process_zero():
        serve(recommender, args).save_beside(output)
        trainer.create_model_card()
    trainer.save_model()  # with --push_to_hub true it goes up now, in one commit
    if trainer.is_world_process_zero():
        report["num_parameters"] = recommender.model.num_parameters()
        report |= score(recommender, splits["test"], output, training.seed)
        report["log"] = trainer.state.log_history
        (output / "metrics.json").write_text(json.dumps(report, indent=2))
        print(json.dumps({name: report[name] for name in ("train_seconds", "test", "test_exclude_seen")}, indent=2))
    return report


if __name__ == "__main__":
    main(*TrlParser((DPOArguments, IPAConfig)).parse_args_and_config())
