"""What the trainer of `onerec loop` does with a day: `onerec prepare` and `onerec sft`, then what the policy says."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments

from ..data import DataFolder
from ..recommender import Recommender
from ..rewards import is_legal
from ..simulator.population import DAY_MS
from ..trainers import IPAConfig, OneRecGRPOConfig, OneRecSFTConfig
from . import dpo, grpo, prepare, reward, sft
from .continued import continued
from .loop_state import Loop, write_json
from .model_arguments import mapping
from .reward_arguments import RewardArguments

COLUMNS = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
FEEDBACK = ["play_time_ms", "duration_ms", "is_click", "long_view", "is_like", "is_hate"]
MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"context_embed_dim": 32, "context_key_value_split": 2, "dropout": 0.2}
# one row per impression, none left out: what a reward model learns from
EXPOSURES = {"max_gap": 0, "max_events": 1, "min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0}
QUIET: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 10}
REWARD: dict[str, Any] = {"targets": ["ctr", "long_view", "ltr"], "event_features": {"play_time_ms": ["log", 24]}}
REWARD |= {"item_categories": ["category", "author_id"], "item_quantiles": ["duration_ms"], "rates": ["item", "user"]}
REWARD |= {"request_features": {"timestamp": ["hour", 25]}, "context_item_features": ["category"]}
REWARD |= {"model": {"hidden_size": 64, "context_embed_dim": 8, "dropout": 0.3}, "period": DAY_MS}
LEGALITY_USERS, LEGALITY_SAMPLES = 64, 16


def train_day(loop: Loop, day: int, work: Path) -> Path:
    """The model after a day, in a folder of `work`; `day.json` in it says what it was trained on."""
    begin = time.perf_counter()
    args, data = loop.args, work / "data"
    prepare_day(loop, day, data)
    trained, before = work / "sft", loop.place("trained", day - 1)
    report: dict[str, Any] = {"day": day, "trained_until": loop.cut(day), "policy": args.policy}
    if day == 0:
        training: dict[str, Any] = {"num_train_epochs": args.first_epochs, "learning_rate": 3e-3, "warmup_steps": 50}
        training |= {"lr_scheduler_type": "cosine"}
        arguments = sft.ModelArguments(str(data), model=MODEL | mapping(args.model), metadata=["title"])  # type: ignore
        report |= run_sft(args.seed, arguments, trained, **training)
    elif args.policy == "frozen":
        recommender = continued(sft.ModelArguments(str(data), continue_from=str(before)), DataFolder(data))
        recommender.save_pretrained(trained)
        report["trained_until"] = loop.cut(0)
    else:
        training = {"num_train_epochs": args.epochs, "learning_rate": args.learning_rate, "warmup_steps": 5}
        training |= {"lr_scheduler_type": "constant_with_warmup"}
        start = float(loop.cut(day - 1))
        arguments = sft.ModelArguments(str(data), continue_from=str(before), start=start)
        report |= run_sft(args.seed + day, arguments, trained, **training)
        if args.policy == "gbpo":
            trained = gbpo(loop, data, trained, work / "gbpo", start, day)
        if args.policy == "ipa" and day % args.align_every == 0:
            trained = ipa(loop, data, trained, work, day)
    report |= {"legality": sampled_legality(trained, data), "seconds": time.perf_counter() - begin}
    for name in ("README.md", "metrics.json"):  # beside `day.json` they would say less
        (trained / name).unlink(missing_ok=True)
    write_json(trained / "day.json", report)
    return trained


def prepare_day(loop: Loop, day: int, output: Path, **settings: Any) -> None:
    """`onerec prepare` of everything until the end of a day, with the videos of the next morning."""
    output.mkdir(parents=True)
    videos = loop.videos(day + 1)
    videos.to_parquet(output / "videos.parquet")
    np.save(output / "content.npy", loop.world.content_embeddings[videos.video_id])
    if day == 0:
        settings |= {"codebook_size": loop.args.codebook_size}
    else:
        settings |= {"semantic_ids_from": str(loop.place("trained", day - 1))}
    prepare.main(
        prepare.PrepareArguments(
            source=loop.log_pattern,
            output=str(output),
            columns=COLUMNS,  # type: ignore[arg-type]  # a mapping, as in a YAML file; so below
            feedback=FEEDBACK,
            items=str(output / "videos.parquet"),
            embeddings=str(output / "content.npy"),
            collaborative_dim=0,
            watched={"long_view": 1},  # type: ignore[arg-type]
            validation_start=loop.cut(day),
            test_start=(loop.cut(day) + loop.end_of(day)) / 2,
            seed=loop.args.seed,
            **settings,
        )
    )


def run_sft(seed: int, arguments: sft.ModelArguments, output: Path, **training: Any) -> dict:
    """`onerec sft`; what of its report goes into `day.json`."""
    settings = QUIET | {"per_device_train_batch_size": 64, "weight_decay": 0.1, "seed": seed} | training
    found = sft.main(arguments, OneRecSFTConfig(output_dir=str(output), **settings))
    kept = {name: found[name] for name in ("drift", "train_seconds") if name in found}
    return kept | {"held_out": {name: found["test"][name] for name in ("num_users", "recall@10", "ndcg@10")}}


def gbpo(loop: Loop, data: Path, policy: Path, output: Path, start: float, day: int) -> Path:
    """`onerec grpo` on the impressions of the new day; with what probability they were shown, no log says."""
    args = loop.args
    arguments = grpo.RLArguments(
        str(policy),
        str(data),
        exposures=loop.log_pattern,
        columns=COLUMNS,  # type: ignore[arg-type]
        start=start,
        end=float(loop.cut(day)),
        score=False,
        num_beams=args.num_beams,
    )
    settings: dict[str, Any] = {"learning_rate": args.learning_rate / 3, "max_steps": args.align_steps}
    settings |= {
        "seed": args.seed + day,
        "loss_type": "gbpo",
        "logged_weight": 1.0,
        "sft_weight": 1.0,
        "logged_batch_size": 64,
    }
    settings |= {"sft_batch_size": 64, "lr_scheduler_type": "constant", "sign_norm_steps": 0}
    grpo.main(arguments, OneRecGRPOConfig(output_dir=str(output), **QUIET | settings))
    return output


def ipa(loop: Loop, data: Path, policy: Path, work: Path, day: int) -> Path:
    """`onerec reward` on every impression until now, and `onerec dpo` with the pairs that it mines."""
    args, exposures, judge = loop.args, work / "exposures", work / "reward"
    prepare_day(loop, day, exposures, sessions=EXPOSURES | {"interactions": {}, "cut": "first"})
    settings: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 512, "learning_rate": 1e-3}
    settings |= {"weight_decay": 0.01, "per_device_eval_batch_size": 1024, "seed": args.seed + day}
    training = TrainingArguments(str(judge), **QUIET | settings)
    reward.main(RewardArguments(str(exposures), **REWARD), training)
    arguments = dpo.DPOArguments(str(policy), str(data), reward=str(judge), score=False, num_beams=args.num_beams)
    settings = {"max_steps": args.align_steps, "learning_rate": args.learning_rate / 3, "seed": args.seed + day}
    settings |= {"per_device_train_batch_size": 64, "lr_scheduler_type": "constant"}
    settings |= {"dpo_ratio": 1.0, "preference_weight": 1.0, "num_candidates": 64}
    dpo.main(arguments, IPAConfig(output_dir=str(work / "ipa"), **QUIET | settings))
    shutil.rmtree(work / "ipa" / "pairs", ignore_errors=True)  # indices of users, for this run alone
    return work / "ipa"


def sampled_legality(folder: Path, data: Path) -> float:
    """Share of samples without the constraint that are items, as the papers report it; what is served always is."""
    recommender = Recommender.from_pretrained(folder)
    model, rows = recommender.model, DataFolder(data).splits["validation"]
    context = recommender.ranker.collator.context([rows[i] for i in range(min(LEGALITY_USERS, len(rows)))])
    torch.manual_seed(0)
    tokens = model.generate(
        **context, constrained=False, do_sample=True, top_k=0, num_return_sequences=LEGALITY_SAMPLES
    )
    return is_legal(tokens[:, 1:].tolist(), model.catalogue).float().mean().item()
