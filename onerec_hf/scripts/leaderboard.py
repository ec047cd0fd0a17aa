"""One table of everything: runs or resumes each entry with each seed, then compares them on the same test users.

    onerec leaderboard --dataset outputs/beauty --entries leaderboard.yaml --output outputs/leaderboard

`--dataset` is a folder that `onerec prepare` wrote. An entry of the YAML file names a command, `recipe: baseline` or
`sft`, its arguments, and `seeds` where one is enough. One's own model is `{predictions: FILE}`, a table of `user_id`
and `item_ids` (a list, best first), or `{python: module:function}`, a function of histories of item ids and `k`; it
is scored anew every time. A run lies in `OUTPUT/<entry>/seed<n>`; it is taken as it is if it ended with the same
arguments, resumed if it left a checkpoint, and made anew otherwise. Writes `leaderboard.md` (means ± standard
deviation over seeds; paired bootstrap intervals against the best baseline, which is chosen on validation; recall by
how often the target occurs in training), `leaderboard.json` and a picture. `--run false`: of what has ended.
"""

import contextlib
import io
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..data import DataFolder
from ..evaluation import frequency_strata, paired_bootstrap
from ..trainers.resume import checkpoints_of, why_incomplete
from . import baseline, own_entry, sft
from .checks import check_output
from .ending import PREDICTIONS
from .leaderboard_results import check_runs, collect, picture, tables
from .parser import ScriptParser, config_path

RECIPES: dict[str, tuple[Any, list, str]] = {  # the script, its arguments, and the one that names the folder it writes
    "baseline": (baseline, [baseline.BaselineArguments], "--output"),
    "sft": (sft, [sft.ModelArguments, sft.OneRecSFTConfig], "--output_dir"),
}
OWN = {"own": (own_entry, [own_entry.OwnEntryArguments], "--output")}


@dataclass
class LeaderboardArguments:
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote.", "aliases": ["--dataset"]})
    output: str = field(metadata={"help": "Folder to write."})
    entries: str = field(
        default="leaderboard.yaml", metadata={"help": "YAML file of entries, or the name of one of the package."}
    )
    only: list[str] = field(default_factory=list, metadata={"help": "Names of entries; default all."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    run: bool = True


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
        if kinds == ["recipe"] and recipe not in RECIPES:
            raise ValueError(f"{path}: {name} has recipe={entry['recipe']!r}; allowed are {sorted(RECIPES)}.")
        entries[name] = entry | {"recipe": recipe} if kinds == ["recipe"] else {"recipe": "own", "seeds": [0]} | entry
    return entries


def command(args: LeaderboardArguments, entry: dict, seed: int) -> list[str]:
    """The recipe of an entry and its arguments, as one would type them."""
    settings = {"data": args.data} | {name: value for name, value in entry.items() if name not in ("recipe", "seeds")}
    argv = ["--seed", str(seed)]
    for name, value in settings.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{name}", *map(str, values)]
    return [entry["recipe"], *argv]


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


def same_run(argv: list[str], folder: Path) -> bool:
    """Whether `folder` was made by that command."""
    path = folder / "command.json"
    if argv[0] in OWN or not path.is_file():  # what the file or the function holds may be new
        return False
    recipe, *rest = json.loads(path.read_text(encoding="utf-8"))
    return [recipe.removesuffix(".py"), *rest] == argv


def run_entry(entry_command: list[str], folder: Path) -> None:
    """Runs one recipe in this process; goes on with a checkpoint of the same command."""
    recipe, *argv = entry_command
    same = same_run(entry_command, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.json").unlink(missing_ok=True)
    (folder / "command.json").write_text(json.dumps(entry_command), encoding="utf-8")
    for checkpoint in [] if same else checkpoints_of(folder):  # of other arguments
        shutil.rmtree(checkpoint)
    if not all(map(why_incomplete, checkpoints_of(folder))):
        argv += ["--resume_from_checkpoint", "true"]
    print(f"-> {folder}: {' '.join(entry_command)}", flush=True)
    module, types, output = (RECIPES | OWN)[recipe]
    module.main(*ScriptParser(recipe, None, types).parse([*argv, output, str(folder)]))


def main(args: LeaderboardArguments) -> dict:
    """Runs the recipe; returns what it writes to `leaderboard.json`."""
    output, entries = Path(args.output), load_entries(args.entries)
    check_output(args.output, replaces=False)
    if unknown := set(args.only) - set(entries):
        raise ValueError(f"{args.entries} has no entries {sorted(unknown)}; it has {sorted(entries)}.")
    data = DataFolder(args.data)
    splits, num_items = data.splits, data.num_items
    train = np.concatenate(splits["train"].with_format("numpy")["history"])
    counts, targets = np.bincount(train, minlength=num_items), splits["test"]["targets"]
    strata, results = frequency_strata(counts, targets), {}
    seeds = {name: list(dict.fromkeys(entries[name].get("seeds", args.seeds))) for name in args.only or entries}
    runs = [(name, command(args, entries[name], n), output / name / f"seed{n}") for name in seeds for n in seeds[name]]
    if args.run:
        left = [each for each in runs if not (same_run(*each[1:]) and (each[2] / "metrics.json").is_file())]
        for name, argv, folder in {each[0]: each for each in left}.values():
            check_entry(name, argv, folder)
        for _, argv, folder in left:
            run_entry(argv, folder)
    for name in seeds:
        folders = [folder for own, _, folder in runs if own == name and (folder / "metrics.json").is_file()]
        if folders:
            check_runs(folders, data)
            results[name] = collect(folders, splits["test"], counts, strata)
    baselines = [name for name in results if "validation" in results[name]]
    if not baselines:
        raise ValueError(f"no baseline has ended in {output}: there is nothing to compare with.")
    reference = max(baselines, key=lambda name: results[name]["validation"])
    results = dict(sorted(results.items(), key=lambda item: -item[1]["test_exclude_seen"]["recall@10"][0]))
    users = {kind: {name: result.pop(f"users_{kind}") for name, result in results.items()} for kind in PREDICTIONS}
    for name, result in results.items():
        result["interval"] = {
            kind: paired_bootstrap(users[kind][name], users[kind][reference]) for kind in PREDICTIONS
        }
    report = {"reference": reference, "strata": strata, "results": results}
    (output / "leaderboard.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    (output / "leaderboard.md").write_text(tables(results, reference, strata), encoding="utf-8")
    picture(results, strata, output / "leaderboard.png")
    return report


def run(argv: list[str] | None = None) -> None:
    """`onerec leaderboard`; `argv`: its arguments, by default those of the command line."""
    (arguments,) = ScriptParser("leaderboard", __doc__, [LeaderboardArguments]).parse(argv)
    main(arguments)
    print((Path(arguments.output) / "leaderboard.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run()
