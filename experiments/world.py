"""The simulated world that the experiments share: its log, catalogue and truth, one reward model of watch time, one
way to align.

One seed is one world. What is trained reads the log; the simulator's expected feedback judges and is never trained on.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import numpy as np
import torch
from transformers import Trainer, TrainingArguments, set_seed

from onerec_hf import Catalogue, OneRecPScoreConfig, OneRecPScoreModel
from onerec_hf.collators import RewardCollator
from onerec_hf.data import load_interactions
from onerec_hf.semantic_ids import ResidualKMeans, resolve_collisions
from onerec_hf.simulator import ShortVideoWorld
from onerec_hf.trainers import IPAConfig, IPATrainer, OneRecSFTConfig, OneRecSFTTrainer

COLUMNS = {"user_id": "user_id", "item_id": "video_id", "timestamp": "time_ms"}
FEEDBACK = ["play_time_ms", "duration_ms", "long_view", "is_click", "is_like", "is_follow", "is_forward", "request_id"]
CODEBOOK_SIZES = [32] * 3
QUIET = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 50, "use_cpu": True}


class World:
    """
    A world of users and videos with its log. `draw_seed` is that of the log's chance and of the quantizer.

    Attributes:
        simulator (`ShortVideoWorld`): Knows the truth.
        log (`Interactions`): Every impression, all items of the world among its items.
        catalogue (`Catalogue`): Balanced 3 x 32 codes of the content embeddings.
        item_token_ids (`np.ndarray` of shape (N, 3)): Their token ids.
    """

    def __init__(self, seed: int, num_users: int, num_items: int, request_size: int = 5, draw_seed: int = 0):
        self.seed = seed
        self.simulator = ShortVideoWorld(num_users, num_items, request_size=request_size, seed=seed)
        items = self.simulator.items.rename(columns={"video_id": "item_id"})[["item_id"]]
        known = {"items": items, "items_columns": {"item_id": "item_id"}}
        self.log = load_interactions(self.simulator.logs(draw_seed), columns=COLUMNS, feedback=FEEDBACK, **known)
        embeddings = torch.from_numpy(self.simulator.content_embeddings[self.log.item_ids]).float()
        quantizer = ResidualKMeans(3, 32, balanced=True, seed=draw_seed)
        codes = resolve_collisions(quantizer.fit(embeddings).train_codes, quantizer, embeddings, policy="next_free")
        self.catalogue = Catalogue(codes, CODEBOOK_SIZES, self.log.item_ids)
        self.item_token_ids = codes.numpy() + np.array([4, 36, 68])

    def expected_feedback(self, users, items, times) -> dict[str, np.ndarray]:
        """The truth about items (B, k) shown to users (B,) at times (B,) or (B, k), in ms: arrays (B, k) by
        feedback.
        """
        times = np.asarray(times, dtype=np.int64)
        users = self.log.user_ids[np.asarray(users)][:, None]
        return self.simulator.expected_feedback(
            users, self.log.item_ids[items], times[:, None] if times.ndim == 1 else times
        )


def train_reward(
    log, rows, item_token_ids, *, max_history: int, batch_size: int, epochs: float, seed: int, **features
):
    """
    A P-Score of one objective, watch time as a share of the log's 95th percentile.

    Args:
        log: `Interactions` with the feedback `play_time_ms`.
        rows: What `session_splits` made of it: the candidates of a row are its targets.
        item_token_ids (`np.ndarray` of shape (N, L)): Of the items of the log.
        features: More categories of the candidates by name, (N,) each, beside the item itself.

    Returns:
        The model, its collator, and the cap in seconds: a reward of 1.
    """
    cap_ms = float(np.percentile(log.feedback["play_time_ms"], 95))
    collator = RewardCollator(
        item_token_ids,
        max_history=max_history,
        user_features={"user": np.arange(log.num_users)},
        targets=["swt"],
        session_wise=False,
        candidate_features={"item": np.arange(log.num_items) + 1, **features},
        label_settings={"watch_cap_ms": cap_ms},
    )
    set_seed(seed)
    sizes = {"user_features": collator.user_feature_sizes, "item_features": collator.item_feature_sizes}
    model = OneRecPScoreModel(OneRecPScoreConfig(codebook_sizes=CODEBOOK_SIZES, targets=["swt"], dropout=0.2, **sizes))
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            remove_unused_columns=False,
            num_train_epochs=epochs,
            per_device_train_batch_size=batch_size,
            learning_rate=2e-3,
            lr_scheduler_type="cosine",
            weight_decay=0.1,
            seed=seed,
            **QUIET,
        )
        Trainer(model, arguments, data_collator=collator, train_dataset=rows.with_format("numpy")).train()
    return model.eval(), collator, cap_ms / 1000


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's, of two arrays (N,)."""
    return float(np.corrcoef(left.argsort().argsort(), right.argsort().argsort())[0, 1])


def align(seed_model, collator, rows, folder: Path | str, settings: dict, seed: int, reward=None, pairs=None):
    """
    The seed model, trained further by IPA with a reward or with pairs, or by the supervised loss with neither.

    Returns:
        The aligned model, and what IPA logged.
    """
    model = type(seed_model)(seed_model.config)
    model.load_state_dict(seed_model.state_dict())
    model.catalogue = seed_model.catalogue
    settings = {"lr_scheduler_type": "constant", "seed": seed, **QUIET} | settings
    given = {"data_collator": collator, "train_dataset": rows}
    if reward is None and pairs is None:
        trainer = OneRecSFTTrainer(
            model, OneRecSFTConfig(str(folder), train_sampling_strategy="random", **settings), **given
        )
    else:
        trainer = IPATrainer(model, IPAConfig(str(folder), **settings), **given, reward=reward, pairs=pairs)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if any(name.startswith("ipa/") for name in entry)]
    return model.eval(), log


def first_pairs(folder: Path | str) -> datasets.Dataset:
    """The pairs that the first iteration of an IPA run in `folder` mined."""
    pairs = datasets.load_from_disk(f"{folder}/pairs/iteration_000")
    return datasets.Dataset.from_list(list(pairs)).select_columns(["row", "chosen", "rejected"])
