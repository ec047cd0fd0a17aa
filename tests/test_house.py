"""The rules of the house: who may import whom, how large a file or a function may be, what the library never does."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import LONGEST, SLOW

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "onerec_hf"
FILES = sorted(path for path in PACKAGE.rglob("*.py"))
# folder -> (folders of ours it may import, third-party packages it may import)
RULES = {
    "models": (set(), {"torch", "transformers", "numpy", "safetensors", "tokenizers", "huggingface_hub"}),
    "semantic_ids": (set(), {"torch", "numpy", "safetensors", "tqdm", "transformers", "matplotlib"}),
    "simulator": (set(), {"torch", "numpy", "pandas"}),
    "hub": (set(), {"huggingface_hub", "jinja2", "matplotlib", "numpy", "safetensors"}),
    "evaluation": (set(), {"torch", "numpy", "scipy", "tqdm", "datasets"}),
    "item_embeddings": (set(), {"datasets", "torch", "transformers", "numpy", "pyarrow", "safetensors"}),
    "data": (
        {"item_embeddings", "semantic_ids"},
        {"datasets", "duckdb", "torch", "transformers", "numpy", "pandas", "pyarrow", "safetensors", "tqdm"},
    ),
    "collators": ({"data"}, {"numpy", "torch", "transformers", "safetensors"}),
    "baselines": ({"models"}, {"torch", "transformers", "numpy", "scipy", "tqdm", "safetensors"}),
    "rewards": ({"collators", "models", "data"}, {"torch", "transformers"}),
    "trainers": (
        {"collators", "models", "data", "rewards", "evaluation", "hub", "_version"},
        {"trl", "transformers", "accelerate", "peft", "torch", "datasets", "numpy", "safetensors", "huggingface_hub"},
    ),
    "serving": (
        {"collators", "item_ranker", "models", "recommendation_files", "recommender", "semantic_ids", "_version"},
        {"fastapi", "numpy", "prometheus_client", "pydantic", "ray", "safetensors", "starlette", "torch", "uvicorn"},
    ),
    "export": (
        {"collators", "models", "recommender", "_version"},
        {"numpy", "onnxruntime", "safetensors", "torch"},
    ),
    "scripts": (
        {
            "",
            "baselines",
            "collators",
            "data",
            "demo",
            "evaluation",
            "export",
            "hub",
            "item_embeddings",
            "item_ranker",
            "models",
            "recommendation_files",
            "recommender",
            "reranker",
            "rewards",
            "semantic_ids",
            "serving",
            "simulator",
            "trainers",
        },
        {
            "datasets",
            "fastapi",
            "huggingface_hub",
            "matplotlib",
            "numpy",
            "pandas",
            "peft",
            "ray",
            "safetensors",
            "torch",
            "tqdm",
            "transformers",
            "trl",
            "yaml",
        },
    ),
    "": (
        {"collators", "models", "data", "semantic_ids", "scripts", "hub", "trainers"},
        {
            "pandas",
            "accelerate",
            "gradio",
            "yaml",
            "torch",
            "transformers",
            "numpy",
            "huggingface_hub",
            "matplotlib",
            "jinja2",
            "safetensors",
            "tqdm",
            "datasets",
            "pyarrow",
        },
    ),
}


def folder_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0] if path.parent != PACKAGE else ""


def imports(path: Path):
    """(level, module) of every import statement: level 1 is a neighbour, 2 another folder of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports(path):
    folder = folder_of(path)
    ours, third_party = RULES[folder]
    for level, module in imports(path):
        head = module.split(".")[0]
        if level == 0:
            assert head != "onerec_hf", f"{path}: import our own modules relatively"
            assert head in third_party or head in sys.stdlib_module_names, f"{path} imports {module}"
        elif folder == "" and level == 1:
            assert head in ours or head.startswith("_") or (PACKAGE / f"{head}.py").exists() or head == "", (
                f"{path} imports .{module}"
            )
        elif level == 2:
            assert head in ours, f"{path} imports ..{module}"
        else:
            assert level == 1, f"{path} imports {'.' * level}{module}"


def test_models_stay_flat():
    """`save_pretrained` copies files that single-dot imports name; a subfolder or a parent import breaks loading
    elsewhere.
    """
    for path in (PACKAGE / "models").rglob("*.py"):
        assert path.parent == PACKAGE / "models"
        source = path.read_text()
        assert "from . import" not in source, f"{path}: name the sibling, `from .sibling import name`"
        assert "from __future__ import annotations" not in source, f"{path}: breaks config_class"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    limit = 600 if path.name.startswith("modeling_") else 370
    source = path.read_text()
    assert len(source.splitlines()) <= limit
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{path}: {node.name} has {lines} lines"


def public_functions(node: ast.AST, inside: str = ""):
    """Functions that a user may call: no underscore in front of their name, nor of their class's; constructors and
    calls too.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child, child.name)
        elif isinstance(child, ast.FunctionDef):
            if not child.name.startswith("_") or child.name in ("__init__", "__call__"):
                yield inside, child


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_functions_say_their_types(path):
    """mypy, in `make check`, says whether they are true."""
    for owner, node in public_functions(ast.parse(path.read_text())):
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if owner and not any(getattr(decorator, "id", "") == "staticmethod" for decorator in node.decorator_list):
            arguments = arguments[1:]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        assert not bare, f"{path}: {owner} {node.name} does not say the types of {bare}"
        assert node.returns or node.name == "__init__", f"{path}: {owner} {node.name} does not say what it returns"


def test_recipes_are_short_and_say_their_command():
    for path in (ROOT / "recipes").glob("*.py"):
        source = path.read_text()
        assert "__main__" not in source or f"recipes/{path.name}" in ast.get_docstring(ast.parse(source)), (
            f"{path}: the docstring shows the command"
        )
        assert len(source.splitlines()) <= 170, path


@pytest.mark.parametrize("folder", ["benchmarks", "experiments"])
def test_scripts_say_their_command(folder):
    for path in (ROOT / folder).glob("*.py"):
        source = path.read_text(encoding="utf-8")
        assert len(source.split("\n")) <= 351, path
        assert "__main__" not in source or f"{folder}/{path.name}" in ast.get_docstring(ast.parse(source)), (
            f"{path}: the docstring shows the command"
        )


def test_what_the_library_never_does():
    for path in FILES:
        source = path.read_text()
        assert not re.search(r"\bpickle\b|torch\.load\(", source), f"{path}: no pickle"
        assert not re.search(r"getattr\(\s*config\s*,", source), f"{path}: config fields are declared, not guessed"
        assert path.name != "utils.py"


def test_ruff_before_a_commit_is_ruff_in_make_check():
    pinned = re.search(r"^ruff==(.*)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)[1]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert f"ruff-pre-commit\n    rev: v{pinned}\n" in hooks, f".pre-commit-config.yaml: ruff is pinned to {pinned}"


def test_slow_tests_exist():
    assert SLOW.issuperset(LONGEST)
    for name in SLOW:
        module, _, function = name.partition("::")
        path = next((ROOT / "tests").rglob(f"test_{module}.py"), None)
        assert path and f"def {function}" in path.read_text(encoding="utf-8"), f"no {name} in the tests"


def test_first_docstring_line():
    for path in FILES:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, f"{path}: says in its first line what it is"


def test_the_package_needs_torch_and_transformers_alone():
    """A process in which trl, datasets, peft, pandas and matplotlib do not exist."""
    code = (
        "import sys\n"
        "for name in ('trl', 'datasets', 'peft', 'pandas', 'matplotlib', 'scipy', 'sklearn'): sys.modules[name] = "
        "None\nimport onerec_hf\n"
        "model = onerec_hf.OneRecV2ForCausalLM(onerec_hf.OneRecV2Config(codebook_sizes=[4, 4], hidden_size=8,\n"
        "    num_attention_heads=2, num_hidden_layers=1, context_embed_dim=4))\n"
        "model.catalogue = onerec_hf.Catalogue([[0, 1], [2, 3]], [4, 4])\n"
        "import torch\n"
        "assert model.generate(context_ids=torch.tensor([[[4, 9]]]), num_beams=2, num_return_sequences=2).shape == "
        "(2, 3)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "path", [*FILES, *sorted((ROOT / "recipes").glob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_text_files_say_their_encoding_and_lines_end_at_newlines(path):
    """The default encoding is the machine's; `str.splitlines` ends a line inside a title that holds U+2028."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr != "splitlines", f"{path}:{node.lineno}: split at '\\n'"
            if node.func.attr in ("read_text", "write_text"):
                named = any(keyword.arg == "encoding" for keyword in node.keywords)
                assert named, f"{path}:{node.lineno}: {node.func.attr} without encoding"
