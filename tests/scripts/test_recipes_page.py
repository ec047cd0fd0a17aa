"""recipes/README.md as a person follows it: its commands, in order and as printed, from two tables to a model that
serves.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pandas as pd
import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

from onerec_hf.data import load_splits
from onerec_hf.recommender import Recommender

from ..recipe_desk import RECIPES, ROOT, config, make_desk, run

SETTINGS = config("mydata/prepare.yaml")


def commands() -> list[str]:
    """Every command of the page, the lines of a long one put together as a shell does it."""
    blocks = re.findall(r"```bash\n(.*?)```", (RECIPES / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.replace("\\\n", "").splitlines()]


def scripts() -> list[str]:
    return [name for line in commands() for name in re.findall(r"recipes/(\w+)\.py", line)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with the user's two tables, and `recipes/` with small configs of the same names."""
    monkeypatch.chdir(tmp_path)
    return make_desk(tmp_path)


def test_the_page_names_every_recipe():
    recipes = {path.stem for path in RECIPES.glob("*.py") if "__main__" in path.read_text()}
    others = {
        "quickstart",
        "ab_test",
        "loop",
        "serve",
        "demo",
        "export",
    }  # of simulated worlds; services, other runtimes
    assert recipes - set(scripts()) == others
    assert scripts()[0] == "prepare" and scripts()[-1] == "recommend"


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
    settings = config("mydata/grpo.yaml")
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
