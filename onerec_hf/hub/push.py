"""A model folder -> a repository on the Hub, in one commit."""

import json
import re
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open

_SUFFIXES = {".safetensors", ".json", ".py", ".png"}  # no .bin, .pt, .parquet: no pickles, no optimizer, no users
_NAMES = {"README.md", "LICENSE", "items.jsonl"}
_TRAINING = re.compile(r"optimizer.*|scheduler.*|rng_state.*|raw_weights.*|trainer_state\.json|predictions.*")
_SAVE_MODEL = "`model.save_pretrained(folder)`"
_SAVE_TOKENIZER = "`tokenizer.save_pretrained(folder)`, the tokenizer having its catalogue"
_WHAT_TO_DO = {
    401: "Log in with `hf auth login`, or pass `token=` (a valid one).",
    403: "The token may not write there: pass one that may, choose a namespace of yours, or `create_pr=True`.",
    404: "The Hub has no such namespace, repository or revision, or hides it: check the name and `token=`.",
    409: "Somebody else changes the repository at this moment: run the same call again.",
    412: "Somebody else changed the repository in between: run the same call again.",
}


def repository_files(folder: str | Path) -> list[str]:
    """
    The files of a model folder that belong into its repository; checkpoints, optimizer states and predictions do not.

    Raises:
        ValueError: Naming everything that is missing or damaged, and what to do about each.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the one that `save_pretrained` or a trainer wrote.")
    files = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and (path.suffix in _SUFFIXES or path.name in _NAMES) and not _TRAINING.fullmatch(path.name)
    )
    if "config.json" not in files and "adapter_config.json" not in files:
        raise ValueError(
            f"{folder} holds no model: neither config.json nor adapter_config.json. Give the folder that "
            f"{_SAVE_MODEL} wrote; checkpoints lie in folders of their own."
        )
    reranker = _mapping(folder / "reranker.json")
    scorers = reranker.get("scorers", {})  # each in a folder of its own
    files += [f"scorers/{name}/{file}" for name in scorers for file in ("config.json", "model.safetensors")]
    if reranker.get("item_values") and "item_values.safetensors" not in files:
        files.append("item_values.safetensors")
    if problems := [*_missing(folder, files), *_damaged(folder, files)]:
        raise ValueError(f"{folder} is not ready for the Hub:\n" + "\n".join(f"- {problem}" for problem in problems))
    return files


def _mapping(path: Path) -> dict:
    """A JSON file; nothing where it is not there or cannot be read, which `_damaged` says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _missing(folder: Path, files: list[str]) -> list[str]:
    problems = []
    if "README.md" not in files:
        problems.append("README.md, the card: `model_card(...).save(folder / 'README.md')`, or `onerec publish`")
    if "adapter_config.json" in files:
        wanted = {"adapter_model.safetensors": _SAVE_MODEL}
        base = _mapping(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or Path(base).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            problems.append(
                f"the base model of adapter_config.json is {base!r}, which only this machine knows: push the base "
                "model, and "
                'write its repository into "base_model_name_or_path"'
            )
    else:
        wanted = dict.fromkeys(_weight_files(folder), _SAVE_MODEL)
        config = _mapping(folder / "config.json")
        if any(name.endswith("ForCausalLM") for name in config.get("architectures") or []):
            wanted |= {"generation_config.json": _SAVE_MODEL}
    reward = "config.json" in files and "generation_config.json" not in wanted
    if not reward:
        wanted |= dict.fromkeys(("tokenizer.json", "tokenizer_config.json"), _SAVE_TOKENIZER)
        wanted |= {"catalogue.safetensors": f"{_SAVE_MODEL} with `model.catalogue` set"}
    return problems + [f"{name}: {what}" for name, what in (wanted | _code_files(folder)).items() if name not in files]


def _weight_files(folder: Path) -> list[str]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return ["model.safetensors"]
    return sorted(set(_mapping(index).get("weight_map", {}).values()))


def _code_files(folder: Path) -> dict[str, str]:
    """The modules that `auto_map` names, and those that they import: without them the repository loads nowhere
    else.
    """
    found = {}
    for name, what in (("config.json", _SAVE_MODEL), ("tokenizer_config.json", _SAVE_TOKENIZER)):
        if not (settings := _mapping(folder / name)):
            continue
        auto_map = settings.get("auto_map") or {}
        if not auto_map:
            found[f"auto_map in {name}"] = f"{what}, after `import onerec_hf`"
        # "module.Class", or a list of such and None
        classes = [c for value in auto_map.values() for c in (value if isinstance(value, list) else [value]) if c]
        pending = [c.rpartition(".")[0] for c in classes]
        while pending:
            module = f"{pending.pop()}.py"
            if module not in found:
                found[module] = f"{what}, which copies the code"
                if (folder / module).is_file():
                    pending += re.findall(
                        r"^\s*from \.(\w+) import", (folder / module).read_text(encoding="utf-8"), re.MULTILINE
                    )
    return found


def _damaged(folder: Path, files: list[str]) -> list[str]:
    """Files that cannot be read, cut off by a full disk or a broken copy, and files that need one that is not
    there.
    """
    problems = []
    for name in files:
        try:
            if not (folder / name).is_file():
                raise ValueError("reranker.json names it, and it is not there")
            if name.endswith(".safetensors"):
                with safe_open(folder / name, framework="np"):
                    pass
            elif name.endswith(".png"):
                if not (folder / name).read_bytes().startswith(b"\x89PNG"):
                    raise ValueError("it is no picture")
            else:
                _read_text(name, (folder / name).read_text(encoding="utf-8"))
        except (SafetensorError, SyntaxError, ValueError) as error:  # of JSON and of UTF-8, too
            problems.append(f"{name} cannot be read ({error}): save it again")
    for one, other in (
        ("quantizer_config.json", "quantizer.safetensors"),
        ("quantizer.safetensors", "quantizer_config.json"),
    ):
        if one in files and other not in files:
            problems.append(f"{other}: {one} is there without it: `quantizer.save_pretrained(folder)`")
    if _mapping(folder / "collator_config.json").get("tables") and "collator.safetensors" not in files:
        problems.append(
            "collator.safetensors: collator_config.json names tables that it holds: `collator.save_pretrained(folder)`"
        )
    return problems


def _read_text(name: str, text: str) -> None:
    """Raises ValueError for a text that is not what its name says."""
    if name.endswith(".json"):
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, no mapping")
        if name == "collator_config.json" and "collator_class" not in content:
            raise ValueError("it names no collator_class")
    elif name == "items.jsonl":
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):  # U+2028 is part of a title
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
            if not isinstance(row, dict) or "item_id" not in row:
                raise ValueError(f"line {number} has no item_id")
    elif name == "README.md":
        try:
            ModelCard(text, ignore_metadata_errors=False)
        except Exception as error:  # of YAML, or of the Hub's own checks
            raise ValueError(f"its metadata: {error}") from error
    elif name.endswith(".py"):
        compile(text, name, "exec")


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload model",
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Uploads a model folder: model or adapter, tokenizer, catalogue, codebooks, collator, generation config, custom code
    and card, in one commit. Everything is checked before the first byte goes out, and the repository is made if it
    does not exist.

    Args:
        folder: What `save_pretrained` of model and tokenizer wrote, with its card.
        repo_id: `"org/name"`. In the card that goes up, the usage snippet loads this repository.
        private: Of a repository that is made now; default public, or what the organisation says.
        revision: Branch to commit to, made from `main` if it does not exist.
        create_pr: Open a pull request against `main` instead.
        token: Instead of the one that `hf auth login` stored.

    Returns:
        `CommitInfo`, with `commit_url` and `pr_url`.

    Raises:
        ValueError: Where the folder is incomplete (see [`repository_files`]), or the arguments contradict each other.
        OSError: Where the Hub refuses, fails or does not answer; says what to do. A commit goes in whole or not at
            all; a repository that was made for it stays there, empty.
    """
    files = repository_files(folder)
    if create_pr and revision not in (None, "main"):
        raise ValueError(
            f"create_pr=True opens a pull request against main: leave out revision={revision!r}, or create_pr."
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"repo_id={repo_id!r} is no name of a repository: give 'organisation/name'.") from error
    card = (Path(folder) / "README.md").read_text(encoding="utf-8")
    card = re.sub(r'^repo = ".*"$', f'repo = "{repo_id}"', card, count=1, flags=re.MULTILINE)
    operations = [
        CommitOperationAdd(name, card.encode() if name == "README.md" else str(Path(folder) / name)) for name in files
    ]
    api, step, made = HfApi(token=token), "create the repository", False
    try:
        repo_id, made = _create(api, repo_id, private)
        if revision not in (None, "main"):
            step = f"create the branch {revision!r}"
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        step = "upload"
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, create_pr=create_pr
        )
    except Exception as error:  # of Hub, connection, token: httpx, httpx2 and Xet have no common ground
        message = _explanation(folder, repo_id, step, error)
        if made:
            message += "\n" + _what_was_made(api, repo_id, "refs/pr/1" if create_pr else revision)
        raise OSError(message) from error


def _create(api: HfApi, repo_id: str, private: bool | None) -> tuple[str, bool]:
    """The full name of the repository, and whether it was made now."""
    try:
        return api.create_repo(repo_id, private=private).repo_id, True
    except HfHubHTTPError:  # it exists, or who may not make it may write to it all the same
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id, False


def _what_was_made(api: HfApi, repo_id: str, revision: str | None) -> str:
    """
    What became of a repository that this call has made. It is never removed again: it may hold by now what somebody
    else pushed, or this commit, of which the answer alone was lost.
    """
    try:
        arrived = set(api.list_repo_files(repo_id, revision=revision)) - {".gitattributes"}
    except RevisionNotFoundError:
        arrived = set()
    except Exception:  # the Hub is not there: what is said is true without it
        return (
            f"{repo_id} was made by this call: the same call goes on with it, `hf repos delete {repo_id}` removes it."
        )
    if arrived:
        return f"{repo_id}, made by this call, holds {len(arrived)} files: the answer was lost, not the commit."
    return f"{repo_id} was made by this call and is empty: call again to fill it, or `hf repos delete {repo_id}`."


def _explanation(folder, repo_id: str, step: str, error: Exception) -> str:
    response = error.response if isinstance(error, HfHubHTTPError) else None
    status = 0 if response is None else response.status_code
    advice = _WHAT_TO_DO.get(
        status,
        "The server failed or hung up: run the same call again, what has arrived is not sent twice."
        if response is None or status >= 500
        else "See the error above.",
    )
    return (
        f"could not {step} on {repo_id}: {type(error).__name__}: {error}\n{advice}\nA commit goes in whole or not at "
        f"all, so nothing in {repo_id} is half-written; {folder} is untouched."
    )
