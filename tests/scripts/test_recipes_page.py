"""recipes/README.md as a person follows it: its commands, in order and as printed, from two tables to a model that
serves.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

from onerec_hf.data import load_splits
from onerec_hf.recommender import Recommender
from onerec_hf.simulator import ShortVideoWorld

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
# what makes the page's config files small enough for a test; everything else in them stays as it is
TINY = {
    "mydata/prepare.yaml": {"codebook_size": 16, "collaborative_dim": 16},
    "mydata/reward.yaml": {"num_train_epochs": 1},
    "mydata/grpo.yaml": {"max_steps": 2, "logging_steps": 1},
    "mydata/lifelong_prepare.yaml": {"codebook_size": 16, "collaborative_dim": 16},
    "mydata/lifelong_sft.yaml": {"num_train_epochs": 1, "eval_users": 20},
    "small_sft.yaml": {"num_train_epochs": 1},
    "small_dpo.yaml": {"num_train_epochs": 1, "dpo_ratio": 0.3, "num_candidates": 20, "logging_steps": 1},
    "sasrec.yaml": {"fit": {"num_epochs": 1}},
}
SETTINGS = yaml.safe_load((RECIPES / "configs" / "mydata" / "prepare.yaml").read_text())
BASELINES = ("popularity", "sasrec")  # of leaderboard.yaml


def commands() -> list[str]:
    """Every command of the page, the lines of a long one put together as a shell does it."""
    blocks = re.findall(r"```bash\n(.*?)```", (RECIPES / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def scripts() -> list[str]:
    return [name for line in commands() for name in re.findall(r"recipes/(\w+)\.py", line)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the user's two tables, and `recipes/` with small configs of the same names."""
    world = ShortVideoWorld(num_users=60, num_items=80, num_days=10, mean_events=30, seed=3)
    log = world.logs().rename(columns={"video_id": "item_id", "time_ms": "timestamp"})
    log.to_parquet(tmp_path / "logs.parquet")
    world.items.rename(columns={"video_id": "item_id"}).to_parquet(tmp_path / "items.parquet")
    (tmp_path / "recipes" / "configs" / "mydata").mkdir(parents=True)
    for path in RECIPES.glob("*.py"):
        (tmp_path / "recipes" / path.name).symlink_to(path)
    small = {name: yaml.safe_load((RECIPES / "configs" / name).read_text()) | own for name, own in TINY.items()}
    entries = yaml.safe_load((RECIPES / "configs" / "leaderboard.yaml").read_text())
    small["leaderboard.yaml"] = {name: entries[name] | {"seeds": [0]} for name in BASELINES}
    small["leaderboard.yaml"]["sasrec"]["fit"] = TINY["sasrec.yaml"]["fit"]
    for name, settings in small.items():
        (tmp_path / "recipes" / "configs" / name).write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line: str, monkeypatch) -> None:
    """In this process, which has imported everything already; `accelerate launch` of one process is the script
    itself.
    """
    words = shlex.split(line)
    words = words[2:] if words[:2] == ["accelerate", "launch"] else words[1:]
    if words[0] == "-c":
        exec(words[1], {})
        return
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(words[0], run_name="__main__")


def test_the_page_names_every_recipe():
    recipes = {path.stem for path in RECIPES.glob("*.py") if "__main__" in path.read_text()}
    assert recipes - set(scripts()) == {"quickstart", "ab_test"}  # of simulated worlds
    assert scripts()[0] == "prepare" and scripts()[-1] == "recommend"


def test_the_readme_begins_the_same_way():
    lines = re.findall(r"^(?:python|accelerate launch) recipes/.*$", (ROOT / "README.md").read_text(), re.M)
    assert lines == commands()[: len(lines)] and len(lines) == 3


def test_the_commands_run_as_printed(desk, hub, monkeypatch):
    *lines, last = commands()
    for line in lines:
        run(line, monkeypatch)
    assert last.startswith("accelerate launch ")  # this one as a shell runs it, from the Hub
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | hub.environment(desk / "home") | {"PYTHONPATH": str(ROOT), "PATH": path}
    result = subprocess.run(last, shell=True, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr

    # what was chosen, before the dates that are held out, and every impression before them
    log, data = pd.read_parquet("logs.parquet"), desk / "outputs" / "mydata"
    before = log.timestamp < SETTINGS["validation_start"]
    train = load_splits(data)["train"]
    assert sum(map(len, train["history"])) == (before & (log.long_view == 1)).sum()
    from onerec_hf.scripts import grpo

    served = Recommender.from_pretrained(desk / "outputs" / "mymodel")
    settings = yaml.safe_load((RECIPES / "configs" / "mydata" / "grpo.yaml").read_text())
    arguments = {name: settings[name] for name in ("columns", "watched", "end")}
    arguments = grpo.RLArguments(policy="", data=str(data), exposures="logs.parquet", **arguments)
    exposures = grpo.load_exposures(arguments, served.model.catalogue, served.ranker.collator)
    assert sum(map(len, exposures["targets"])) == before.sum() < len(log)

    policy, reward = (AutoConfig.from_pretrained(desk / "outputs" / name) for name in ("mymodel", "reward"))
    assert policy.catalogue_fingerprint == reward.catalogue_fingerprint is not None
    for name in ("mymodel", "aligned", "reinforced", "sasrec", "reward"):
        report = json.loads((desk / "outputs" / name / "metrics.json").read_text())
        assert report["num_parameters"] > 0 and report["test"]
    assert "| popularity | 1 |" in (desk / "outputs" / "leaderboard" / "leaderboard.md").read_text()
    repository = hub.repos["org/mymodel"]
    assert repository.private and len(repository.commits) == 1
    card = ModelCard(repository.branches["main"]["README.md"].decode())
    for words in ("| mymodel | 0.", "| sasrec | 0.", "Iterative Preference Alignment", 'repo = "org/mymodel"'):
        assert words in card.text, words
    served = datasets.Dataset.from_parquet(str(desk / "outputs" / "recommended" / "part-00000-of-00001.parquet"))
    asked = datasets.Dataset.from_parquet(str(desk / "histories.parquet"))
    assert served["user_id"][:] == asked["user_id"][:] and len(served) > 40
    known = set(AutoTokenizer.from_pretrained(desk / "outputs" / "mymodel").catalogue.item_ids.tolist())
    assert all(len(set(row)) == 20 and set(row) <= known for row in served["item_ids"])
