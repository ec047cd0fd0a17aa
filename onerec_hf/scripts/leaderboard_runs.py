"""Whether what lies in the leaderboard's folder is of these data and arguments: the prepared log, and the runs.

Both are told by content, so a folder that is copied or moved stays what it is.
"""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers.utils import logging

from ..trainers.resume import checkpoints_of
from . import prepare
from .parser import ScriptParser, config_path
from .prepare_work import changed_files, content_of, contents_of, read_json, write_json

logger = logging.get_logger(__name__)

COMMAND, PREPARED, CONTENTS = "command.json", "prepare.json", "contents"
# what a run reads of a data folder; not its report and pictures, nor the code that a tokenizer carries
DATA = {name: name for name in ("items.parquet", "users.parquet", "item_embeddings.safetensors")}
DATA |= {"splits": "splits/**/*", "semantic IDs": "tokenizer/*.safetensors"}
CONFIGS = ("--config", "--model_config")  # arguments of an entry that name a YAML file
FILES = ("--continue_from", "--tokenizer")  # and those that name a model's folder

Run = tuple[str, list[str], Path]  # entry, command, folder


def digest(text: str) -> str:
    """16 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def data_contents(folder: str | Path) -> dict[str, str]:
    """A hash of each part of a data folder."""
    found = {}
    for name, pattern in DATA.items():
        files = sorted(path for path in Path(folder).glob(pattern) if path.is_file())
        # `datasets` leaves caches where it reads, other programs hidden files and such as _SUCCESS
        files = [path for path in files if not path.name.startswith(("cache-", ".", "_"))]
        lines = [f"{path.relative_to(folder).as_posix()}: {content_of(path)}" for path in files]
        found[name] = digest("\n".join(lines))
    return found


class Board(NamedTuple):
    """
    The leaderboard's folder and its data folder.

    Attributes:
        contents: Of the data folder, see `data_contents`.
    """

    output: Path
    data: str
    contents: dict[str, str]

    @classmethod
    def of(cls, output: Path, data: str) -> "Board":
        return cls(output, data, data_contents(data))

    def check_unchanged(self) -> None:
        """Refuses to start a run on other data than the earlier ones of this call had."""
        if changed := changed_files(self.contents, data_contents(self.data)):
            raise ValueError(
                f"{self.data} was changed while the leaderboard ran: {changed}. What has ended stays in "
                f"{self.output}, of the data as they were. For the new data, give another --output."
            )

    def portable(self, argv: list[str]) -> list[str]:
        """A command without what a move of data or board would change, and with the contents of the files it names."""
        words = []
        for option, word in zip(["", *argv], argv):
            if word == self.data:
                words.append("DATA")
            elif word.startswith(f"{self.output}{os.sep}"):
                words.append(f"BOARD/{Path(word).relative_to(self.output).as_posix()}")
            else:
                words.append(f"{word}{named_content(option, word)}")
        return words

    def note_run(self, argv: list[str], folder: Path) -> None:
        """Writes down what a run in `folder` is made of, before it starts."""
        write_json(folder / COMMAND, {"command": self.portable(argv), "data": self.contents})

    def check_runs(self, runs: list[Run], anew: bool) -> None:
        """
        Refuses runs on data that have changed since; says of which it cannot be told.

        Args:
            anew: Whether what has other arguments is made anew; otherwise it is taken, too.
        """
        other, unknown = {}, []
        for _, argv, folder in runs:
            if not has_run(folder) or (anew and not same_run(argv, folder, self)):
                continue
            known = read_command(folder)
            if "data" not in known:
                unknown.append(str(folder))
            elif changed := changed_files(known["data"], self.contents):
                other[str(folder)] = changed
        if other:
            raise ValueError(
                f"{self.data} has changed since {some(list(other))} ran on it: {next(iter(other.values()))}. Results "
                "of both do not belong in one table. Nothing was started or removed: give another --output for the "
                "data as they are now, or delete these folders to replace what is in them."
            )
        if unknown:
            logger.warning(
                f"{some(unknown)}: of an earlier version, which did not write down the data of a run. Whether "
                f"{self.data} has changed since cannot be checked; to be sure, delete these folders or give another "
                "--output."
            )


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def named_content(option: str, word: str) -> str:
    """What is in the file or folder that an argument of an entry names; empty where it names none."""
    try:
        if option in CONFIGS:  # as it is read: a comment changes no run
            read = yaml.safe_load(Path(config_path(word)).read_text(encoding="utf-8"))
            return f" {digest(json.dumps(read, sort_keys=True, default=str))}"
    except (FileNotFoundError, yaml.YAMLError):  # the entry's own check says so
        return ""
    if option not in FILES or not Path(word).is_dir():
        return ""
    files = sorted(Path(word).glob("*.safetensors"))
    return f" {digest(' '.join(content_of(file) for file in files))}"


def read_command(folder: Path) -> dict[str, Any]:
    """What made a run: `command`, and since it is written down, `data`."""
    known = json.loads(path.read_text(encoding="utf-8")) if (path := folder / COMMAND).is_file() else {}
    return {"command": known} if isinstance(known, list) else known


def has_run(folder: Path) -> bool:
    """Whether there is anything to take or to resume."""
    return (folder / "metrics.json").is_file() or bool(checkpoints_of(folder))


def same_run(argv: list[str], folder: Path, board: Board | None = None) -> bool:
    """Whether `folder` was made by that command."""
    known = read_command(folder)
    if argv[0] == "own" or not known:  # what the file or the function holds may be new
        return False
    if "data" not in known:  # of an earlier version: as it was typed
        recipe, *rest = known["command"]
        return [recipe.removesuffix(".py"), *rest] == argv
    return board is not None and known["command"] == board.portable(argv)


def unfinished(runs: list[Run], board: Board) -> list[Run]:
    """The runs that have not ended with the same arguments, and those that re-rank one of them."""
    left: list[Run] = []
    for each in runs:
        _, argv, folder = each
        again = {str(other) for *_, other in left}
        if again & set(argv) or not (same_run(argv, folder, board) and (folder / "metrics.json").is_file()):
            left.append(each)
    return left


def prepare_source(output: Path, config: str, given: dict[str, str | None], run: bool) -> str:
    """
    `OUTPUT/data`, made of the log that is `given`; taken as it is if the same arguments and the same files made it.

    Raises:
        ValueError: They did not, and nothing shall run, or runs on it would be left behind.
    """
    folder, made = output / "data", output / PREPARED
    argv = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    argv = ["--config", config, *argv, "--output", str(folder)]
    (arguments,) = ScriptParser("prepare", None, [prepare.PrepareArguments]).parse(argv)
    asked: dict[str, Any] = json.loads(json.dumps(asdict(arguments)))
    asked[CONTENTS] = contents_of(arguments)
    known = read_json(made)
    others = differences(known, asked)
    if known and not others:
        if unknown := [name for name in ("source", "items") if asked[name] and not asked[CONTENTS].get(name)]:
            why = "no file here"
        else:
            unknown = [] if CONTENTS in known else ["source"]
            why = "prepared by an earlier version, which did not write down what was in it"
        for name in unknown:
            logger.warning(
                f"{name}={asked[name]!r}: {why}. Whether it has changed since {folder} was made cannot be checked; to "
                "be sure, give another --output."
            )
        return str(folder)
    reason = f"{folder} was prepared with {'; '.join(others)}" if known else f"{folder} is not prepared"
    if not run:
        raise ValueError(
            f"{reason}. With --run false nothing is made: give the same arguments, or --dataset {folder}."
        )
    if known and (runs := sorted(str(path.parent) for path in output.glob(f"*/*/{COMMAND}") if has_run(path.parent))):
        raise ValueError(
            f"{reason}. {some(runs)} ran on that. Nothing was started or removed: give another --output for a table "
            f"of the new data, or delete {output} to replace the old one."
        )
    print(f"{reason}: it is prepared now.", flush=True)
    made.unlink(missing_ok=True)
    prepare.main(arguments)
    write_json(made, asked)
    return str(folder)


def differences(known: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """In words, what was prepared otherwise than it is asked now. Files are compared by content, wherever they are."""
    before, now, found = known.get(CONTENTS, {}), asked[CONTENTS], []
    for name, value in asked.items():
        if name in (CONTENTS, "output"):  # the folder may have been moved
            continue
        if name in before and name in now:
            one = len(before[name]) == len(now[name]) == 1  # whatever its name is
            old = dict(zip(now[name], before[name].values())) if one else before[name]
            if changed := changed_files(old, now[name]):
                found.append(f"another {name}={value!r} ({changed})")
        elif known.get(name) != value:
            found.append(f"{name}={known.get(name)!r}, asked is {value!r}")
    return found
