"""The whole path on a laptop, offline: simulated world -> semantic IDs -> OneRec-V2 -> recommendations -> metrics ->
repository.

    onerec quickstart --output outputs/quickstart

The repository is the model re-ranked with two of the baselines (`onerec rerank`). A few minutes on 2 cores. Everything
below the world is what one's own data go through: `onerec prepare`, `baseline`, `sft` and `rerank`. The numbers belong
to a simulated world and say nothing about real users.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
from transformers.utils import logging

from ..data import DataFolder, load_splits
from ..hub import results_table
from ..recommender import Recommender
from ..simulator import ShortVideoWorld
from ..trainers import OneRecSFTConfig
from . import baseline, prepare, publish, rerank, sft
from .checks import check_output

MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"context_embed_dim": 32, "context_key_value_split": 2, "dropout": 0.2, "score_normalization": "valid"}

TRAINING: dict[str, Any] = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 256}
TRAINING |= {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": 50}
TRAINING |= {"optim": "adamw_torch_fused", "adam_beta2": 0.98, "weight_decay": 0.1}
TRAINING |= {"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1, "logging_steps": 20}
TRAINING |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_ndcg@10", "report_to": "none"}
BASELINES: dict[Any, dict[str, dict]] = {  # what their classes and their fits take
    "popularity": {},
    "cooccurrence": {},
    "sasrec": {
        "model": {"temperature": None, "post_norm": True, "intermediate_size": 256, "attention_dropout": 0.5},
        "fit": {"num_epochs": 30, "learning_rate": 2e-3, "weight_decay": 1.0, "validate_every": 3},
    },
}
SCORERS = ("cooccurrence", "sasrec")  # what the search is re-ranked with


def simulate(output: Path, num_users: int, num_items: int, seed: int) -> ShortVideoWorld:
    """Writes the log of effective views (`long_view`, what OneRec calls effectively watched), the videos and their
    embeddings.
    """
    world = ShortVideoWorld(num_users=num_users, num_items=num_items, seed=seed)
    log = world.logs()
    print(f"simulated {len(log):,} impressions of {num_users:,} users on {num_items:,} videos")
    output.mkdir(parents=True, exist_ok=True)
    log[log.long_view == 1].to_parquet(output / "log.parquet")
    world.items.to_parquet(output / "videos.parquet")
    return world


def prepare_data(output: Path, data: Path, world: ShortVideoWorld, seed: int) -> None:
    """`onerec prepare` of the simulated log, with the content of the videos beside what users watched together."""
    loaded = prepare.PrepareArguments(
        source=str(output / "log.parquet"),
        items=str(output / "videos.parquet"),
        columns=json.dumps({"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}),
        feedback=["play_time_ms"],
        output=str(data),
        collaborative_dim=64,
        codebook_size=64,
        seed=seed,
    )
    np.save(output / "content.npy", world.content_embeddings[prepare.load(loaded).item_ids])
    loaded.embeddings = str(output / "content.npy")
    prepare.main(loaded)


def watch_seconds(world: ShortVideoWorld, output: Path, data: Path, systems: dict[str, Path]) -> dict[str, float]:
    """
    The world's true expected watch time, in seconds, of a list of ten unseen videos that is shown at the end of the
    log, by system: a sum over the list, a mean over test users. No system sees it.
    """
    folder, seconds = DataFolder(data), {}
    users, videos = (np.asarray(table[name]) for table, name in ((folder.users, "user_id"), (folder.items, "item_id")))
    end = int(pd.read_parquet(output / "log.parquet", columns=["time_ms"]).time_ms.max())
    for name, path in systems.items():
        found = datasets.Dataset.from_parquet(str(path / "predictions_exclude_seen.parquet")).with_format("numpy")[:]
        lists = np.stack(found["predictions"])[:, :10]
        expected = world.expected_feedback(users[found["user"]][:, None], videos[np.maximum(lists, 0)], end)
        seconds[name] = float(np.where(lists >= 0, expected["play_time_ms"], 0.0).sum(1).mean() / 1000)
    return seconds


def show(folder: Path, data: Path, world: ShortVideoWorld, users: int = 3) -> None:
    """Loads the folder as any user would, and prints what a few users watched and would get."""
    recommender = Recommender.from_pretrained(folder)
    titles = dict(zip(world.items.video_id, world.items.title))
    test = load_splits(data)["test"]
    histories = [recommender.model.catalogue.item_ids[row["history"]].tolist() for row in test.select(range(users))]
    lists: Any = recommender.recommend(histories, k=5, exclude_seen=True)
    for history, found in zip(histories, lists):
        print("\nlast watched: " + "; ".join(titles[item] for item in history[-5:]))
        print("  recommended: " + "; ".join(item.metadata["title"] for item in found))


def main(output: Path, num_users: int = 2000, num_items: int = 2000, epochs: float = 12, seed: int = 0) -> dict:
    """Runs everything; returns the reports of all systems."""
    check_output(str(output))
    data, folder = output / "data", output / "onerec-v2-quickstart"
    world = simulate(output, num_users, num_items, seed)
    prepare_data(output, data, world, seed)
    for checkpoint in folder.glob("checkpoint-*"):  # of an earlier quickstart
        shutil.rmtree(checkpoint)
    training = OneRecSFTConfig(output_dir=str(folder), num_train_epochs=epochs, seed=seed, **TRAINING)
    model = json.dumps(MODEL)
    arguments = sft.ModelArguments(data=str(data), model=model, eval_users=500, metadata=["title", "category"])
    sft.main(arguments, training)
    places, reports = {"OneRec-V2, re-ranked": folder}, {}
    for name, settings in BASELINES.items():
        places[name] = output / name
        own: dict[str, Any] = {part: json.dumps(values) for part, values in settings.items()}
        reports[name] = baseline.main(
            baseline.BaselineArguments(name, str(data), str(output / name), seed=seed, **own)
        )
    fused: dict[str, Any] = {"scorers": [str(output / name) for name in SCORERS], "value": "play_time_ms"}
    fused |= {"seed": seed}
    reranked = rerank.main(rerank.RerankArguments(str(data), model=str(folder), **fused))
    without = output / "without_onerec"  # what the re-ranked model must beat
    reports["the scorers' sum, without OneRec"] = rerank.main(
        rerank.RerankArguments(str(data), output=str(without), **fused)
    )
    places["the scorers' sum, without OneRec"] = without
    reports = {"OneRec-V2, re-ranked": reranked, "OneRec-V2, search alone": reranked["search_alone"]} | reports
    publish.main(
        publish.PublishArguments(
            model=str(folder),
            data=str(data),
            baselines=[str(output / name) for name in BASELINES],
            title="OneRec-V2 quickstart",
            summary="A small OneRec-V2 trained on a **simulated** short-video world; not for real users.",
            dataset_name="simulated short videos",
            simulated=True,
        )
    )
    show(folder, data, world)
    seconds = watch_seconds(world, output, data, places)
    table = results_table({name: (report["test"], report["test_exclude_seen"]) for name, report in reports.items()})
    last = ["true watch time", "---", *(f"{seconds[name]:.1f} s" if name in seconds else "–" for name in reports)]
    print("\n" + "\n".join(f"{row} {cell} |" for row, cell in zip(table.split("\n"), last)))
    print(
        f"\nseen items kept / masked; true watch time: what the simulated users would watch of ten new videos, "
        f"which no system can know. Everything is in {output}, the repository in {folder} (README.md is its card)."
    )
    leans = {
        name: reports[name]["reranker"]["masked"]["value"]["weight"] for name in reports if "reranker" in reports[name]
    }
    told = ", ".join(f"{name}: {weight:g}" for name, weight in leans.items())
    print(f"Weights of watch time (`onerec rerank --value`; `onerec dpo` and `onerec grpo` train for it): {told}.")
    print("Your own data next:  onerec prepare --source LOG.parquet --output outputs/mydata   (see recipes/README.md)")
    (output / "metrics.json").write_text(
        json.dumps({k: v["test"] for k, v in reports.items()}, indent=2), encoding="utf-8"
    )
    return reports


def run(argv: list[str] | None = None) -> None:
    """`onerec quickstart`; `argv`: its arguments, by default those of the command line."""
    parser = argparse.ArgumentParser(
        "onerec quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--num_users", type=int, default=2000)
    parser.add_argument("--num_items", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--seed", type=int, default=0)
    logging.set_verbosity_error()
    main(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    run()
