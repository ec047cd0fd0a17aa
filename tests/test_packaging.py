"""What a fresh machine relies on: pinned versions, the version number, no traces of real data."""

import configparser
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import datasets
import pytest
import yaml

import onerec_hf
from onerec_hf._registration import CONFIGS
from onerec_hf.hub.cards import PAPERS

ROOT = Path(__file__).resolve().parents[1]


def test_constraints_pin_every_dependency():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = config["options.extras_require"]
    installed = ("train", "serve", "demo", "docs", "export", "ray", "torchao")
    wanted = [
        name for line in (config["options"]["install_requires"], *map(extras.get, installed)) for name in line.split()
    ]
    names = {re.split(r"[<>=!\[]", line)[0].lower().replace("-", "_") for line in wanted} - {"onerec_hf"}
    pinned = {
        line.split("==")[0].lower().replace("-", "_") for line in (ROOT / "constraints.txt").read_text().splitlines()
    }
    assert names <= pinned, names - pinned


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", onerec_hf.__version__)


def test_no_data_in_the_repository():
    """Real data are for research use or CC BY-SA: none of it may be here."""
    skipped = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", "outputs", "build", "dist"}
    files = [path for path in ROOT.rglob("*") if path.is_file() and not skipped & set(path.relative_to(ROOT).parts)]
    assert [path for path in files if path.suffix in (".parquet", ".csv", ".npy", ".arrow", ".pt", ".bin")] == []
    assert sum(path.stat().st_size for path in files if "egg-info" not in str(path)) < 20_000_000


# ---- wheel and sdist


def run(*command, python=sys.executable, **options):
    result = subprocess.run([python, *map(str, command)], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """sdist of the checked-out files, and the wheel that is built from what the sdist holds, as `python -m build` does
    it.
    """
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    for path in [*ROOT.glob("*.*"), ROOT / "LICENSE", *(ROOT / "onerec_hf").rglob("*")]:
        if path.is_file() and "__pycache__" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    run("-c", "from setuptools.build_meta import build_sdist; build_sdist('..')", cwd=source)
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    run(
        "-c",
        "from setuptools.build_meta import build_wheel; build_wheel('../..')",
        cwd=next((folder / "unpacked").iterdir()),
    )
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_distributions_hold_the_package_and_nothing_else(distributions):
    sdist, wheel = distributions
    package = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "onerec_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"onerec_hf/hub/card_template.md", "onerec_hf/hub/reward_card_template.md"} <= set(package)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in names if ".dist-info/" not in name} == package
    assert any(name.endswith("licenses/LICENSE") for name in names)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package | {"setup.cfg", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= names
    assert version_of(wheel) == onerec_hf.__version__ and version_of(sdist.with_suffix("")) == onerec_hf.__version__


def version_of(path: Path) -> str:
    return re.search(r"-(\d+\.\d+\.\d+)", path.name)[1]


INSTALLED = """
import pathlib, sys
import torch, transformers
import onerec_hf
assert onerec_hf.__file__.startswith(sys.argv[1]), onerec_hf.__file__
heavy = {"transformers.modeling_utils", "transformers.pipelines", "onerec_hf.models", "trl", "datasets"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from transformers import AutoConfig, AutoModel, AutoTokenizer
# a folder of a tokenizer alone: the stand-in is found by its name
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
assert type(tokenizer) is onerec_hf.SemanticIdTokenizer, type(tokenizer)
from transformers.pipelines import PIPELINE_REGISTRY
assert "onerec-recommendation" in PIPELINE_REGISTRY.get_supported_tasks()
sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
config = AutoConfig.for_model("onerec_v2", codebook_sizes=[4, 4], **sizes)
model = AutoModel.from_config(config)
model.catalogue = onerec_hf.Catalogue([[0, 1], [2, 3]], [4, 4])
assert model.generate(context_ids=torch.tensor([[[4, 9]]]), num_beams=2, num_return_sequences=2).shape == (2, 3)
from onerec_hf.hub import model_card
assert (pathlib.Path(onerec_hf.__file__).parent / "py.typed").is_file()
# the template is there
assert "# Tiny" in str(model_card(config, title="Tiny", repo="org/tiny", data="", training=""))
"""


def install(distribution, folder):
    """
    A new virtual environment that has torch, transformers and the rest from this one (they are gigabytes), and of ours
    the distribution alone: an editable install is a `.pth` file, which a path in another `.pth` file does not lead to.
    """
    run("-m", "venv", "--without-pip", folder / "venv")
    python = folder / "venv" / "bin" / "python"
    site = Path(run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python).strip())
    (site / "packages_of_the_test.pth").write_text(sysconfig.get_path("purelib"))
    # `python -I`: neither this folder, nor PYTHONPATH, nor a user's packages
    failed = subprocess.run([python, "-I", "-c", "import onerec_hf"], capture_output=True, text=True, cwd=folder)
    assert "No module named 'onerec_hf'" in failed.stderr
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
    run("-I", "-m", "pip", "install", *options, distribution, python=python, cwd=folder)
    return python, site


@pytest.fixture(scope="module")
def installed(distributions, tmp_path_factory):
    """The interpreter and the packages of an environment with the wheel."""
    return install(distributions[1], tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_installs_into_an_empty_environment_and_works(distributions, installed, tmp_path, kind):
    python, site = installed if kind == "wheel" else install(distributions[0], tmp_path)
    onerec_hf.SemanticIdTokenizer(codebook_sizes=[4, 4]).save_pretrained(tmp_path / "tokenizer")
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {str(f.relative_to(site)) for f in site.glob("onerec_hf/**/*.*") if f.suffix != ".pyc"}
    if kind == "wheel":  # the files of the other are the same
        run("-I", "-c", INSTALLED, site, tmp_path / "tokenizer", python=python, cwd=tmp_path)


TINY = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.slow
def test_from_a_log_to_recommendations_with_the_wheel_alone(installed, tmp_path):
    """What a person without a checkout types, in a folder of their own; the training on two processes."""
    python, site = installed
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["OMP_NUM_THREADS"] = "1"  # two processes share the machine

    def onerec(line: str) -> str:
        words = [python.parent / "onerec", *shlex.split(line)]
        result = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        return result.stdout

    rows = [f"u{user},{(user * 7 + step * step) % 30},{step}" for user in range(30) for step in range(6)]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    (tmp_path / "histories.jsonl").write_text('{"history": [0, 1]}\n{"history": []}')
    assert str(site / "onerec_hf" / "scripts" / "configs") in onerec("--help")
    onerec("prepare --source log.csv --output data --collaborative_dim 8 --codebook_size 8 --num_levels 2")
    small = f"--model '{json.dumps(TINY | {'context_embed_dim': 4})}' --num_beams 20 --use_cpu true"
    report = onerec(
        "sft --accelerate_config cpu_2 --config small_sft.yaml --data data --output_dir model "
        f"{small} --num_train_epochs 1"
    )
    assert '"test"' in report
    onerec("recommend --repo model --dataset histories.jsonl --output served --k 3")
    served = datasets.Dataset.from_parquet(str(tmp_path / "served" / "part-00000-of-00001.parquet"))
    assert [len(row) for row in served["item_ids"]] == [3, 3] and set(served["item_ids"][0]) <= set(range(30))


def test_stand_ins_are_those_that_the_models_register():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from onerec_hf import models

    ours = {name: config for name, config in CONFIG_MAPPING._extra_content.items() if name.startswith("onerec")}
    assert {name: config.__name__ for name, config in ours.items()} == CONFIGS
    assert all(
        config is getattr(models, config.__name__) for config in ours.values()
    )  # and the real ones took their place


def test_public_names():
    names = {}
    exec("from onerec_hf import *", names)
    assert {"OneRecV2ForCausalLM", "Catalogue", "SemanticIdTokenizer", "__version__"} <= set(names) & set(
        dir(onerec_hf)
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = onerec_hf.nothing


def test_the_readme_names_every_extra():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    readme = (ROOT / "README.md").read_text()
    assert [extra for extra in config["options.extras_require"] if f"[{extra}]" not in readme] == []


def test_the_workflow_runs_ci_on_every_version_that_is_named():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    named = re.findall(r"Python :: (3\.\d+)", config["metadata"]["classifiers"])
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["test"]
    assert job["strategy"]["matrix"]["python"] == named
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == onerec_hf.__version__ and cited["license"] == "Apache-2.0"
    assert {entry["url"].rpartition("/")[2] for entry in cited["references"]} == {
        paper.arxiv for name, paper in PAPERS.items() if name.startswith("onerec")
    }
