"""Iterative Preference Alignment of whole sessions in a simulated world: OneRec as its paper trains it
(arXiv:2502.18965).

    OMP_NUM_THREADS=1 python experiments/session_alignment.py --seeds 0 1 2 --output outputs/session_alignment.json

Table 1 of the paper (`--baselines`, `--ablations`) and its Figure 5. Each seed is a world, a log, a reward model
(P-Score of watch time, trained on every impression of the training days; a session's reward is the mean of its items',
since a few thousand sessions teach the reward model of whole sessions too little) and a session-wise OneRec, trained
on the high-quality sessions of the same days. Every aligned system goes on from that seed model with as many steps; it
decodes one session of five items for every request of the last days, and the simulator's expected feedback on those
five items judges it. Baselines and the point-wise model serve their five best items; baselines learn from every view
of the training days. The truth is never trained on; settings were chosen on worlds of other seeds.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import sessions
import torch
from world import World, align, rank_correlation, train_reward

from onerec_hf.baselines import FDSA, TIGER, BERT4Rec, SASRec, attribute_codes
from onerec_hf.data import SessionConfig, session_splits
from onerec_hf.evaluation import evaluate, prediction_entropy
from onerec_hf.hub import plot_prediction_entropy
from onerec_hf.rewards import reward_of_model
from onerec_hf.trainers.pair_mining import mine_pairs


def reward_of_requests(world: World, epochs: float = 6):
    """The reward model of watch time, from all requests of the training days."""
    every = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "cut": "first"}
    config = SessionConfig(request="request_id", session_size=sessions.ITEMS, max_history=50, **every)
    rows = session_splits(world.log, config, *sessions.split_times(world))["train"]
    settings = {"max_history": 50, "batch_size": 128, "epochs": epochs, "seed": world.seed}
    return train_reward(world.log, rows, world.item_token_ids, **settings)[:2]


@torch.no_grad()
def reward_quality(world: World, rows, model, collator) -> float:
    """Rank correlation of the reward with the truth over random sessions, mean over 150 requests."""
    draw, found = np.random.default_rng(0), []
    for row in rows.select(range(min(150, len(rows)))):
        items = draw.integers(0, world.log.num_items, (40, sessions.ITEMS))
        times = int(row["session_start"]) + 30_000 * np.arange(sessions.ITEMS)[None]
        truth = world.expected_feedback([row["user"]], items, times)["play_time_ms"].sum(1)
        batch = collator.context([row]) | collator.candidates([row | {"targets": own.tolist()} for own in items])
        found.append(rank_correlation(truth, model(**batch).rewards.mean(1).numpy()))
    return float(np.mean(found))


def seed_pairs(seed_model, collator, rows, reward, args, seed: int, num_rejected: int) -> datasets.Dataset:
    """Pairs of the seed model for a share `dpo_ratio` of the rows."""
    ids = np.random.default_rng(seed).permutation(len(rows))[: round(args.dpo_ratio * len(rows))].tolist()
    some = [dict(rows[row]) for row in ids]
    found, _ = mine_pairs(seed_model, some, ids, collator, reward, args.num_candidates, num_rejected)
    return datasets.Dataset.from_list(found).select_columns(["row", "chosen", "rejected"])


def train_baselines(world: World, watched, rows) -> dict:
    """Table 1's baselines; the epoch with the best ndcg@10 on the validation sessions."""
    validation = rows["validation"].filter(lambda history: len(history) > 0, input_columns="history")
    category = world.simulator.items.category.to_numpy()[world.log.item_ids]
    catalogue, seed = world.catalogue, world.seed
    small = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    models = {
        "SASRec": SASRec(catalogue.num_items, seed=seed, dropout=0.2),
        "BERT4Rec": BERT4Rec(catalogue.num_items, seed=seed),
        "FDSA": FDSA(attribute_codes(category), seed=seed),
        "TIGER": TIGER(catalogue, num_user_tokens=0, causal_items=True, dropout=0.0, seed=seed, **small),
    }

    def validate(model) -> float:
        return evaluate(model, validation, num_items=catalogue.num_items, ks=(10,), progress=False).metrics["ndcg@10"]

    for name, model in models.items():
        rate = 0.02 if name == "TIGER" else 2e-3  # TIGER's is relative to the size of a weight
        settings = {"num_epochs": 30, "batch_size": 64, "learning_rate": rate, "validate_every": 3, "patience": 9}
        model.fit(watched, validate=validate, seed=seed, progress=False, **settings)
    return models


def best_of(reward, model, collator, rows, num_candidates: int) -> np.ndarray:
    """Of each request's beams the session that the reward model likes best: items (S, 5)."""
    shown = []
    size = max(1, 4096 // num_candidates)
    for start in range(0, len(rows), size):
        some = [dict(row) for row in rows.select(range(start, min(start + size, len(rows))))]
        found = model.generate(**collator.context(some), num_beams=num_candidates, num_return_sequences=num_candidates)
        columns = {name: [row[name] for row in some for _ in range(num_candidates)] for name in some[0]}
        best = torch.tensor(reward(completion_ids=found[:, 1:].tolist(), **columns)).view(len(some), -1).argmax(1)
        found = found[torch.arange(len(some)) * num_candidates + best]
        shown.append(sessions.items_of(found, model.catalogue, model).reshape(len(some), sessions.ITEMS))
    return np.concatenate(shown)


def true_reward(world: World, model):
    """The simulator's expected watch time of a session, as a reward: what the best choice among candidates gives."""

    def watch_time(completion_ids, user, session_start, **columns):
        first = torch.full((len(completion_ids), 1), model.config.bos_token_id)
        tokens = torch.cat([first, torch.tensor(completion_ids)], dim=1)
        items = sessions.items_of(tokens, world.catalogue, model).reshape(len(tokens), -1)
        times = np.array(session_start).astype(np.int64)[:, None] + 30_000 * np.arange(items.shape[1])
        return world.expected_feedback(user, items, times)["play_time_ms"].sum(1).tolist()

    return watch_time


def judge(world: World, rows, items: np.ndarray, opinion, collator) -> dict[str, float]:
    """The truth about the five items of each request, sum and largest of the five, and the reward model's opinion."""
    truth = sessions.expected_feedback(world, rows, items)
    report = sessions.judge(world, rows, items, truth)
    report["follows"] = float(truth["is_follow"].sum(1).mean())
    names = {"watch_s": "play_time_ms", "long_views": "long_view", "follows": "is_follow", "likes": "is_like"}
    report |= {f"{name} max": float(truth[column].max(1).mean()) for name, column in names.items()}
    report["watch_s max"] /= 1000
    tokens = collator.item_token_ids[items].reshape(len(items), -1).tolist()
    report["reward model"] = float(
        np.mean(opinion(completion_ids=tokens, **{key: rows[key][:] for key in rows.column_names}))
    )
    return report


def systems(args, reward) -> dict[str, tuple]:
    """What starts from the seed model: settings, a reward, and how many rejected sessions its pairs of the seed model
    have.
    """
    common = {"num_train_epochs": args.iterations, "learning_rate": args.learning_rate}
    common |= {"per_device_train_batch_size": 64}
    alignment = common | {"dpo_ratio": args.dpo_ratio, "num_candidates": args.num_candidates, "kl_users": 128}
    alignment |= {"preference_weight": args.preference_weight}
    found = {"SFT, the same number of steps": (common, None, 0), "IPA": (alignment, reward, 0)}
    for loss in args.losses:
        settings = alignment | {"loss_type": loss, "num_rejected": 3 if loss == "sdpo" else 1}
        found[f"{loss}, pairs of the seed model"] = (settings, None, settings["num_rejected"])
    if args.ablations:
        changes = [{"num_candidates": number} for number in (8, 128)]
        changes += [{"num_train_epochs": number} for number in (1, 2, 5)]
        changes += [{"dpo_ratio": share} for share in (0.01, 0.02, 0.03, 0.04, 0.05, 0.2)]
        for share in (0.01, 0.02, 0.05):  # the paper's range, with as much weight in all as one pair for every row
            rare = alignment | {"dpo_ratio": share, "preference_weight": 1 / share}
            found[f"IPA, dpo_ratio {share}, lambda {1 / share:.0f}"] = (rare, reward, 0)
        found |= {
            f"IPA, {key} {value}": (alignment | {key: value}, reward, 0)
            for each in changes
            for key, value in each.items()
        }
    if args.systems:
        found = {name: own for name, own in found.items() if name in args.systems}
    return found


def run(seed: int, args) -> dict[str, dict[str, float]]:
    """Every system of one world."""
    world = World(seed, args.num_users, args.num_items, request_size=10)
    (rows, watched), catalogue = sessions.split_sessions(world), world.catalogue
    whole = rows.filter(lambda targets: len(targets) == sessions.ITEMS, input_columns="targets")
    test, fit = whole["test"], whole["train"].with_format("numpy")
    reward_model, reward_collator = reward_of_requests(world)
    quality = reward_quality(world, test, reward_model, reward_collator)
    print(f"seed {seed}: rank correlation of the reward model with the truth {quality:.3f}", flush=True)
    seed_model, collator, _ = sessions.train(sessions.ITEMS, rows, catalogue, args.epochs, seed)
    reward = reward_of_model(reward_model, reward_collator, seed_model)
    opinion = reward_of_model(reward_model, reward_collator, seed_model)
    report, entropies, targets = {}, {}, collator(list(test.select(range(min(400, len(test))))))

    def say(name: str, items: np.ndarray, model=None, log=()):
        report[name] = judge(world, test, items, opinion, collator)
        report[name] |= {key: log[-1][f"ipa/{key}"] for key in ("kl_to_seed", "tied") if log}
        if model is not None:
            entropies[name] = prediction_entropy(model, targets)
            report[name] |= {
                f"entropy {level + 1}": float(value) for level, value in enumerate(entropies[name].mean(0))
            }
        print(f"seed {seed}, {name}: { ({key: round(value, 3) for key, value in report[name].items()}) }", flush=True)

    say("logged", np.array(test["targets"]))
    if args.baselines:
        examples = {name: test[name][:] for name in ("user", "history")}
        for name, model in train_baselines(world, watched, whole).items():
            say(name, np.asarray(model.recommend(examples, sessions.ITEMS)))
        point_wise, point_collator, _ = sessions.train(1, rows, catalogue, args.epochs, seed)
        say("OneRec, point-wise", sessions.shown_items(point_wise, point_collator, test, "top 5"))
    say("seed model", sessions.shown_items(seed_model, collator, test, "session"), seed_model)
    for number in dict.fromkeys([args.num_candidates, *args.pass_at]):
        start = time.perf_counter()
        say(f"seed model, best of {number}", best_of(reward, seed_model, collator, test, number))
        report[f"seed model, best of {number}"]["ms per request"] = 1000 * (time.perf_counter() - start) / len(test)
    for number in args.pass_at:
        best = best_of(true_reward(world, seed_model), seed_model, collator, test, number)
        say(f"seed model, the truth picks of {number}", best)
    chosen, pairs = systems(args, reward), {0: None}
    if any(num_rejected for *_, num_rejected in chosen.values()):
        pairs[3] = seed_pairs(seed_model, collator, fit, reward, args, seed, 3)
        tokens = sessions.ITEMS * catalogue.num_levels
        pairs[1] = pairs[3].map(lambda rejected: {"rejected": rejected[:tokens]}, input_columns="rejected")
    for name, (settings, judge_of, num_rejected) in chosen.items():
        if judge_of is not None and settings["num_candidates"] != args.num_candidates:
            judge_of = reward_of_model(reward_model, reward_collator, seed_model)
        with TemporaryDirectory() as folder:
            model, log = align(seed_model, collator, fit, folder, settings, seed, judge_of, pairs[num_rejected])
        log = [entry for entry in log if "ipa/pairs" in entry]  # one an iteration
        say(name, sessions.shown_items(model, collator, test, "session"), model, log)
        if name == "IPA":
            best = best_of(opinion, model, collator, test, args.num_candidates)
            say(f"IPA, best of {args.num_candidates}", best)
    if seed == args.seeds[0] and not args.systems:
        both = {name: entropies[name] for name in ("seed model", "SFT, the same number of steps", "IPA")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        plot_prediction_entropy(both, catalogue.codebook_sizes, args.output.with_suffix(".png"))
    return report


def summary(reports: list[dict]) -> str:
    """Means ± standard deviation over the worlds that have a system; `change` is against the same world's seed
    model.
    """
    names = ["watch_s", "watch_s max", "long_views", "long_views max", "follows", "follows max", "likes", "likes max"]
    names += ["diversity", "hits", "coverage", "reward model"]
    lines = [
        "| system | change of watch time | " + " | ".join(names) + " | entropy |",
        "|---" * (len(names) + 3) + "|",
    ]
    for system in dict.fromkeys(name for report in reports for name in report):
        own = [report for report in reports if system in report]
        change = [100 * (report[system]["watch_s"] / report["seed model"]["watch_s"] - 1) for report in own]
        cells = [[report[system][name] for report in own] for name in names]
        spread = int(len(own) > 1)
        text = [f"{np.mean(values):.3f} ±{np.std(values, ddof=spread):.3f}" for values in cells]
        levels = [name for name in own[0][system] if name.startswith("entropy")]
        text.append(" / ".join(f"{np.mean([report[system][name] for report in own]):.2f}" for name in levels))
        worlds = "" if len(own) == len(reports) else f" ({len(own)} of {len(reports)} worlds)"
        lines.append(
            f"| {system}{worlds} | {np.mean(change):+.1f}% ±{np.std(change, ddof=spread):.1f} | "
            + " | ".join(text)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_users", type=int, default=1200)
    parser.add_argument("--num_items", type=int, default=600)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--dpo_ratio", type=float, default=1.0)
    parser.add_argument("--num_candidates", type=int, default=64)
    parser.add_argument("--preference_weight", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument(
        "--pass_at", type=int, nargs="*", default=[], help="Best of so many sessions, by the reward and by the truth."
    )
    parser.add_argument("--losses", nargs="*", default=["dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo", "sdpo"])
    parser.add_argument(
        "--ablations", action="store_true", help="Also shares of rows, candidates and iterations of IPA."
    )
    parser.add_argument(
        "--systems", nargs="+", help="Only these of the systems that start from the seed model, by name."
    )
    parser.add_argument("--baselines", action="store_true", help="Also Table 1's baselines and the point-wise model.")
    parser.add_argument("--summary", type=Path, nargs="+", help="Only print the table of these outputs.")
    parser.add_argument("--output", type=Path, default=Path("outputs/session_alignment.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.summary:
        worlds: dict[int, dict] = {}
        for found in map(json.loads, (path.read_text() for path in args.summary)):
            for seed, report in zip(found["arguments"]["seeds"], found["reports"]):
                worlds.setdefault(seed, {}).update(report)
        print(summary(list(worlds.values())))
        return
    reports = [run(seed, args) for seed in args.seeds]
    print(summary(reports))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"arguments": vars(args) | {"output": str(args.output)}, "reports": reports}, indent=2)
    )


if __name__ == "__main__":
    main()
