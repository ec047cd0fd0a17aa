"""Iterative Preference Alignment in a simulated world, where the truth is known: what IPA, plain DPO and the losses of
Table 1 do.

    OMP_NUM_THREADS=1 python experiments/ipa.py --seed 0 --output outputs/ipa_0.json     # and seeds 1, 2
    python experiments/ipa.py --summary outputs/ipa_*.json

One seed is one world, one log, one reward model and one OneRec-V2. The reward model (P-Score with the one objective
watch time) is trained on the logged feedback before each user's validation event; the seed model by SFT on long views.
Every system starts from the seed model and has the same number of steps. The simulator's expected watch time is never
trained on, nor used for a choice: it judges the lists of the test split. `reward model` is what the model that picked
the pairs says about the same lists.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from transformers import set_seed
from world import CODEBOOK_SIZES, QUIET, World, align, first_pairs, rank_correlation, train_reward

from onerec_hf import OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.collators import OneRecCollator
from onerec_hf.data import SessionConfig, leave_last_out, session_splits
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import ItemRanker
from onerec_hf.rewards import reward_of_model
from onerec_hf.trainers import OneRecSFTConfig, OneRecSFTTrainer

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"context_embed_dim": 32, "context_key_value_split": 2, "dropout": 0.2}


class Setting(World):
    """A world with the splits of its long views and their collator."""

    def __init__(self, seed: int, num_users: int, num_items: int):
        super().__init__(seed, num_users, num_items, draw_seed=seed)
        long = self.log.feedback["long_view"] == 1
        self.views = replace(
            self.log,
            user_index=self.log.user_index[long],
            item_index=self.log.item_index[long],
            timestamp=self.log.timestamp[long],
            feedback={},
        )
        splits = leave_last_out(self.views)
        self.train = splits["train"].filter(lambda row: len(row["history"]) > 1)
        self.test = splits["test"].filter(lambda row: len(row["history"]) > 2)
        self.collator = OneRecCollator(self.item_token_ids, max_history=20)
        # the time of each user's last and next-to-last long view: test and validation events, where there are so many
        end, count = self.views.user_offsets[1:], np.diff(self.views.user_offsets)
        self.test_time = {u: self.views.timestamp[end[u] - 1] for u in np.flatnonzero(count).tolist()}
        before = self.views.timestamp[np.maximum(end - 2, 0)]
        self.validation_time = np.where(count >= 2, before, np.inf)

    def true_watch_time(self, users, items) -> np.ndarray:
        """Expected seconds (B, k) of showing each user the items (B, k) at the time of the test event."""
        times = np.array([self.test_time[user] for user in users])
        return self.expected_feedback(users, items, times)["play_time_ms"] / 1000

    def policy(self) -> OneRecV2ForCausalLM:
        """An untrained model."""
        set_seed(self.seed)
        model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=CODEBOOK_SIZES, **MODEL))
        model.catalogue = self.catalogue
        return model.eval()


def reward_before(log, item_token_ids: np.ndarray, time: np.ndarray, seed: int, epochs: float):
    """The reward model of watch time, from each user's impressions before their own `time` (U,), in ms."""
    every = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "cut": "first", "max_events": 1}
    config = SessionConfig(
        request="request_id", watched={"long_view": 1}, interactions={}, max_history=20, min_history=0, **every
    )
    rows = datasets.concatenate_datasets(list(session_splits(log, config).values())).with_format("numpy")
    known = np.flatnonzero(rows["session_start"][:] < time[rows["user"][:]])
    duration = np.zeros(log.num_items)
    duration[log.item_index] = log.feedback["duration_ms"]
    classes = np.digitize(duration, np.percentile(duration, np.arange(5, 100, 5)))
    settings = {"max_history": 20, "batch_size": 512, "epochs": epochs, "seed": seed, "duration": classes}
    return train_reward(log, rows.select(known), item_token_ids, **settings)


@torch.no_grad()
def judge(setting: Setting, model, reward_model, reward_collator, cap: float, ranker=None) -> dict:
    """Truth, the reward model's opinion and recall of the ten best items of every test user; entropy per level in
    nats.
    """
    model.eval()
    result = evaluate(
        ranker or ItemRanker(model, setting.collator, 50),
        setting.test,
        num_items=setting.log.num_items,
        progress=False,
    )
    users, lists = result.user, result.predictions[:, :10]
    truth = setting.true_watch_time(users, lists)
    opinion, entropy = [], []
    for start in range(0, len(setting.test), 200):
        rows = [setting.test[i] for i in range(start, min(start + 200, len(setting.test)))]
        candidates = [row | {"targets": items} for row, items in zip(rows, lists[start : start + 200].tolist())]
        batch = reward_collator.context(rows) | reward_collator.candidates(candidates)
        opinion.append(reward_model(**batch).rewards * cap)
        batch = setting.collator(rows)
        tokens = torch.nn.functional.pad(batch.pop("target_ids")[:, 0], (1, 0), value=model.config.bos_token_id)
        batch.pop("target_positions")
        log_probs = model(input_ids=tokens[:, :-1], **batch).logits.log_softmax(-1)
        entropy.append(-(log_probs.exp() * log_probs.clamp(min=-1e4)).sum(-1))
    return {
        "true watch time @1": truth[:, 0].mean(),
        "true watch time @10": truth.mean(),
        "true watch time max@10": truth.max(1).mean(),
        "reward model @10": torch.cat(opinion).mean().item(),
        "recall@10": result.metrics["recall@10"],
        "coverage@10": float(len(np.unique(lists)) / setting.log.num_items),
        "entropy": torch.cat(entropy).mean(0).tolist(),
    }


class Reranker(ItemRanker):
    """The beams of a model in the order of the reward model: best of N, N generations and a reward model for every
    request.
    """

    def __init__(self, model, collator, num_candidates: int, reward_model, reward_collator):
        super().__init__(model, collator, num_candidates)
        self.reward_model, self.reward_collator = reward_model, reward_collator

    @torch.no_grad()
    def search(self, rows, k, allowed_items=None, num_beams=None):
        items, _ = super().search(rows, self.num_beams, allowed_items, num_beams)
        candidates = [row | {"targets": own} for row, own in zip(rows, items.tolist())]
        batch = self.reward_collator.context(rows) | self.reward_collator.candidates(candidates)
        best = self.reward_model(**batch).rewards.topk(k, dim=1)
        return items.gather(1, best.indices), best.values


@torch.no_grad()
def reward_quality(setting: Setting, reward_model, reward_collator, num_users: int = 100) -> float:
    """Rank correlation of the reward model with the truth over all items, mean over test users."""
    items, found = np.arange(setting.log.num_items), []
    for row in setting.test.select(range(min(num_users, len(setting.test)))):
        batch = reward_collator.context([row]) | reward_collator.candidates([row | {"targets": items}])
        truth = setting.true_watch_time([row["user"]], items[None])[0]
        found.append(rank_correlation(reward_model(**batch).rewards[0].numpy(), truth))
    return float(np.mean(found))


def logged_pairs(setting: Setting) -> datasets.Dataset:
    """Chosen: the long view that a training row ends with; rejected: what the same request showed and the user watched
    least.
    """
    log, pairs = setting.log, []
    request, play = log.feedback["request_id"], log.feedback["play_time_ms"]
    for i, row in enumerate(setting.train):
        events = np.arange(*log.user_offsets[row["user"] : row["user"] + 2])
        last = events[
            (log.timestamp[events] == row["timestamp"][-1]) & (log.item_index[events] == row["history"][-1])
        ][0]
        others = events[(request[events] == request[last]) & (log.feedback["long_view"][events] == 0)]
        if len(others):
            worst = others[play[others].argmin()]
            both = (setting.item_token_ids[log.item_index[e]].tolist() for e in (last, worst))
            pairs.append(dict(zip(("row", "chosen", "rejected"), (i, *both))))
    return datasets.Dataset.from_list(pairs)


def systems(setting: Setting, arguments) -> dict[str, dict]:
    """Name -> settings; `pairs` says where they come from: mined in every iteration, in the first one, logged, or
    nowhere.
    """
    base = {"num_train_epochs": arguments.iterations, "learning_rate": arguments.learning_rate}
    base |= {"per_device_train_batch_size": 32}
    pairs = base | {
        "dpo_ratio": arguments.dpo_ratio,
        "num_candidates": arguments.num_candidates,
        "preference_weight": arguments.preference_weight,
        "kl_users": 256,
    }
    found = {"SFT, the same number of steps": base | {"pairs": None}, "IPA (iterated DPO)": pairs | {"pairs": "mined"}}
    found["DPO, logged pairs"] = pairs | {"pairs": "logged"}
    for loss_type in ("dpo", "ipo", "cdpo", "rdpo", "cpo", "simpo"):
        found[f"{loss_type}, pairs of the seed model"] = pairs | {"pairs": "first", "loss_type": loss_type}
    found["sdpo, pairs of the seed model"] = pairs | {"pairs": "first", "loss_type": "sdpo", "num_rejected": 3}
    for ratio in arguments.ratios:
        found[f"IPA, dpo_ratio {ratio:g}"] = pairs | {"pairs": "mined", "dpo_ratio": ratio}
    return {name: s for name, s in found.items() if not arguments.only or any(part in name for part in arguments.only)}


def main(arguments) -> dict:
    """Runs every system of one seed; writes and returns the report."""
    torch.set_num_threads(1)
    setting = Setting(arguments.seed, arguments.num_users, arguments.num_items)
    print(f"{len(setting.log)} impressions, {len(setting.views)} long views, {len(setting.train)} rows", flush=True)
    before = (setting.log, setting.item_token_ids, setting.validation_time, setting.seed)
    reward_model, reward_collator, cap = reward_before(*before, arguments.reward_epochs)
    seed_model = setting.policy()
    with TemporaryDirectory() as folder:
        training = OneRecSFTConfig(
            folder,
            num_train_epochs=arguments.sft_epochs,
            per_device_train_batch_size=64,
            learning_rate=3e-3,
            adam_beta2=0.98,
            weight_decay=0.1,
            lr_scheduler_type="cosine",
            warmup_steps=20,
            train_sampling_strategy="random",
            seed=arguments.seed,
            **QUIET,
        )
        OneRecSFTTrainer(seed_model, training, data_collator=setting.collator, train_dataset=setting.train).train()
    judged = (reward_model, reward_collator, cap)
    quality = reward_quality(setting, reward_model, reward_collator)
    report = {
        "reward model, rank correlation with the truth": quality,
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "systems": {},
    }
    report["systems"]["seed model (SFT)"] = judge(setting, seed_model, *judged)
    best_of_n = Reranker(seed_model, setting.collator, arguments.num_candidates, reward_model, reward_collator)
    report["systems"]["seed model, re-ranked"] = judge(setting, seed_model, *judged, ranker=best_of_n)
    print(f"reward model: rank correlation with the truth {quality:.3f}", json.dumps(report["systems"]), flush=True)
    reward = reward_of_model(reward_model, reward_collator, seed_model)
    first = {}  # num_rejected -> pairs that the seed model's beams give
    given = seed_model, setting.collator, setting.train
    for name, settings in systems(setting, arguments).items():
        source, count, start = settings.pop("pairs"), settings.get("num_rejected", 1), time.perf_counter()
        with TemporaryDirectory() as folder:
            pairs = logged_pairs(setting) if source == "logged" else None
            if source == "first":
                if count not in first:
                    align(*given, folder, settings | {"max_steps": 1}, setting.seed, reward)
                    first[count] = first_pairs(folder)
                pairs = first[count]
            model, log = align(*given, folder, settings, setting.seed, reward if source == "mined" else None, pairs)
        details = {"seconds": time.perf_counter() - start, "log": log}
        report["systems"][name] = judge(setting, model, *judged) | details
        print(name, json.dumps({k: v for k, v in report["systems"][name].items() if k != "log"}), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2))
    return report


def summary(files: list[Path]) -> str:
    """Markdown table over seeds: mean and standard deviation; `change` is that of the true watch time against the seed
    model.
    """
    reports = [json.loads(file.read_text())["systems"] for file in files]
    seed_model = next(iter(reports[0]))
    columns = [
        "true watch time @1",
        "true watch time @10",
        "true watch time max@10",
        "reward model @10",
        "recall@10",
        "coverage@10",
    ]
    lines = [
        "| system | " + " | ".join([*columns, "change @1, @10", "entropy per level", "KL to the seed model"]) + " |"
    ]
    lines.append("|---" * (len(columns) + 4) + "|")
    for name in reports[0]:
        found = [report[name] for report in reports if name in report]
        cells = []
        for column in columns:
            values = [f[column] for f in found]
            digits = 3 if "@10" in column and values[0] < 1 else 1
            cells.append(f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=len(values) > 1):.{digits}f}")
        changes = []
        for column in columns[:2]:
            ratio = [report[name][column] / report[seed_model][column] - 1 for report in reports if name in report]
            changes.append(f"{np.mean(ratio):+.1%} ± {np.std(ratio, ddof=len(ratio) > 1):.1%}")
        entropy = " / ".join(f"{value:.2f}" for value in np.mean([f["entropy"] for f in found], axis=0))
        kl = [f["log"][-1]["ipa/kl_to_seed"] for f in found if f.get("log")]
        cells += [", ".join(changes), entropy, f"{np.mean(kl):.2f}" if kl else "–"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_users", type=int, default=400)
    parser.add_argument("--num_items", type=int, default=300)
    parser.add_argument("--sft_epochs", type=float, default=15)
    parser.add_argument("--reward_epochs", type=float, default=2)
    parser.add_argument("--iterations", type=int, default=4)
    parser.add_argument("--dpo_ratio", type=float, default=1.0)
    parser.add_argument("--ratios", type=float, nargs="*", default=[0.25])
    parser.add_argument("--num_candidates", type=int, default=64)
    parser.add_argument("--preference_weight", type=float, default=5.0)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--only", nargs="*", help="Run the systems whose name contains one of these.")
    parser.add_argument("--output", type=Path, default=Path("outputs/ipa.json"))
    parser.add_argument("--summary", type=Path, nargs="+", help="Print the table of these reports and stop.")
    arguments = parser.parse_args()
    if arguments.summary:
        print(summary(arguments.summary))
    else:
        main(arguments)
