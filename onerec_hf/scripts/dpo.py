"""Aligns a trained OneRec model with a reward by Iterative Preference Alignment (OneRec, Algorithm 2).

    onerec dpo --config small_dpo.yaml --data outputs/mydata --policy outputs/mymodel \\
        --reward outputs/reward --output_dir outputs/aligned

`--policy` is a folder that `onerec sft` wrote, or a repository of the Hub; `--reward` a folder that `onerec reward`
wrote, from the same log. Without a reward model, `--pairs TABLE` takes columns `row`, `chosen`, `rejected` of any
table (plain DPO; as another run's `pairs/iteration_000`). One epoch is one iteration. `--loss_type`, `--dpo_ratio`,
`--beta` and all `TrainingArguments` work on the command line and in the YAML file; `--lora_r 8` trains an adapter and
writes the merged model. Writes the model folder, `metrics.json` and predictions of the test split, and the pairs.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from transformers import AutoTokenizer, set_seed

from ..data import DataFolder
from ..trainers import IPAConfig, IPATrainer, load_pairs
from .checks import check_beams, check_training, train_checked
from .ending import VALIDATION_METRICS, finish_policy, generation_metrics, some
from .model_arguments import ON_DISK, load_policy, training_rows
from .parser import ScriptParser
from .reward_arguments import load_reward


@dataclass
class DPOArguments:
    policy: str = field(metadata={"help": "Folder of the model to align, with its tokenizer."})
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote."})
    reward: str | None = field(default=None, metadata={"help": "Folder of the reward model, with its tokenizer."})
    pairs: str | None = field(
        default=None, metadata={"help": "Table of pairs (row, chosen, rejected) instead of a reward model."}
    )
    streaming: bool = field(default=False, metadata={"help": ON_DISK})
    lora_r: int | None = field(default=None, metadata={"help": "Rank of a LoRA adapter; default trains all weights."})
    score: bool = field(
        default=True,
        metadata={"help": "Recommend for validation and test users and score it; false: `onerec score` later."},
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the search that scores the model."})
    eval_users: int | None = field(
        default=None, metadata={"help": "Validation users that are generated for; default all."}
    )
    test_users: int | None = field(default=None, metadata={"help": "Users of the test split to score; default all."})


def main(args: DPOArguments, training: IPAConfig) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    check_training(training, VALIDATION_METRICS if args.score else ())
    check_beams(args.num_beams)
    set_seed(training.seed)
    data = DataFolder(args.data)
    splits = data.splits_on_disk() if args.streaming else data.splits
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    recommender = load_policy(args.policy, data, args.num_beams)
    model, ranker = recommender.model, recommender.ranker
    train = training_rows(splits["train"], model.config, ranker.collator.max_history).with_format("numpy")
    test = some(splits["test"], args.test_users, "test_users")
    reward = load_reward(args.reward, data) if args.reward else None
    trainer = IPATrainer(
        model,
        training,
        data_collator=ranker.collator,
        train_dataset=train,
        eval_dataset=splits["validation"].with_format("numpy"),
        processing_class=tokenizer,
        generation_metrics=generation_metrics(ranker, splits["validation"], args.eval_users) if args.score else None,
        reward=reward,
        pairs=load_pairs(args.pairs, len(train), model.catalogue) if args.pairs else None,
        peft_config=LoraConfig(r=args.lora_r, task_type="CAUSAL_LM") if args.lora_r else None,
    )
    report = train_checked(trainer, recommender, train, splits, args.score)
    return finish_policy(trainer, recommender, data, test if args.score else None, report)


def run(argv: list[str] | None = None) -> None:
    """`onerec dpo`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("dpo", __doc__, [DPOArguments, IPAConfig]).parse(argv))


if __name__ == "__main__":
    run()
