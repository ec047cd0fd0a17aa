"""Reinforcement learning in a simulated world: legality, gradient norms, a simulated A/B test, time per step.

    python experiments/reinforcement.py --part all --seeds 0 1 2 --output outputs/reinforcement

Each seed is a world of its own with its own supervised model (OneRec-V2 with the papers' softmax within the level).
Parts: `legality` (unconstrained samples under ECPO, alone and with the format reward on random or on the most probable
samples), `gradients` (norms on negative advantages under GRPO, ECPO, GBPO), `ab` (a reward model, feedback and both
against the supervised model), `rollouts` (group size, beam or samples, on- or off-policy), `searches` (beams with and
without the constraint, samples by top-k and top-p, by group size), `speed`. The rewards of rollouts, but in `ab`, are
the world's true probability of a long view: what a perfect reward model would say. Simulated numbers are no results on
real data.
"""

import argparse
import json
import logging as python_logging
from pathlib import Path

import datasets
import ipa
import numpy as np
import pandas as pd
import torch
from reinforcement_report import plot, table
from transformers.utils import logging
from world import COLUMNS, FEEDBACK

from onerec_hf.data import load_interactions, load_splits
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import Recommender
from onerec_hf.rewards import FormatReward, completion_leaves, is_legal, reward_of_model
from onerec_hf.scripts import ab_test, grpo, prepare, quickstart, sft
from onerec_hf.simulator import ShortVideoWorld, simulate_visits
from onerec_hf.trainers import OneRecGRPOConfig, OneRecSFTConfig

USERS, ITEMS, TEST_USERS = 1000, 1000, 400
COMMON = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_steps": 10}
RL = COMMON | {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "optim": "adamw_torch"}


def supervised(output: Path, seed: int) -> tuple[ShortVideoWorld, Path, Path]:
    """The world, its prepared folder and a supervised model, made once."""
    world = ShortVideoWorld(num_users=USERS, num_items=ITEMS, seed=seed)
    data, policy = output / "data", output / "sft"
    if (policy / "metrics.json").exists():
        return world, data, policy
    output.mkdir(parents=True, exist_ok=True)
    log = world.logs()
    log.to_parquet(output / "impressions.parquet")
    log[log.long_view == 1].to_parquet(output / "log.parquet")
    world.items.to_parquet(output / "videos.parquet")
    arguments = prepare.PrepareArguments(
        source=str(output / "log.parquet"),
        items=str(output / "videos.parquet"),
        columns=COLUMNS,
        output=str(data),
        collaborative_dim=64,
        codebook_size=32,
        seed=seed,
    )
    np.save(output / "content.npy", world.content_embeddings[prepare.load(arguments).item_ids])
    arguments.embeddings = str(output / "content.npy")
    prepare.main(arguments)
    training = OneRecSFTConfig(
        output_dir=str(policy),
        num_train_epochs=30,
        per_device_train_batch_size=64,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        seed=seed,
        **COMMON,
    )
    model = quickstart.MODEL | {"score_normalization": "level"}
    sft.main(sft.ModelArguments(data=str(data), model=model, metadata=["title"]), training)
    return world, data, policy


def true_reward(world: ShortVideoWorld, data: Path, catalogue):
    """P(long view) of each legal candidate for its own user at the time of its context's last event; None for an
    illegal one.
    """
    users = np.asarray(datasets.Dataset.from_parquet(str(data / "users.parquet"))["user_id"])

    def true_long_view(completion_ids, user, timestamp, **columns):
        leaves, owner = completion_leaves(completion_ids, catalogue)
        leaf = torch.full((len(completion_ids),), -1).scatter_(0, owner, leaves)
        legal = (leaf >= 0).numpy()
        items = catalogue.items_of(leaf.clamp(min=0).unsqueeze(1), 1)[:, 0].numpy()
        time_ms = np.array([own[-1] for own in timestamp])
        found = world.expected_feedback(users[np.asarray(user)], catalogue.item_ids[items], time_ms)["long_view"]
        return [float(value) if good else None for value, good in zip(found, legal)]

    return true_long_view


def train(
    output: Path, data: Path, policy: Path, rewards: list, seed: int, arguments: dict | None = None, **settings
) -> dict:
    """One run of recipes/grpo.py; its report. A run that is there already is not made again."""
    if (output / "metrics.json").exists():
        return json.loads((output / "metrics.json").read_text())
    training = OneRecGRPOConfig(output_dir=str(output), seed=seed, **(RL | settings))
    own = grpo.RLArguments(policy=str(policy), data=str(data), test_users=TEST_USERS, **(arguments or {}))
    return grpo.main(own, training, rewards)


def sampled_legality(policy: Path, data: Path, seed: int, samples: int = 64) -> float:
    """Share of unconstrained samples that are items, over 200 test users."""
    ranker = Recommender.from_pretrained(policy).ranker
    torch.manual_seed(seed)
    rows = load_splits(data)["test"].select(range(200))
    context = ranker.collator.context(list(rows))
    tokens = ranker.model.generate(**context, constrained=False, do_sample=True, top_k=0, num_return_sequences=samples)
    return is_legal(tokens[:, 1:].tolist(), ranker.model.catalogue).float().mean().item()


def legality(output: Path, seed: int, steps: int = 200) -> dict:
    world, data, policy = supervised(output, seed)
    model = Recommender.from_pretrained(policy).model
    group = 64
    reward = true_reward(world, data, model.catalogue)
    report = {"sft": {"sampled_legality": sampled_legality(policy, data, seed)}}
    settings = {"rollout": "unconstrained", "num_generations": group, "per_device_train_batch_size": 4 * group}
    arms = [("ecpo", None, 0), ("ecpo + format, top K", "top", 1), ("ecpo + format, random K", "random", 1)]
    arms += [(f"ecpo + {weight} format, {how} K", how, weight) for weight in (5, 20) for how in ("top", "random")]
    for name, selection, weight in arms:
        rewards = [reward] + ([FormatReward(model.catalogue, group, 5, selection)] if selection else [])
        folder = output / "legality" / name.replace(" ", "_")
        own = settings | {"reward_weights": [1.0, float(weight)] if selection else None}
        found = train(folder, data, policy, rewards, seed, max_steps=steps, **own)
        report[name] = {"sampled_legality": sampled_legality(folder, data, seed)}
        report[name] |= {key: found["test"][key] for key in ("recall@10", "ndcg@10")}
        report[name]["curve"] = [
            (log["step"], log["legality"], log["reward"]) for log in found["log"] if "legality" in log
        ]
    return report


def gradients(output: Path, seed: int, steps: int = 100) -> dict:
    """Constrained samples, four steps of training per rollout, so that ratios leave 1."""
    world, data, policy = supervised(output, seed)
    model, group, report = Recommender.from_pretrained(policy).model, 16, {}
    reward = true_reward(world, data, model.catalogue)

    def centred(**columns):
        """The advantages themselves, by the name of the function: as they are, for each of the losses."""
        rewards = torch.tensor(reward(**columns)).view(-1, group)
        rewards = (rewards - rewards.mean(1, keepdim=True)) / rewards.std(1, correction=0, keepdim=True).clamp(
            min=1e-6
        )
        return rewards.flatten().tolist()

    for loss_type in ("grpo", "ecpo", "gbpo"):
        found = train(
            output / "gradients" / loss_type,
            data,
            policy,
            [centred],
            seed,
            loss_type=loss_type,
            rollout="sample",
            num_generations=group,
            per_device_train_batch_size=8 * group,
            steps_per_generation=4,
            unnormalized_rewards=["centred"],
            sign_norm_steps=2,
            max_steps=steps,
        )
        keys = (
            "grad_norm/negative",
            "grad_norm/positive",
            "weight/negative",
            "weight/positive",
            "entropy/level_1",
            "reward",
        )
        report[loss_type] = {
            "curve": [[log["step"], *(log.get(key) for key in keys)] for log in found["log"] if "reward" in log]
        }
        report[loss_type] |= {"keys": ["step", *keys], "recall@10": found["test"]["recall@10"]}
    return report


def learned_reward(output: Path, data: Path, policy, seed: int):
    """A P-Score of watch time, from the log before each user's held-out views."""
    users = datasets.Dataset.from_parquet(str(data / "users.parquet"))["user_id"][:]
    log = pd.read_parquet(output / "impressions.parquet")
    log = log[log.user_id.isin(users) & log.video_id.isin(policy.catalogue.item_ids)]
    known = {"items": pd.DataFrame({"item_id": policy.catalogue.item_ids}), "items_columns": {"item_id": "item_id"}}
    log = load_interactions(log, columns=COLUMNS, feedback=FEEDBACK, **known)
    assert log.user_ids.tolist() == users and log.item_ids.tolist() == policy.catalogue.item_ids.tolist()
    held_out = np.full(len(users), np.inf)
    for row in load_splits(data)["test"]:
        held_out[row["user"]] = row["timestamp"][-1]  # the validation event
    tokens = policy.catalogue.semantic_ids.numpy() + np.array(policy.config.level_offsets)
    model, collator, _ = ipa.reward_before(log, tokens, held_out, seed, epochs=3)
    return reward_of_model(model, collator, policy)


def ab(output: Path, seed: int, steps: int = 200) -> dict:
    """Table 7 of OneRec-V2: a reward model, user feedback (with and without the model's own exposures), both; joint
    with SFT.
    """
    world, data, policy = supervised(output, seed)
    log = pd.read_parquet(output / "impressions.parquet")
    users = np.unique(log.user_id[log.long_view == 1]).tolist()
    own_log = output / "own_exposures.parquet"
    if not own_log.exists():  # two weeks of the model's exposures, in front of the test and with other random numbers
        server = ab_test.Server(Recommender.from_pretrained(policy).ranker, users)
        shown = simulate_visits(world, server, log[log.user_id.isin(users)], num_days=14, seed=100 + seed)
        pd.concat([log, shown.assign(request_id=shown.request_id + 10**9)]).to_parquet(own_log)
    group, own = 32, (own_log, float(world.start_time_ms + world.num_days * 86_400_000))
    rollouts = {"rollout": "beam", "num_generations": group, "per_device_train_batch_size": 8 * group}
    logged = {"logged_batch_size": 64}
    arms = {
        "SFT, the same number of steps": (own, logged | {"logged_weight": 1.0, "rl_weight": 0.0}),
        "feedback on others' samples": ((output / "impressions.parquet", None), logged | {"logged_weight": 1.0}),
        "feedback on own samples": (own, logged | {"logged_weight": 1.0}),
        "reward model": ((None, None), rollouts),
        "hybrid": (own, rollouts | logged | {"logged_weight": 0.5}),
    }
    report, reward = {}, None
    for name, ((path, start), settings) in arms.items():
        folder = output / "ab" / name.replace(" ", "_").replace(",", "").replace("'", "")
        if settings.get("logged_weight") != 1 and reward is None:
            reward = learned_reward(output, data, Recommender.from_pretrained(policy).model, seed)
        found = train(
            folder,
            data,
            policy,
            None if settings.get("logged_weight") == 1 else [reward],
            seed,
            {"exposures": path and str(path), "columns": COLUMNS, "start": start, "ties": "inclusive"},
            loss_type="gbpo",
            sft_weight=1.0,
            sft_batch_size=64,
            max_steps=steps,
            **({"learning_rate": 3e-4, "sign_norm_steps": 0} | settings),
        )
        tested = folder / "ab" / "ab_test.json"
        if not tested.exists():
            world_arguments = json.dumps({"num_users": USERS, "num_items": ITEMS, "seed": seed})
            log_path = str(output / "impressions.parquet")
            ab_test.main(
                str(policy), str(folder), log_path, str(tested.parent), world_arguments, 5, [seed], return_slope=0.0
            )
        report[name] = {"lifts": json.loads(tested.read_text())["lifts"], "test": found["test"]}
    report["sft"] = {"test": json.loads((policy / "metrics.json").read_text())["test"]}
    return report


def rollouts(output: Path, seed: int, steps: int = 100) -> dict:
    """The Technical Report's three RL tables in small: group size, how candidates are found, whose they are; joint
    with SFT.
    """
    arms = {"SFT, the same number of steps": {"rl_weight": 0.0, "num_generations": 2}}
    arms |= {f"beam, G={group}": {"num_generations": group} for group in (32, 128, 512)}
    arms |= {f"{how}, G=128": {"rollout": how, "num_generations": 128} for how in ("sample", "tree")}
    arms["beam, G=128, of the supervised model"] = {"num_generations": 128, "steps_per_generation": steps}
    return compare_rollouts(output, "rollouts", seed, steps, arms)


def searches(output: Path, seed: int, steps: int = 30) -> dict:
    """Its Table 8 and Figure 12: beams with and without the constraint against samples by top-k and top-p."""
    ways = {"beam": {}, "beam without the constraint": {"rollout": "unconstrained_beam"}}
    ways["top-k 16 and top-p 0.9"] = {"rollout": "unconstrained", "top_k": 16, "top_p": 0.9}
    arms = {"SFT, the same number of steps": {"rl_weight": 0.0, "num_generations": 2}}
    for group in (32, 128, 512):
        arms |= {f"{way}, G={group}": own | {"num_generations": group} for way, own in ways.items()}
    return compare_rollouts(output, "searches", seed, steps, arms)


def compare_rollouts(output: Path, part: str, seed: int, steps: int, arms: dict) -> dict:
    """What each arm's `steps` of RL, of 8 users each, make of the supervised model."""
    world, data, policy = supervised(output, seed)
    reward = true_reward(world, data, Recommender.from_pretrained(policy).model.catalogue)
    test = load_splits(data)["test"].select(range(TEST_USERS))

    def served(folder: Path) -> dict[str, float]:
        """P(long view) of what test users get at the time of their last event, and whether the held-out view is in
        it.
        """
        ranker = Recommender.from_pretrained(folder).ranker
        found = evaluate(ranker, test, num_items=ITEMS, progress=False)
        tokens = ranker.collator.item_token_ids[found.predictions[:, :10]]
        columns = {name: [row[name] for row in test for _ in range(10)] for name in ("user", "timestamp")}
        views = np.array(reward(completion_ids=tokens.reshape(-1, tokens.shape[-1]).tolist(), **columns))
        views = views.reshape(-1, 10)
        best = {"long_view@1": views[:, 0], "long_view@10": views, "long_view_max@10": views.max(1)}
        best["recall@10"] = np.array(found.metrics["recall@10"])
        return {name: float(values.mean()) for name, values in best.items()}

    report = {"supervised": served(policy)}
    for name, settings in arms.items():
        folder = output / part / name.replace(" ", "_").replace(",", "").replace("=", "")
        settings = {"per_device_train_batch_size": 8 * settings["num_generations"]} | settings
        settings |= {"sft_weight": 1.0, "sft_batch_size": 64, "learning_rate": 3e-4, "sign_norm_steps": 0}
        log = train(folder, data, policy, [reward], seed, max_steps=steps, **settings)["log"]
        found = [entry["legality"] for entry in log if "legality" in entry]
        report[name] = served(folder) | {"legality of the last rollouts": found[-1] if found else None}
        print(name, report[name], flush=True)
    return report


def speed(output: Path, seed: int, steps: int = 8) -> dict:
    """Seconds per step and the share of rollouts in it, 8 users per step."""
    world, data, policy = supervised(output, seed)
    model, report = Recommender.from_pretrained(policy).model, {}
    reward = true_reward(world, data, model.catalogue)
    cases = [("beam", 32), ("beam", 128), ("beam", 512), ("sample", 128), ("tree", 128), ("unconstrained", 128)]
    for rollout, group in cases:
        settings = {"num_generations": group, "per_device_train_batch_size": 8 * group, "rollout": rollout}
        settings |= {"max_steps": steps, "logging_steps": 1, "sign_norm_steps": 0}
        found = train(output / "speed" / f"{rollout}_{group}", data, policy, [reward], seed, **settings)
        logs = [log for log in found["log"] if "step_time" in log][2:]
        step, rolled = (float(np.median([log[key] for log in logs])) for key in ("step_time", "rollout_seconds"))
        report[f"{rollout}, G={group}"] = {"step": step, "rollouts": rolled / step}
    return report


PARTS = {"legality": legality, "gradients": gradients, "ab": ab}
PARTS |= {"rollouts": rollouts, "searches": searches, "speed": speed}


def main(part: str, seeds: list[int], output: Path) -> None:
    for name in PARTS if part == "all" else {part} - {"plot", "table"}:
        for seed in seeds:
            report = PARTS[name](output / f"seed{seed}", seed)
            path = output / f"{name}_{seed}.json"
            path.write_text(json.dumps(report, indent=2))
    if part in ("plot", "all"):
        plot(output, seeds)
    if part in ("table", "all"):
        table(output, seeds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["all", *PARTS, "plot", "table"], default="all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/reinforcement"))
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    python_logging.getLogger("trl").setLevel(
        python_logging.ERROR
    )  # illegal samples have no reward: said for every batch
    main(**vars(parser.parse_args()))
