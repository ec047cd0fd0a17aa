"""A user's folder: two small tables, and the recipes with config files of the same names that are small enough for a
test.
"""

import runpy
import shlex
import sys
from pathlib import Path

import yaml

from onerec_hf.simulator import ShortVideoWorld

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"
# what makes the config files small enough for a test; everything else in them stays as it is
TINY = {
    "mydata/prepare.yaml": {"codebook_size": 16, "collaborative_dim": 16},
    "mydata/reward.yaml": {"num_train_epochs": 1},
    "mydata/grpo.yaml": {"max_steps": 2, "logging_steps": 1},
    "mydata/lifelong_prepare.yaml": {"codebook_size": 16, "collaborative_dim": 16},
    "mydata/lifelong_sft.yaml": {"num_train_epochs": 1, "eval_users": 20, "model": {"lifelong_length": 100}},
    "small_sft.yaml": {"num_train_epochs": 1},
    "small_dpo.yaml": {"num_train_epochs": 1, "dpo_ratio": 0.3, "num_candidates": 20, "logging_steps": 1},
    "sasrec.yaml": {"fit": {"num_epochs": 1}},
}
BASELINES = ("popularity", "sasrec")  # of leaderboard.yaml


def make_desk(folder: Path) -> Path:
    """Writes `logs.parquet`, `items.parquet` and `recipes/` into a folder, and returns it."""
    world = ShortVideoWorld(num_users=60, num_items=80, num_days=10, mean_events=30, seed=3)
    log = world.logs().rename(columns={"video_id": "item_id", "time_ms": "timestamp"})
    log.to_parquet(folder / "logs.parquet")
    world.items.rename(columns={"video_id": "item_id"}).to_parquet(folder / "items.parquet")
    (folder / "recipes" / "configs" / "mydata").mkdir(parents=True)
    for path in RECIPES.glob("*.py"):
        (folder / "recipes" / path.name).symlink_to(path)
    small = {name: merged(config(name), own) for name, own in TINY.items()}
    entries = config("leaderboard.yaml")
    small["leaderboard.yaml"] = {name: entries[name] | {"seeds": [0]} for name in BASELINES}
    small["leaderboard.yaml"]["sasrec"]["fit"] = TINY["sasrec.yaml"]["fit"]
    for name, settings in small.items():
        (folder / "recipes" / "configs" / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
    return folder


def merged(settings: dict, changes: dict) -> dict:
    """Settings with changes, those of the model one by one."""
    model = settings.get("model", {}) | changes.get("model", {})
    return settings | changes | ({"model": model} if model else {})


def config(name: str) -> dict:
    """A config file of the recipes as it is."""
    return yaml.safe_load((RECIPES / "configs" / name).read_text(encoding="utf-8"))


def run(line: str, monkeypatch) -> None:
    """A command in this process, which has imported everything already; `accelerate launch` of one process is the
    script itself.
    """
    words = shlex.split(line)
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    if words[0] == "-c":
        exec(words[1], {})
        return
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")
