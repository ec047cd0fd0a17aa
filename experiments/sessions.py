"""Session-wise against point-wise: which serves a whole session better, by the simulator's truth (OneRec, section
3.2).

    python experiments/sessions.py --seeds 0 1 2 --output outputs/sessions.json
    python experiments/sessions.py --lengths 1 2 5 10 --output outputs/session_length.json     # a model per length

One encoder-decoder, trained on the same sessions: session-wise (five items per row, each decoded after the ones before
it), and point-wise (each item of a session a row of its own). They serve the sessions of the last days, five items
each: `session` decodes a whole session, `top 5` takes the five best items of one search, `one by one` puts each item
it chose behind the history and searches again. `logged` is what the logging policy showed, `popularity` the five most
watched items.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from transformers import set_seed
from world import World

from onerec_hf import Catalogue, OneRecConfig, OneRecForCausalLM
from onerec_hf.collators import SessionCollator
from onerec_hf.data import SessionConfig, session_splits, training_events
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

DAY_MS = 86_400_000
ITEMS = 5
MODEL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_encoder_layers": 2,
    "num_attention_heads": 4,
}
MODEL |= {
    "context_embed_dim": 32,
    "context_tokens": "item",
    "max_context_items": 50,
    "num_experts": 4,
    "moe_intermediate_size": 64,
}
MODEL |= {"dropout": 0.2, "score_normalization": "valid", "router_bias_update_rate": 0.001}


def split_sessions(world: World, items: int = ITEMS):
    """Rows of sessions of `items` items, split by time, and what each user watched in the training days."""
    config = SessionConfig(request="request_id", min_watched=3, min_interactions=0, session_size=items, max_history=50)
    edges = split_times(world)
    rows = session_splits(world.log, config, *edges)
    return rows, training_events(world.log, config, rows, edges[0])["history"][:]


def whole_sessions(rows: datasets.Dataset, items: int = ITEMS) -> datasets.Dataset:
    """The rows with exactly `items` items."""
    return rows.filter(lambda targets: len(targets) == items, input_columns="targets")


def split_times(world: World) -> list[int]:
    """Where validation and test begin, in ms: four and two days before the end of the log."""
    start, days = world.simulator.start_time_ms, world.simulator.num_days
    return [start + day * DAY_MS for day in (days - 4, days - 2)]


def one_row_per_item(rows: datasets.Dataset) -> datasets.Dataset:
    """The point-wise form of session rows: each target alone, all with the history before the session."""
    table = rows.select_columns(["user", "history", "targets"]).to_pandas().explode("targets")
    table["targets"] = [[int(item)] for item in table["targets"]]
    return datasets.Dataset.from_pandas(table, preserve_index=False)


def train(items: int, rows, catalogue: Catalogue, epochs: float, seed: int):
    """A model of sessions of `items` items; the checkpoint with the lowest validation loss."""
    set_seed(seed)
    model = OneRecForCausalLM(OneRecConfig(codebook_sizes=catalogue.codebook_sizes, num_session_items=items, **MODEL))
    model.catalogue = catalogue
    collator = SessionCollator(catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets), 50)
    fit, validation = rows["train"], rows["validation"]
    if items == 1:
        fit, validation = one_row_per_item(fit), one_row_per_item(validation)
    with TemporaryDirectory() as folder:
        arguments = OneRecSFTConfig(
            folder,
            num_train_epochs=epochs,
            per_device_train_batch_size=64 * ITEMS // items,
            per_device_eval_batch_size=256,
            train_sampling_strategy="random",
            learning_rate=2e-3,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=30,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="loss",
            greater_is_better=False,
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            seed=seed,
        )
        columns = {"train_dataset": fit.with_format("numpy"), "eval_dataset": validation.with_format("numpy")}
        trainer = OneRecSFTTrainer(model, arguments, data_collator=collator, **columns)
        trainer.train()
    best = trainer.state.best_metric / items / catalogue.num_levels
    return model.eval(), collator, {"nats_per_code": best, "parameters": model.num_parameters()}


def shown_items(model, collator, rows: datasets.Dataset, how: str, items: int = ITEMS) -> np.ndarray:
    """Item indices (S, `items`) for the sessions of `rows`."""
    catalogue, shown = model.catalogue, []
    for start in range(0, len(rows), 256):
        batch = [{"user": 0, "history": history} for history in rows[start : start + 256]["history"]]
        if how == "one by one":
            chosen = np.zeros((len(batch), 0), dtype=np.int64)
            for _ in range(items):
                allowed = torch.ones(len(batch), catalogue.num_items, dtype=torch.bool)
                allowed[np.arange(len(batch))[:, None], chosen] = False
                longer = [row | {"history": [*row["history"], *own]} for row, own in zip(batch, chosen.tolist())]
                found = model.generate(
                    **collator.context(longer), num_beams=20, allowed_items=allowed, num_session_items=1
                )
                chosen = np.concatenate([chosen, items_of(found, catalogue, model)], axis=1)
        else:
            settings = (
                {"num_session_items": items}
                if how == "session"
                else {"num_session_items": 1, "num_return_sequences": items}
            )
            found = model.generate(**collator.context(batch), num_beams=20, **settings)
            chosen = items_of(found, catalogue, model).reshape(len(batch), items)
        shown.append(chosen)
    return np.concatenate(shown)


def items_of(sequences, catalogue: Catalogue, model) -> np.ndarray:
    codes = sequences.view(-1, catalogue.num_levels + 1)[:, 1:] - torch.tensor(model.config.level_offsets)
    return catalogue.items_of(catalogue.leaves_of(codes).view(-1, 1), 1).numpy()


def expected_feedback(world: World, rows: datasets.Dataset, items: np.ndarray) -> dict:
    """The simulator's truth about the items (S, 5) of each request: arrays (S, 5) by feedback."""
    times = np.array(rows["session_start"]).astype(np.int64)[:, None] + 30_000 * np.arange(items.shape[1])
    return world.expected_feedback(rows["user"][:], items, times)


def judge(world: World, rows: datasets.Dataset, items: np.ndarray, truth: dict) -> dict[str, float]:
    """Expected feedback of the five items by the simulator's truth, and what the sets look like."""
    vectors = world.simulator.content_embeddings[world.log.item_ids[items]]  # (S, 5, D)
    vectors = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    similar = np.einsum("sid,sjd->sij", vectors, vectors)
    off = ~np.eye(items.shape[1], dtype=bool)
    categories = world.simulator.items.category.to_numpy()[world.log.item_ids[items]]
    real = [set(targets) for targets in rows["targets"]]
    return {
        "watch_s": float(truth["play_time_ms"].sum(1).mean() / 1000),
        "likes": float(truth["is_like"].sum(1).mean()),
        "long_views": float(truth["long_view"].sum(1).mean()),
        "diversity": float(1 - similar[:, off].mean()),
        "categories": float(np.mean([len(set(row)) for row in categories])),
        "duplicates": float(np.mean([len(row) - len(set(row)) for row in items.tolist()])),
        "hits": float(np.mean([len(set(row) & own) for row, own in zip(items.tolist(), real)])),
        "coverage": len(np.unique(items)) / world.log.num_items,
    }


def run(seed: int, args) -> dict[str, dict[str, float]]:
    world = World(seed, args.num_users, args.num_items, request_size=10)
    (rows, watched), catalogue = split_sessions(world), world.catalogue
    counts = np.bincount(np.concatenate(watched), minlength=catalogue.num_items)
    test = whole_sessions(rows["test"])
    popular = np.tile(np.argsort(-counts)[:ITEMS], (len(test), 1))
    shown = {"logged": np.array(test["targets"]), "popularity": popular}
    losses = {}
    for name, items in (("session-wise", ITEMS), ("point-wise", 1)):
        model, collator, losses[name] = train(items, rows, catalogue, args.epochs, seed)
        for how in ("session", "top 5", "one by one") if items > 1 else ("top 5", "one by one"):
            shown[f"{name}: {how}"] = shown_items(model, collator, test, how)
    report = {name: judge(world, test, items, expected_feedback(world, test, items)) for name, items in shown.items()}
    print(f"seed {seed}: {[len(split) for split in rows.values()]} sessions, {len(test)} served, {losses}", flush=True)
    return report


def run_lengths(seed: int, args) -> dict[str, dict[str, float]]:
    """A model for each session length, on the same requests: what a served item is worth by the simulator's truth."""
    world, report = World(seed, args.num_users, args.num_items, request_size=10), {}
    for items in args.lengths:
        rows, _ = split_sessions(world, items)
        test = whole_sessions(rows["test"], items)
        model, collator, found = train(items, rows, world.catalogue, args.epochs, seed)
        shown = shown_items(model, collator, test, "session", items)
        truth = expected_feedback(world, test, shown)
        own = {"watch_s per item": float(truth["play_time_ms"].mean() / 1000)}
        own["watch_s, first item"] = float(truth["play_time_ms"][:, 0].mean() / 1000)
        own |= {
            "long views per item": float(truth["long_view"].mean()),
            "likes per item": float(truth["is_like"].mean()),
        }
        if items > 1:
            own |= {"diversity": judge(world, test, shown, truth)["diversity"]}
        real = [set(targets) for targets in test["targets"]]
        hits = [len(set(row) & wanted) / items for row, wanted in zip(shown.tolist(), real)]
        own["hits per item"] = float(np.mean(hits))
        own |= {"coverage": len(np.unique(shown)) / world.log.num_items, "nats per code": found["nats_per_code"]}
        report[f"{items} items"] = own | {"requests": len(test), "training rows": len(rows["train"])}
        print(f"seed {seed}, {items} items: {report[f'{items} items']}", flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_users", type=int, default=2000)
    parser.add_argument("--num_items", type=int, default=1500)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", help="Instead: one model for each session length.")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    reports = [(run_lengths if args.lengths else run)(seed, args) for seed in args.seeds]
    names = list(reports[0][f"{args.lengths[-1]} items" if args.lengths else "logged"])
    print("| served by | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 1) + "|")
    for way in reports[0]:
        values = np.array([[report[way].get(name, np.nan) for name in names] for report in reports])
        cells = [
            f"{mean:.3f} ±{spread:.3f}"
            for mean, spread in zip(values.mean(0), values.std(0, ddof=int(len(reports) > 1)))
        ]
        print(f"| {way} | " + " | ".join(cells) + " |")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"arguments": vars(args) | {"output": str(args.output)}, "reports": reports}, indent=2)
        )


if __name__ == "__main__":
    main()
