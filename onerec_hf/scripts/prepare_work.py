"""The work folder of `onerec prepare`, OUTPUT/.prepare: what a stopped run has finished, for the same command to take.
And what tells whether a file is still the one that something was made of.

A piece of work has its name when it is whole. `made_of.json` says what the pieces are made of; without it they are
nobody's, so it is the first to go where they are deleted.
"""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import WeakFileLock

from ..data.event_shards import whole
from ..data.log_shards import CUT
from .model_arguments import model_path
from .prepare_arguments import PrepareArguments

BLOCK, BLOCKS = 2**20, 64  # what is read of a large file to tell whether it has changed
WORK, MADE_OF = ".prepare", "made_of.json"
SPLITS_DONE = "splits.json"  # how many shards have their splits, and what was counted on the way
EMBEDDINGS, LEVELS, RQVAE_DONE = "embeddings", "levels", "rqvae"  # folders
LOGS = ("source", "items", "users")  # arguments that must be files, or a stopped run cannot be gone on with
_NOTHING = "nothing, because nothing was finished"
OTHERS = ("embeddings", "text_model", "caption_model", "semantic_ids_from")  # those that may be


@contextmanager
def work_folder(args: PrepareArguments, output: Path) -> Iterator[Path]:
    """
    The work folder of a run with these arguments, while it runs. Says what it takes over of a stopped run, or why it
    does not.

    A run that ends removes it. One that fails or is killed leaves it, unless [`forget`] was called.

    Raises:
        RuntimeError: Another run is writing into the output.
    """
    folder, lock = output / WORK, output / f"{WORK}.lock"
    with ExitStack() as stack:
        try:  # the lock goes with its process: a killed run holds none
            stack.enter_context(WeakFileLock(lock, timeout=0.1))
        except TimeoutError as error:
            raise RuntimeError(
                f"output={str(output)!r}: another run of onerec prepare is writing there (it holds {lock}). Wait for "
                "its end, or name another output."
            ) from error
        stack.callback(_unlink, lock)
        _open(folder, _made_of(args))
        try:
            yield folder
        except BaseException:
            if not (folder / MADE_OF).is_file():
                _remove(folder)
            elif _pieces(folder) != _NOTHING:
                print(f"stopped: {folder} keeps what is finished, and the same command goes on from there", flush=True)
            raise
        _remove(folder)


def forget(folder: Path) -> None:
    """From here on nothing of the run is kept."""
    (folder / MADE_OF).unlink(missing_ok=True)


def kept(path: Path, make: Callable[[], Any]) -> np.ndarray:
    """The array of a `.npy` file, which is made where it is not there."""
    if not path.is_file():
        found = make()
        path.parent.mkdir(exist_ok=True)
        with whole(path) as partial, partial.open("wb") as file:
            np.save(file, found)
    return np.load(path)


def read_json(path: Path) -> dict[str, Any]:
    """What is in a file; nothing where it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def write_json(path: Path, found: dict[str, Any]) -> None:
    """A file that is whole or not there."""
    with whole(path) as partial:
        partial.write_text(json.dumps(found, indent=2), encoding="utf-8")


def content_of(path: Path) -> str:
    """Size and hash of a file: the same for a copy elsewhere. A file above 64 MiB is read at 64 places alone, the
    first and the last MiB among them, so that it costs a fraction of a second however large it is.
    """
    size, digest = path.stat().st_size, hashlib.sha256()
    starts = [0]
    if size > BLOCKS * BLOCK:
        starts = [place * (size - BLOCK) // (BLOCKS - 1) for place in range(BLOCKS)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK if len(starts) > 1 else size))
    return f"{size} bytes, {digest.hexdigest()[:16]}"


def changed_files(before: dict[str, str], now: dict[str, str]) -> str:
    """In words, which of the files of [`content_of`] by name are not what they were; empty where all are."""
    words = {name: "has changed" for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)}
    words |= dict.fromkeys(words.keys() - now.keys(), "is not there any more")
    words |= dict.fromkeys(words.keys() - before.keys(), "is new")
    told = [f"{name} {what}" for name, what in words.items()]
    return "; ".join(told[:3]) + (f"; and {len(told) - 3} more" if len(told) > 3 else "")


def contents_of(args: PrepareArguments) -> dict[str, dict[str, str]]:
    """[`content_of`] of every file that an argument names, by argument and name; a file or folder that is moved stays
    the same. Without what is in memory or on the Hub.
    """
    found = {}
    for name in (*LOGS, *OTHERS):
        if files := _files_named(name, getattr(args, name)):
            folder = Path(os.path.commonpath([str(file.parent) for file in files]))
            found[name] = {file.relative_to(folder).as_posix(): content_of(file) for file in files}
    return found


def _unlink(lock: Path) -> None:
    with suppress(OSError):  # some systems do not delete what is open
        lock.unlink()


def _open(folder: Path, made_of: dict[str, str]) -> None:
    path = folder / MADE_OF
    if known := read_json(path):
        if known == made_of:
            print(f"goes on with a stopped run ({folder}): takes over {_pieces(folder)}", flush=True)
            return
        names = [name for name in known | made_of if known.get(name) != made_of.get(name)]
        told = [f"{name} was {known.get(name, 'not there')}, is {made_of.get(name, 'not there')}" for name in names]
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        print(
            f"{folder} is of a stopped run that was another one: {'; '.join(told[:3])}{more}. It is deleted, and "
            "everything is made anew.",
            flush=True,
        )
    _remove(folder)
    folder.mkdir()
    if made_of:
        write_json(path, made_of)


def _remove(folder: Path) -> None:
    if folder.is_dir():
        forget(folder)
        shutil.rmtree(folder)


def _made_of(args: PrepareArguments) -> dict[str, str]:
    """All that decides what a piece of work is, by name; empty where that cannot be said, because the log is in
    memory or on the Hub.
    """
    found = {"code of onerec_hf": _code()}
    found |= {
        each.name: json.dumps(getattr(args, each.name), default=str)
        for each in fields(PrepareArguments)
        if each.name != "output"
    }
    for name in (*LOGS, *OTHERS):
        value = getattr(args, name)
        if value is None:
            continue
        files = _files_named(name, value)
        if name in LOGS and not files:
            return {}
        for path in files:
            about = path.stat()
            found[str(path.resolve())] = f"{about.st_size} bytes, changed at {about.st_mtime_ns} ns"
    return found


def _code() -> str:
    """A fingerprint of what makes the pieces: a checkout changes more often than its version."""
    package, digest = Path(__file__).parents[1], hashlib.sha256()
    for pattern in ("data/*.py", "item_embeddings/*.py", "semantic_ids/*.py", "scripts/prepare*.py"):
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files_named(argument: str, value: Any) -> list[Path]:
    if not isinstance(value, (str, Path)):
        return []
    return _files(model_path(str(value)) if argument in OTHERS else value)


def _files(source: str | Path) -> list[Path]:
    path = Path(source)
    paths = path.rglob("*") if path.is_dir() else [path]
    if not path.exists():
        paths = [Path(name) for name in glob.glob(str(source), recursive=True)]
    return sorted(each for each in paths if each.is_file())


def _pieces(folder: Path) -> str:
    """What is finished, in words."""
    found = []
    if cut := read_json(folder / CUT):
        count = len(list(folder.glob("events-*.parquet")))
        found.append(f"the log, cut into {cut['num_shards']} shards ({count} sorted)")
    if done := read_json(folder / SPLITS_DONE):
        found.append(f"the splits of {done['shards']}")
    found += [f"{path.stem} embeddings" for path in sorted((folder / EMBEDDINGS).glob("*.npy"))]
    if levels := len(list((folder / LEVELS).glob("*.safetensors"))):
        found.append(f"{levels} levels of codebooks")
    if (folder / RQVAE_DONE).is_dir():
        found.append("the codebooks")
    return ", ".join(found) or _NOTHING
