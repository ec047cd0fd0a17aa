"""Iterative Preference Alignment in a simulated world, where the truth is known: what IPA, plain DPO and the losses of Table 1 do.

    OMP_NUM_THREADS=1 python benchmarks/ipa.py --seed 0 --output outputs/ipa_0.json     # and seeds 1, 2
    python benchmarks/ipa.py --summary outputs/ipa_*.json

One seed is one world, one log, one reward model and one OneRec-V2. The reward model (P-Score with the one objective watch time) is
trained on the logged feedback before each user's validation event; the seed model by SFT on long views. Every system starts from
the seed model and has the same number of steps. The simulator's expected watch time is never trained on, nor used for a choice: it
judges the lists of the test split. `reward model` is what the model that picked the pairs says about the same lists.
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
from transformers import Trainer, TrainingArguments, set_seed

from onerec_hf import Catalogue, OneRecPScoreConfig, OneRecPScoreModel, OneRecV2Config, OneRecV2ForCausalLM
from onerec_hf.data import (
    OneRecCollator,
    RewardCollator,
    SessionConfig,
    leave_last_out,
    load_interactions,
    session_splits,
)
from onerec_hf.evaluation import evaluate
from onerec_hf.recommender import ItemRanker
from onerec_hf.rewards import reward_of_model
from onerec_hf.semantic_ids import ResidualKMeans, resolve_collisions
from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.trainers import IPAConfig, IPATrainer, OneRecSFTConfig, OneRecSFTTrainer

MODEL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
MODEL |= {"context_embed_dim": 32, "context_key_value_split": 2, "dropout": 0.2}
FEEDBACK = ["play_time_ms", "duration_ms", "long_view", "is_like", "is_follow", "is_forward", "request_id"]
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 50, "use_cpu": True}


class Setting:
    """World, log, splits, catalogue and collators of one seed."""

    def __init__(self, seed: int, num_users: int, num_items: int):
        self.seed = seed
        self.world = ShortVideoWorld(num_users=num_users, num_items=num_items, seed=seed)
        columns = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
        items = self.world.items.rename(columns={"video_id": "item_id"})[["item_id"]]
        self.log = load_interactions(
            self.world.logs(seed),
            columns=columns,
            feedback=FEEDBACK,
            items=items,
            items_columns={"item_id": "item_id"},
        )
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
        embeddings = torch.from_numpy(self.world.content_embeddings[self.log.item_ids]).float()
        quantizer = ResidualKMeans(3, 32, balanced=True, seed=seed)
        codes = resolve_collisions(quantizer.fit(embeddings).train_codes, quantizer, embeddings, policy="next_free")
        self.catalogue = Catalogue(codes, [32] * 3, self.log.item_ids)
        self.item_token_ids = codes.numpy() + np.array([4, 36, 68])
        self.collator = OneRecCollator(self.item_token_ids, max_history=20)
        # the time of each user's last and next-to-last long view: test and validation events, where there are so many
        end, count = self.views.user_offsets[1:], np.diff(self.views.user_offsets)
        self.test_time = {u: self.views.timestamp[end[u] - 1] for u in np.flatnonzero(count).tolist()}
        before = self.views.timestamp[np.maximum(end - 2, 0)]
        self.validation_time = np.where(count >= 2, before, np.inf)

    def true_watch_time(self, users, items) -> np.ndarray:
        """Expected seconds (B, k) of showing each user the items (B, k) at the time of the test event."""
        times = np.array([self.test_time[user] for user in users])
        shown = self.world.expected_feedback(
            self.log.user_ids[users][:, None], self.log.item_ids[items], times[:, None]
        )
        return shown["play_time_ms"] / 1000

    def policy(self, state=None) -> OneRecV2ForCausalLM:
        set_seed(self.seed)
        model = OneRecV2ForCausalLM(OneRecV2Config(codebook_sizes=[32] * 3, **MODEL))
        model.catalogue = self.catalogue
        if state is not None:
            model.load_state_dict(state)
        return model.eval()


def train_reward(setting: Setting, epochs: float):
    """P-Score of one objective: watch time as a share of the log's 95th percentile."""
    every = {"min_watched": 0, "min_watch_time_ms": 0, "min_interactions": 0, "cut": "first", "max_events": 1}
    config = SessionConfig(
        request="request_id", watched={"long_view": 1}, interactions={}, max_history=20, min_history=0, **every
    )
    rows = datasets.concatenate_datasets(list(session_splits(setting.log, config).values())).with_format("numpy")
    known = np.flatnonzero(rows["session_start"][:] < setting.validation_time[rows["user"][:]])
    cap = float(np.percentile(setting.log.feedback["play_time_ms"], 95))
    duration = np.zeros(setting.log.num_items)
    duration[setting.log.item_index] = setting.log.feedback["duration_ms"]
    collator = RewardCollator(
        setting.item_token_ids,
        max_history=20,
        user_features={"user": np.arange(setting.log.num_users)},
        targets=["swt"],
        session_wise=False,
        candidate_features={
            "item": np.arange(setting.log.num_items) + 1,
            "duration": np.digitize(duration, np.percentile(duration, np.arange(5, 100, 5))),
        },
        label_settings={"watch_cap_ms": cap},
    )
    set_seed(setting.seed)
    model = OneRecPScoreModel(
        OneRecPScoreConfig(
            codebook_sizes=[32] * 3,
            targets=["swt"],
            user_features=collator.user_feature_sizes,
            item_features=collator.item_feature_sizes,
            dropout=0.2,
        )
    )
    arguments = TrainingArguments(
        "unused",
        remove_unused_columns=False,
        num_train_epochs=epochs,
        per_device_train_batch_size=512,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        seed=setting.seed,
        **QUIET,
    )
    Trainer(model, arguments, data_collator=collator, train_dataset=rows.select(known)).train()
    return model.eval(), collator, cap / 1000


@torch.no_grad()
def judge(setting: Setting, model, reward_model, reward_collator, cap: float, ranker=None) -> dict:
    """Truth, the reward model's opinion and recall of the ten best items of every test user; entropy per level in nats."""
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
    """The beams of a model in the order of the reward model: best of N, N generations and a reward model for every request."""

    def __init__(self, model, collator, num_candidates: int, reward_model, reward_collator):
        super().__init__(model, collator, num_candidates)
        self.reward_model, self.reward_collator = reward_model, reward_collator

    @torch.no_grad()
    def search(self, rows, k, allowed=None, num_beams=None):
        items, _ = super().search(rows, self.num_beams, allowed, num_beams)
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
        both = (reward_model(**batch).rewards[0].numpy(), setting.true_watch_time([row["user"]], items[None])[0])
        ranks = [values.argsort().argsort() for values in both]
        found.append(np.corrcoef(*ranks)[0, 1])
    return float(np.mean(found))


def logged_pairs(setting: Setting) -> datasets.Dataset:
    """Chosen: the long view that a training row ends with; rejected: what the same request showed and the user watched least."""
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


def align(setting: Setting, state, folder: Path, settings: dict, reward=None, pairs=None):
    """One system: the seed model, trained further."""
    model = setting.policy(state)
    common = {"per_device_train_batch_size": 32, "lr_scheduler_type": "constant", "seed": setting.seed, **QUIET}
    if reward is None and pairs is None:
        args = OneRecSFTConfig(str(folder), train_sampling_strategy="random", **common | settings)
        trainer = OneRecSFTTrainer(model, args, data_collator=setting.collator, train_dataset=setting.train)
    else:
        args = IPAConfig(str(folder), **common | settings)
        trainer = IPATrainer(
            model, args, data_collator=setting.collator, train_dataset=setting.train, reward=reward, pairs=pairs
        )
    start = time.perf_counter()
    trainer.train()
    log = [record for record in trainer.state.log_history if any(name.startswith("ipa/") for name in record)]
    return model, {"seconds": time.perf_counter() - start, "log": log}


def systems(setting: Setting, arguments) -> dict[str, dict]:
    """Name -> settings; `pairs` says where they come from: mined in every iteration, in the first one, logged, or nowhere."""
    base = {"num_train_epochs": arguments.iterations, "learning_rate": arguments.learning_rate}
    pairs = base | {
        "dpo_ratio": arguments.dpo_ratio,
        "num_candidates": arguments.num_candidates,
        "preference_weight": arguments.preference_weight,
        "kl_users": 256,
    }
    found = {"SFT, more steps": base | {"pairs": None}, "IPA (iterated DPO)": pairs | {"pairs": "mined"}}
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
    reward_model, reward_collator, cap = train_reward(setting, arguments.reward_epochs)
    seed_model = setting.policy()
    training = OneRecSFTConfig(
        "unused",
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
    state = {name: tensor.clone() for name, tensor in seed_model.state_dict().items()}
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
    reward = reward_of_model(reward_model, reward_collator, seed_model, arguments.num_candidates)
    first = {}  # num_rejected -> pairs that the seed model's beams give
    for name, settings in systems(setting, arguments).items():
        source, count = settings.pop("pairs"), settings.get("num_rejected", 1)
        with TemporaryDirectory() as folder:
            pairs = logged_pairs(setting) if source == "logged" else None
            if source == "first":
                if count not in first:
                    align(setting, state, Path(folder), settings | {"max_steps": 1}, reward)
                    first[count] = list(datasets.load_from_disk(f"{folder}/pairs/iteration_000"))
                pairs = datasets.Dataset.from_list(first[count]).select_columns(["row", "chosen", "rejected"])
            model, details = align(
                setting, state, Path(folder), settings, reward if source == "mined" else None, pairs
            )
        report["systems"][name] = judge(setting, model, *judged) | details
        print(name, json.dumps({k: v for k, v in report["systems"][name].items() if k != "log"}), flush=True)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2))
    return report


def summary(files: list[Path]) -> str:
    """Markdown table over seeds: mean and standard deviation; `change` is that of the true watch time against the seed model."""
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
