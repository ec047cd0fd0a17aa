"""The documentation's Python and commands run as printed, its links lead somewhere, and every public name is in the
reference.
"""

import importlib
import json
import os
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import pytest

import onerec_hf

from .recipe_desk import make_desk, run

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / "docs").rglob("*.md"),
        ROOT / "README.md",
        ROOT / "recipes" / "README.md",
        ROOT / "results" / "README.md",
        ROOT / "model_cards" / "README.md",
        ROOT / "CONTRIBUTING.md",
    ]
)
# what stands between markers is written from a record: commands of hours, on data that are not here
MARKED = re.compile(r"<!-- (?:record|commands): .*?<!-- end -->", re.S)
QUICKSTART = ROOT / "docs" / "get_started" / "quickstart.md"  # tests/scripts/test_recipes.py runs its Python
OTHERS = {"make quickstart", "python results/render.py"}  # test_recipes.py and test_results.py run what they do
SMALLER = {
    "num_train_epochs=12": "num_train_epochs=1",
    "num_users=500, num_items=300": "num_users=80, num_items=60",
}
NOTEBOOK_SMALLER = {
    "num_users=400, num_items=300": "num_users=80, num_items=60",
    "num_train_epochs=10": "num_train_epochs=1",
    "num_train_epochs=3": "num_train_epochs=1",
    "num_candidates=32": "num_candidates=8",
}


def blocks(page: Path, language: str) -> list[str]:
    """The code of a page, as printed."""
    return re.findall(rf"```{language}\n(.*?)```", MARKED.sub("", page.read_text(encoding="utf-8")), re.S)


def commands(page: Path) -> list[str]:
    """The commands of a page, the lines of a long one put together as a shell does it."""
    lines = [line for block in blocks(page, "bash") for line in block.replace("\\\n", "").split("\n")]
    return [line for line in lines if line]


def as_onerec(line: str) -> str:
    """A recipe's command as the command of the package that does the same."""
    line = re.sub(r"^(?:accelerate launch|python) recipes/(\w+)\.py", r"onerec \1", line)
    return " ".join(line.replace("recipes/configs/", "").split())


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder that holds what the pages speak of: two tables, a data folder, a trained model and a reward model, made
    by the commands of the pages.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(make_desk(tmp_path_factory.mktemp("desk")))
        wanted = [*commands(ROOT / "docs/get_started/your_log.md")[:2]]
        wanted += commands(ROOT / "docs/trainers/reward_model.md")
        for line in wanted:
            run(line, patch)
        yield Path.cwd()


def run_python(code: str, folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    exec(compile(code, "page", "exec"), {"__name__": "page"})


PYTHON = [page for page in PAGES if blocks(page, "python") and page != QUICKSTART]


@pytest.mark.parametrize("page", PYTHON, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_runs(page, desk, monkeypatch, capsys):
    """Every block by itself, in one folder."""
    for block in blocks(page, "python"):
        run_python(block, desk, monkeypatch)
    if page == ROOT / "README.md":  # other processors train other weights, so ids and scores may differ
        shown, printed = blocks(page, "text")[0].rstrip("\n").split("\n"), capsys.readouterr().out.split("\n")
        begin = next(i for i, line in enumerate(printed) if line.split() == shown[0].split())
        rows = [line.split()[:2] for line in printed[begin + 1 : begin + len(shown)]]
        assert rows == [line.split()[:2] for line in shown[1:]]
        assert (desk / "outputs").is_dir()


def has_a_test_of_its_own(page: Path) -> bool:
    """Another file of tests reads the page, because its commands need more than two small tables."""
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__).resolve()]
    return page.parent == ROOT / "docs" and any(f'"{page.name}"' in path.read_text("utf-8") for path in tests)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_is_run(page):
    """A shell command is one of recipes/README.md, which test_recipes_page.py runs; the README's are run below."""
    text = MARKED.sub("", page.read_text(encoding="utf-8"))
    languages = set(re.findall(r"^```(\S.*)$", text, re.M))
    strange = languages - {"python", "bash", "text", "json", "sql", "yaml"}
    assert not strange, f"{page}: blocks of {strange}, which no test looks for"
    recipes = ROOT / "recipes" / "README.md"
    if page in (recipes, ROOT / "README.md") or has_a_test_of_its_own(page):
        return
    known = {as_onerec(line) for line in commands(recipes)} | OTHERS
    strange = [line for line in commands(page) if as_onerec(line) not in known and "python -c" not in line]
    assert not strange, (
        f"{page}: no test runs {strange}; write the command as recipes/README.md has it, or have a test read the page"
    )
    for line in commands(page):
        if line.startswith("python -c"):
            exec(shlex.split(line)[2], {})


def test_recorded_commands_have_only_arguments_that_exist(monkeypatch, capsys):
    """What a record was measured with must still be a command, though no test has the data or the hours to run it."""
    known: dict[str, set[str]] = {}
    for path in sorted((ROOT / "results").glob("*.json")):
        lines = "\n".join(json.loads(path.read_text(encoding="utf-8"))["commands"]).replace("\\\n", " ")
        for recipe, command, rest in re.findall(r"^(?:.*recipes/(\w+)\.py|onerec (\w+)) (.*)$", lines, re.M):
            name = recipe or command
            if name not in known:
                monkeypatch.setattr(sys, "argv", [f"onerec {name}", "--help"])
                with pytest.raises(SystemExit):
                    importlib.import_module(f"onerec_hf.scripts.{name}").run()
                known[name] = set(re.findall(r"--(\w+)", capsys.readouterr().out))
            given = set(re.findall(r"(?<!\S)--(\w+)", rest.partition(" # ")[0]))
            assert given <= known[name] | {"config"}, f"{path.name}: {name} has no {sorted(given - known[name])}"
    assert len(known) >= 5


def test_the_commands_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(make_desk(tmp_path))
    import pandas as pd

    histories = pd.read_parquet("logs.parquet").groupby("user_id").item_id.agg(history=list).reset_index()
    histories.to_parquet("histories.parquet")
    for name in ("small_sft.yaml", "sasrec.yaml"):  # a file of the user's comes before the package's
        Path(name).write_text((tmp_path / "recipes" / "configs" / name).read_text(encoding="utf-8"), encoding="utf-8")
    install, *lines = commands(ROOT / "README.md")
    assert install.startswith("pip install") and len(lines) == 5
    for line in lines:
        _, name, *words = shlex.split(line)
        extra = ["--codebook_size", "16", "--collaborative_dim", "16"] if name == "prepare" else []
        monkeypatch.setattr(sys, "argv", [f"recipes/{name}.py", *words, *extra])
        importlib.import_module(f"onerec_hf.scripts.{name}").run()
    assert pd.read_parquet("outputs/recommended").shape[0] == len(histories)


def test_the_notebook_runs(tmp_path, monkeypatch):
    """Its code cells in order, in a smaller world."""
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    install, code = code.split("\n", 1)
    assert install == "%pip install -q 'onerec_hf[train]'"
    for large, small in NOTEBOOK_SMALLER.items():
        assert large in code
        code = code.replace(large, small)
    names = {"__name__": "notebook"}
    exec(compile(code, "notebook", "exec"), names)
    assert names["before"] > 0 and names["after"] > 0
    assert len(names["trainer"].state.log_history) > 1 and names["aligned"].model is not names["seed"].model


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target, place in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name} links to {target}"
        if place:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            places = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert place in places, f"{page.name} links to {target}#{place}: the headings are {sorted(places)}"


def public_names() -> set[str]:
    """`package.Name` of everything that a package of ours offers in `__all__`."""
    names = set()
    for module in pkgutil.iter_modules(onerec_hf.__path__):
        if module.ispkg and module.name != "scripts":
            package = importlib.import_module(f"onerec_hf.{module.name}")
            names |= {f"onerec_hf.{module.name}.{name}" for name in package.__all__}
    return names


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    found = re.findall(r"^::: (\S+)$", pages, re.M)
    assert len(found) == len(set(found)) > 150
    missing = sorted(public_names() - set(found))
    assert not missing, f"add {missing} to docs/api"
    for name in found:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), f"docs/api names {name}, which is not there"


def test_every_page_of_the_site_exists():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    elsewhere = {"index.md", "contributing.md", "changelog.md", "recipes.md", "results/records.md"}
    named = set(re.findall(r"(\S+\.md)$", nav, re.M))
    assert {page for page in named - elsewhere if not page.startswith("model_cards/")} <= {
        os.path.relpath(page, ROOT / "docs") for page in PAGES
    }
