"""Trains a reward model on logged exposures and scores it on the test period: AUC, GAUC, calibration of every feedback.

    python recipes/prepare.py --config recipes/configs/kuairand_prepare.yaml --source FOLDER --output outputs/kuairand
    python recipes/reward.py --config recipes/configs/kuairand_reward.yaml --data outputs/kuairand --output_dir outputs/reward

Takes the folder that `recipes/prepare.py` writes with `--sessions` and no criteria: for the P-Score one row per exposure
(`max_events: 1`), for the session-wise reward model of OneRec, `--session_wise true`, one per request or session. Time is cut into
periods (a day in ms): an exposure is judged from the histories and the rates of feedback before its period, in validation and test
from those before the split. Built on `transformers.Trainer`: every `TrainingArguments` field works; model choice is on the
validation split. Writes the model, its tokenizer, `arguments.json` (for recipes/dpo.py and recipes/grpo.py, which judge with it),
`metrics.json` and the scores of every validation and test exposure or session.
"""

import json
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
from model_arguments import mapping
from reward_arguments import ARGUMENTS_NAME, RewardArguments, make_collator
from transformers import AutoModel, AutoTokenizer, TrainingArguments, set_seed
from trl import TrlParser

from onerec_hf import OneRecPScoreConfig, OneRecSessionRewardConfig
from onerec_hf.data import load_splits
from onerec_hf.evaluation import feedback_report
from onerec_hf.hub import push_to_hub, reward_card
from onerec_hf.trainers import ResumableTrainer


def report(args: RewardArguments, prediction, split: datasets.Dataset) -> tuple[dict, datasets.Dataset]:
    """Metrics of the towers and of the one score (`p_score`, `reward`) against every feedback; and the scores themselves."""
    logits, rewards = prediction.predictions
    users, name = np.repeat(split["user"], rewards.size // len(split)), "reward" if args.session_wise else "p_score"
    labels, towers = (x.reshape(-1, len(args.targets)) for x in (prediction.label_ids, 1 / (1 + np.exp(-logits))))
    metrics = feedback_report(labels, towers, users, args.targets)
    fused = np.repeat(rewards.reshape(-1, 1), len(args.targets), axis=1)
    fused = feedback_report(labels, fused, users, [f"{name}_{target}" for target in args.targets])
    metrics |= {key: value for key, value in fused.items() if key.endswith("auc")}
    columns = {"user": users, name: rewards.ravel()}
    for x, target in enumerate(args.targets):
        columns |= {target: labels[:, x], f"predicted_{target}": towers[:, x]}
    return metrics, datasets.Dataset.from_dict(columns)


def main(args: RewardArguments, training: TrainingArguments) -> dict:
    """Runs the recipe; returns what it writes to `metrics.json`."""
    set_seed(training.seed)
    training.remove_unused_columns, training.label_names = False, ["labels"]
    push, training.push_to_hub = training.push_to_hub, False  # once, at the end, with our card
    splits = load_splits(args.data)
    tokenizer = AutoTokenizer.from_pretrained(Path(args.data) / "tokenizer")
    collator = make_collator(args, tokenizer, splits)
    config_class = OneRecSessionRewardConfig if args.session_wise else OneRecPScoreConfig
    config = config_class(
        codebook_sizes=tokenizer.codebook_sizes,
        catalogue_fingerprint=tokenizer.catalogue.fingerprint(),
        targets=args.targets,
        context_features=collator.context_feature_sizes,
        user_features=collator.user_feature_sizes,
        item_features=collator.item_feature_sizes,
        item_numbers=collator.item_number_names,
        **mapping(args.model),
    )
    names, read = splits["train"].column_names, {"timestamp", *collator.event_features}
    unread = [name for name in names if f"target_{name}" in names and name not in read]
    splits = splits.remove_columns(unread).with_format("numpy")
    begin = collator.boundaries[args.warm_up - 1] if args.warm_up else -np.inf
    train = splits["train"].select(np.flatnonzero(np.array(splits["train"]["session_start"]) >= begin))
    trainer = ResumableTrainer(
        AutoModel.from_config(config), training, collator, train, splits["validation"], tokenizer
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    output = Path(training.output_dir)
    (output / ARGUMENTS_NAME).write_text(json.dumps(asdict(args), indent=2), encoding="utf-8")
    result = {"num_parameters": trainer.model.num_parameters(), "log": trainer.state.log_history}
    for name in ("validation", "test"):
        result[name], scores = report(args, trainer.predict(splits[name]), splits[name])
        scores.to_parquet(str(output / f"{name}_scores.parquet"))
    (output / "metrics.json").write_text(json.dumps(result, indent=2), encoding="utf-8")
    title = "Session-wise reward model" if args.session_wise else "P-Score reward model"
    card = {"title": title, "repo": str(output), "data": f"Logged exposures: {args.data}."}
    card |= {
        "training": f"`recipes/reward.py`, {training.num_train_epochs:g} epochs.",
        "dataset_name": Path(args.data).name,
    }
    reward_card(config, **card, metrics=result["test"]).save(output / "README.md")
    if push:
        push_to_hub(output, training.hub_model_id or output.name, private=training.hub_private_repo)
    return result


if __name__ == "__main__":
    metrics = main(*TrlParser((RewardArguments, TrainingArguments)).parse_args_and_config())
    print(json.dumps({name: metrics[name] for name in ("num_parameters", "validation", "test")}, indent=2))
