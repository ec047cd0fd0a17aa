"""Counts what a reader walks through: the files of this package that run for one step, and the moves between them.

    python tests/walks.py

A file counts where one of its functions runs; a move is a call from a function of one file to a function of another.
What runs inside torch, transformers or TRL in between does not count. Set-up (loading, building a trainer) is not part
of a walk.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from onerec_hf.collators import OneRecCollator  # noqa: E402
from onerec_hf.recommender import ItemRanker, Recommender  # noqa: E402
from onerec_hf.rewards import HitReward  # noqa: E402
from onerec_hf.trainers import (  # noqa: E402
    IPAConfig,
    IPATrainer,
    OneRecGRPOConfig,
    OneRecGRPOTrainer,
    OneRecSFTConfig,
    OneRecSFTTrainer,
)
from tests.tiny import tiny_catalogue, tiny_model  # noqa: E402

PACKAGE = str(ROOT / "onerec_hf")


class Walk:
    """Records calls between files of the package while it is on."""

    def __init__(self):
        self.files: list[str] = []
        self.moves = 0

    def __enter__(self):
        sys.setprofile(self._event)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)

    def _event(self, frame, event, argument):
        if event != "call" or not (name := frame.f_code.co_filename).startswith(PACKAGE):
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if name not in self.files:
            self.files.append(name)
        self.moves += caller is None or caller.f_code.co_filename != name


class Step(TrainerCallback):
    """Records the second step of a training, when everything is built."""

    def __init__(self, walk: Walk):
        self.walk = walk

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.walk.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        self.walk.__exit__()


def setting():
    catalogue = tiny_catalogue()
    model = tiny_model(catalogue)
    tokens = catalogue.semantic_ids.numpy() + np.array(model.config.level_offsets)
    rows = [
        {"user": i, "history": list(range(i, i + 6)), "target_ids": tokens[i + 7].tolist(), "length": 6}
        for i in range(16)
    ]
    return model, OneRecCollator(tokens), datasets.Dataset.from_list(rows).with_format("numpy")


def arguments(folder: str) -> dict:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "report_to": "none",
        "use_cpu": True,
    } | {
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 100,
    }


def sft(walk: Walk, folder: str) -> None:
    model, collator, rows = setting()
    config = OneRecSFTConfig(**arguments(folder))
    OneRecSFTTrainer(
        model, config, data_collator=collator, train_dataset=rows.remove_columns("target_ids"), callbacks=[Step(walk)]
    ).train()


def recommendation(walk: Walk, folder: str) -> None:
    model, collator, _ = setting()
    recommender = Recommender(ItemRanker(model.eval(), collator))
    recommender.recommend([[1000, 1003]], k=5)
    with walk:
        recommender.recommend([[1000, 1003]], k=5)


def rl(walk: Walk, folder: str) -> None:
    model, collator, rows = setting()
    config = OneRecGRPOConfig(**arguments(folder) | {"per_device_train_batch_size": 8}, num_generations=4)
    OneRecGRPOTrainer(
        model, [HitReward()], config, train_dataset=rows, data_collator=collator, callbacks=[Step(walk)]
    ).train()


def ipa(walk: Walk, folder: str) -> None:
    """One iteration: candidates, rewards, pairs, and the steps on them."""
    model, collator, rows = setting()
    config = IPAConfig(**arguments(folder) | {"max_steps": -1, "num_train_epochs": 1}, num_candidates=8, dpo_ratio=0.5)
    trainer = IPATrainer(
        model,
        config,
        data_collator=collator,
        train_dataset=rows,
        reward=lambda completion_ids, **_: [x[0] for x in completion_ids],
    )
    with walk:
        trainer.train()


WALKS: dict[str, Callable] = {"SFT step": sft, "recommendation": recommendation, "RL step": rl, "IPA iteration": ipa}


def main() -> dict[str, Walk]:
    found = {}
    for name, run in WALKS.items():
        found[name] = Walk()
        with tempfile.TemporaryDirectory() as folder:
            run(found[name], folder)
    print("\n| walk | files | moves | which |\n|---|---|---|---|")
    for name, walk in found.items():
        names = ", ".join(f"`{Path(file).relative_to(PACKAGE)}`" for file in walk.files)
        print(f"| {name} | {len(walk.files)} | {walk.moves} | {names} |")
    return found


if __name__ == "__main__":
    main()
