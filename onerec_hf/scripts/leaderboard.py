"""One table of everything: runs or resumes each entry with each seed, then compares them on the same test users.

    onerec leaderboard --source logs.parquet --output outputs/leaderboard
    onerec leaderboard --dataset outputs/mydata --entries leaderboard.yaml --output outputs/leaderboard

`--dataset` is a folder that `onerec prepare` wrote. Without one, `--source` is the log: it is prepared into
`OUTPUT/data` first, with the arguments of `--prepare`. An entry of the YAML file names a command, `recipe: baseline`
or `sft`, its arguments, and `seeds` where one is enough. `recipe: rerank` names entries above it as `model` and
`scorers`, and takes their runs of the same seed; without a `model` it is the scorers alone. One's own model is
`{predictions: FILE}`, a table of `user_id` and `item_ids` (a list, best first), or `{python: module:function}`, a
function of histories of item ids and `k`; it is scored anew every time. A run lies in `OUTPUT/<entry>/seed<n>`; it is
taken as it is if it ended with the same arguments, resumed if it left a checkpoint, and made anew otherwise. Data that
have changed since a run, or a log that has changed since it was prepared, are refused: another `--output`. Writes
`leaderboard.md` (means ± standard deviation over seeds; paired bootstrap intervals against the best baseline, which is
chosen on validation, or `--reference`; recall by how often the target occurs in training and by the length of the
history; coverage, novelty, diversity), `leaderboard.json` and a picture. `--run false`: of what has ended.
"""

import contextlib
import io
import json
import os
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from ..data import DataFolder
from ..evaluation import paired_bootstrap
from ..trainers.resume import checkpoints_of, why_incomplete
from . import baseline, own_entry, rerank, sft
from .checks import check_output
from .ending import PREDICTIONS
from .leaderboard_results import BEYOND, HeldOut, check_runs, collect, picture, tables
from .leaderboard_runs import Board, prepare_source, same_run, unfinished
from .parser import ScriptParser, config_path

RECIPES: dict[str, tuple[Any, list, str]] = {  # the script, its arguments, and the one that names the folder it writes
    "baseline": (baseline, [baseline.BaselineArguments], "--output"),
    "sft": (sft, [sft.ModelArguments, sft.OneRecSFTConfig], "--output_dir"),
    "rerank": (rerank, [rerank.RerankArguments], "--output"),
}
OWN = {"own": (own_entry, [own_entry.OwnEntryArguments], "--output")}


@dataclass
class LeaderboardArguments:
    data: str | None = field(
        default=None, metadata={"help": "Folder that `onerec prepare` wrote.", "aliases": ["--dataset"]}
    )
    output: str = field(default="outputs/leaderboard", metadata={"help": "Folder to write."})
    entries: str = field(
        default="small_leaderboard.yaml", metadata={"help": "YAML file of entries, or the name of one of the package."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of entries; default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of entries that name none."})
    run: bool = field(default=True, metadata={"help": "false: compare what has ended, start nothing."})
    source: str | None = field(default=None, metadata={"help": "A log in place of data, as in `onerec prepare`."})
    layout: str | None = field(default=None, metadata={"help": "Of the source: logs (the default), amazon, kuairand."})
    columns: str | None = field(default=None, metadata={"help": "Of the source: our names to yours."})
    items: str | None = field(default=None, metadata={"help": "Item table that belongs to the source."})
    reference: str | None = field(
        default=None,
        metadata={"help": "Entry to compare with; default the best baseline on validation, or the first entry."},
    )
    prepare: str = field(
        default="small_prepare.yaml",
        metadata={"help": "YAML file of `onerec prepare`, for the source."},
    )


def load_entries(path: str) -> dict[str, dict]:
    """The entries of the YAML file, by name; YAML itself would keep the last of two with one name."""
    text = Path(config_path(path)).read_text(encoding="utf-8")
    names = [key.value for key, _ in yaml.compose(text).value]
    entries = yaml.safe_load(text)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has several entries named {twice}: one would vanish. Give each a name of its own.")
    for name, entry in entries.items():
        if name != Path(str(name)).name:
            raise ValueError(f"{path}: the entry {name!r} is no name of a folder: its runs lie in OUTPUT/<entry>.")
        kinds = [kind for kind in ("recipe", "predictions", "python") if kind in entry]
        if len(kinds) != 1:
            raise ValueError(
                f"{path}: {name} has {kinds or list(entry)}: give one of `recipe: {' | '.join(RECIPES)}`, "
                "`predictions: FILE` and `python: module:function`."
            )
        recipe = str(entry.get("recipe")).removesuffix(".py")  # as it was written before there were commands
        if recipe == "rerank":
            check_parts(path, name, entry, {each: entries[each] for each in names[: names.index(name)]})
        if kinds == ["recipe"] and recipe not in RECIPES:
            raise ValueError(f"{path}: {name} has recipe={entry['recipe']!r}; allowed are {sorted(RECIPES)}.")
        entries[name] = entry | {"recipe": recipe} if kinds == ["recipe"] else {"recipe": "own", "seeds": [0]} | entry
    return entries


def parts(entry: dict) -> list[str]:
    """The entries that an entry re-ranks."""
    return [*([entry["model"]] if "model" in entry else []), *entry.get("scorers", [])]


def check_parts(path: str, name: str, entry: dict, above: dict[str, dict]) -> None:
    """Refuses an entry that re-ranks what is not above it, or what does not score items."""
    if absent := [each for each in parts(entry) if each not in above]:
        raise ValueError(f"{path}: {name} re-ranks {absent}, which are no entries above it; those are {[*above]}.")
    if "model" in entry and above[entry["model"]]["recipe"] != "sft":
        raise ValueError(
            f"{path}: {name} has model={entry['model']!r}, an entry that trains no OneRec: name one of recipe sft."
        )
    scorers = entry.get("scorers", [])
    if silent := [each for each in scorers if above[each].get("name") not in rerank.SCORER_NAMES]:
        raise ValueError(
            f"{path}: {name} has the scorers {silent}, which do not score items: name baselines among "
            f"{', '.join(rerank.SCORER_NAMES)}."
        )


def command(args: LeaderboardArguments, entries: dict[str, dict], name: str, seed: int) -> list[str]:
    """The recipe of an entry and its arguments, as one would type them."""
    entry = entries[name]
    settings = {"data": args.data} | {key: value for key, value in entry.items() if key not in ("recipe", "seeds")}
    if entry["recipe"] == "rerank":
        folders = {each: run_of(args, entries, each, seed) for each in parts(entry)}
        settings |= {"scorers": [folders[each] for each in entry.get("scorers", [])]}
        settings |= {"model": folders[entry["model"]]} if "model" in entry else {}
    argv = ["--seed", str(seed)]
    for name, value in settings.items():
        if value == []:
            continue  # a command line has no word for it
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    return [entry["recipe"], *argv]


def seeds_of(args: LeaderboardArguments, entry: dict) -> list[int]:
    """The seeds of an entry, each once."""
    return list(dict.fromkeys(entry.get("seeds", args.seeds)))


def run_of(args: LeaderboardArguments, entries: dict[str, dict], name: str, seed: int) -> str:
    """The folder of an entry's run with that seed, or with its only one.

    Raises:
        ValueError: It has several seeds, and not this one.
    """
    seeds = seeds_of(args, entries[name])
    if seed not in seeds and len(seeds) > 1:
        raise ValueError(f"{args.entries}: seed {seed} re-ranks {name}, which has the seeds {seeds}.")
    return str(Path(args.output) / name / f"seed{seed if seed in seeds else seeds[0]}")


def located(args: LeaderboardArguments) -> LeaderboardArguments:
    """With paths that do not depend on the working directory: a run's arguments are compared with them later."""
    paths = {name: getattr(args, name) for name in ("data", "output", "source", "items")}
    known = {name: path for name, path in paths.items() if path and (name == "output" or Path(path).exists())}
    return replace(args, **{name: os.path.abspath(path) for name, path in known.items()})


def check_entry(name: str, argv: list[str], folder: Path) -> None:
    """All that the recipe checks before it trains: an error in the last entry is not found when the others have
    ended.
    """
    recipe, *argv = argv
    module, types, output = (RECIPES | OWN)[recipe]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):  # argparse prints what is wrong, and exits
            arguments = ScriptParser(recipe, None, types).parse([*argv, output, str(folder)])
        module.check(*arguments)
    except (Exception, SystemExit) as error:
        reason = printed.getvalue().strip().split("\n")[-1] if isinstance(error, SystemExit) else error
        raise ValueError(
            f"the entry {name!r} cannot run: {reason}\nNothing was started: correct it, or name the others with "
            "--only."
        ) from error


def run_entry(entry_command: list[str], folder: Path, board: Board) -> None:
    """Runs one recipe in this process; goes on with a checkpoint of the same command."""
    recipe, *argv = entry_command
    same = same_run(entry_command, folder, board)
    board.check_unchanged()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    board.note_run(entry_command, folder)
    for checkpoint in [] if same else checkpoints_of(folder):  # of other arguments
        shutil.rmtree(checkpoint)
    if not all(map(why_incomplete, checkpoints_of(folder))):
        argv += ["--resume_from_checkpoint", "true"]
    print(f"-> {folder}: {' '.join(entry_command)}", flush=True)
    module, types, output = (RECIPES | OWN)[recipe]
    module.main(*ScriptParser(recipe, None, types).parse([*argv, output, str(folder)]))


def main(args: LeaderboardArguments) -> dict:
    """Runs the recipe; returns what it writes to `leaderboard.json`."""
    args = located(args)
    output, entries = Path(args.output), load_entries(args.entries)
    if (args.data is None) == (args.source is None):
        raise ValueError(
            f"data={args.data!r} and source={args.source!r}: give one, a data folder or a log to prepare."
        )
    check_output(args.output, replaces=False)
    if unknown := {*args.only, *([args.reference] if args.reference else [])} - set(entries):
        raise ValueError(f"{args.entries} has no entries {sorted(unknown)}; it has {sorted(entries)}.")
    if args.reference and args.only and args.reference not in args.only:
        raise ValueError(f"reference={args.reference!r} is not among only={args.only}: add it, or leave it out.")
    if args.source is not None:
        given = {name: getattr(args, name) for name in ("source", "layout", "columns", "items")}
        args = replace(args, data=prepare_source(output, args.prepare, given, args.run))
    data = DataFolder(str(args.data))
    board = Board.of(output, str(args.data))
    test, results = HeldOut.of(data), {}
    seeds = {name: seeds_of(args, entries[name]) for name in args.only or entries}
    runs = [(name, command(args, entries, name, n), output / name / f"seed{n}") for name in seeds for n in seeds[name]]
    board.check_runs(runs, anew=args.run)
    if args.run:
        left = unfinished(runs, board)
        for name, argv, folder in {each[0]: each for each in left}.values():
            check_entry(name, argv, folder)
        for _, argv, folder in left:
            run_entry(argv, folder, board)
    for name in seeds:
        folders = [folder for own, _, folder in runs if own == name and (folder / "metrics.json").is_file()]
        if folders:
            check_runs(folders, data)
            results[name] = collect(folders, test)
    if not results or (args.reference and args.reference not in results):
        raise ValueError(f"no {args.reference or 'entry'} has ended in {output}: there is nothing to compare with.")
    baselines = [name for name in results if "validation" in results[name]] or [next(iter(results))]
    reference = args.reference or max(baselines, key=lambda name: results[name].get("validation", 0.0))
    results = dict(sorted(results.items(), key=lambda item: -item[1]["test_exclude_seen"]["recall@10"][0]))
    users = {kind: {name: result.pop(f"users_{kind}") for name, result in results.items()} for kind in PREDICTIONS}
    for name, result in results.items():
        result["interval"] = {
            kind: paired_bootstrap(users[kind][name], users[kind][reference]) for kind in PREDICTIONS
        }
    report = {
        "reference": reference,
        "strata": test.by_frequency,
        "histories": test.by_history,
        "beyond": BEYOND,
        "results": results,
    }
    (output / "leaderboard.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (output / "leaderboard.md").write_text(tables(results, reference, test), encoding="utf-8")
    picture(results, test.by_frequency, output / "leaderboard.png")
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec leaderboard`; `argv`: its arguments, by default those of the command line."""
    (arguments,) = ScriptParser("leaderboard", __doc__, [LeaderboardArguments]).parse(argv)
    main(arguments)
    print((Path(arguments.output) / "leaderboard.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run()
