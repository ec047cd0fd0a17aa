"""The whole path on a laptop, offline: simulated world -> semantic IDs -> OneRec-V2 -> recommendations -> metrics -> repository.

    python recipes/quickstart.py --output outputs/quickstart

A few minutes on 2 cores. Everything below the world is what one's own data go through: `prepare.py`, `baseline.py`, `sft.py`.
The numbers belong to a simulated world and say nothing about real users.
"""

import argparse
import json
import shutil
from pathlib import Path

import baseline
import numpy as np
import prepare
import publish
import sft
from checks import check_output
from transformers.utils import logging

from onerec_hf.data import load_splits
from onerec_hf.hub import results_table
from onerec_hf.recommender import Recommender
from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.trainers import OneRecSFTConfig

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"context_embed_dim": 32, "context_key_value_split": 2, "dropout": 0.2, "score_normalization": "valid"}


def simulate(output: Path, num_users: int, num_items: int, seed: int) -> ShortVideoWorld:
    """Writes the log of effective views (`long_view`, what OneRec calls effectively watched), the videos and their embeddings."""
    world = ShortVideoWorld(num_users=num_users, num_items=num_items, seed=seed)
    log = world.logs()
    print(f"simulated {len(log):,} impressions of {num_users:,} users on {num_items:,} videos")
    output.mkdir(parents=True, exist_ok=True)
    log[log.long_view == 1].to_parquet(output / "log.parquet")
    world.items.to_parquet(output / "videos.parquet")
    return world


def show(folder: Path, data: Path, world: ShortVideoWorld, users: int = 3) -> None:
    """Loads the folder as any user would, and prints what a few users watched and would get."""
    recommender = Recommender.from_pretrained(folder)
    titles = dict(zip(world.items.video_id, world.items.title))
    test = load_splits(data)["test"]
    histories = [recommender.model.catalogue.item_ids[row["history"]].tolist() for row in test.select(range(users))]
    for history, found in zip(histories, recommender.recommend(histories, k=5, exclude_seen=True)):
        print("\nlast watched: " + "; ".join(titles[item] for item in history[-5:]))
        print("  recommended: " + "; ".join(item.metadata["title"] for item in found))


def main(output: Path, num_users: int = 2000, num_items: int = 2000, epochs: float = 12, seed: int = 0) -> dict:
    """Runs everything; returns the reports of all systems."""
    check_output(str(output))
    data, folder = output / "data", output / "onerec-v2-quickstart"
    world = simulate(output, num_users, num_items, seed)
    columns = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
    loaded = prepare.PrepareArguments(
        source=str(output / "log.parquet"),
        items=str(output / "videos.parquet"),
        columns=columns,
        output=str(data),
        collaborative_dim=64,
        codebook_size=64,
        seed=seed,
    )
    interactions = prepare.load(loaded)
    np.save(output / "content.npy", world.content_embeddings[interactions.item_ids])
    loaded.embeddings = str(output / "content.npy")
    prepare.main(loaded)
    for checkpoint in folder.glob("checkpoint-*"):  # of an earlier quickstart
        shutil.rmtree(checkpoint)
    reports = {}
    training = OneRecSFTConfig(
        output_dir=str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        learning_rate=3e-3,
        adam_beta2=0.98,
        optim="adamw_torch_fused",
        weight_decay=0.1,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_ndcg@10",
        logging_steps=20,
        report_to="none",
        seed=seed,
    )
    arguments = sft.ModelArguments(data=str(data), model=MODEL, eval_users=500, metadata=["title", "category"])
    reports["OneRec-V2"] = sft.main(arguments, training)
    for name in ("popularity", "cooccurrence", "sasrec"):
        fit = {"num_epochs": 15} if name == "sasrec" else {}
        arguments = baseline.BaselineArguments(
            name=name, data=str(data), output=str(output / name), seed=seed, fit=fit
        )
        reports[name] = baseline.main(arguments)
    publish.main(
        publish.PublishArguments(
            model=str(folder),
            data=str(data),
            baselines=[str(output / name) for name in ("popularity", "cooccurrence", "sasrec")],
            title="OneRec-V2 quickstart",
            summary="A small OneRec-V2 trained on a **simulated** short-video world; a demonstration, not a model for real users.",
            dataset_name="simulated short videos",
            simulated=True,
        )
    )
    show(folder, data, world)
    print(
        "\n" + results_table({name: (report["test"], report["test_exclude_seen"]) for name, report in reports.items()})
    )
    print(
        f"\nseen items kept / masked. Everything lies in {output}, the repository in {folder} (README.md is its card)."
    )
    print(
        "Your own data next:  python recipes/prepare.py --source LOG.parquet --output outputs/mydata   (see recipes/README.md)"
    )
    (output / "metrics.json").write_text(
        json.dumps({k: v["test"] for k, v in reports.items()}, indent=2), encoding="utf-8"
    )
    return reports


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--num_users", type=int, default=2000)
    parser.add_argument("--num_items", type=int, default=2000)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--seed", type=int, default=0)
    logging.set_verbosity_error()
    main(**vars(parser.parse_args()))
