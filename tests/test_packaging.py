"""What a fresh machine relies on: pinned versions, the version number, no traces of real data."""

import configparser
import re
from pathlib import Path

import onerec_hf

ROOT = Path(__file__).resolve().parents[1]


def test_constraints_pin_every_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    wanted = config["options"]["install_requires"].split() + config["options.extras_require"]["train"].split()
    names = {re.split(r"[<>=!\[]", line)[0].lower().replace("-", "_") for line in wanted}
    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names <= pinned, names - pinned


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", onerec_hf.__version__)


def test_no_data_in_the_repository():
    """Real data are for research use or CC BY-SA: none of it may be here."""
    skipped = {".git", ".venv", "outputs", "build", "dist"}
    files = [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)]
    assert [path for path in files if path.suffix in (".parquet", ".csv", ".npy", ".arrow", ".pt", ".bin")] == []
    assert sum(path.stat().st_size for path in files if "egg-info" not in str(path)) < 20_000_000
