"""Opens a page to try a model: a history built from titles, recommendations with reasons, the beam as a tree.

    onerec demo --repo outputs/quickstart/onerec-v2-quickstart --data outputs/quickstart/data

`--compare` puts a second model beside the first. `--data` offers the users of its test split to start from. Of the
simulated world, `--world '{"num_users": 2000, "num_items": 2000, "seed": 0}'` also shows what each user would watch.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DataFolder
from ..demo import STYLE, ExampleUser, Truth, make_demo
from ..recommender import Recommender
from ..simulator import ShortVideoWorld
from ..simulator.population import DAY_MS
from .checks import check_columns
from .parser import ScriptParser


@dataclass
class DemoArguments:
    repo: str = field(metadata={"help": "Folder or Hub repository of a trained model."})
    compare: str | None = field(default=None, metadata={"help": "A second one, shown beside it."})
    data: str | None = field(default=None, metadata={"help": "Data folder whose test users can be picked."})
    world: str | None = field(
        default=None, metadata={"help": "JSON of ShortVideoWorld's arguments: the world that the log came from."}
    )
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
    num_users: int = field(default=50, metadata={"help": "Users of --data that can be picked."})
    host: str = field(default="127.0.0.1", metadata={"help": "Address of the page."})
    port: int = field(default=7860, metadata={"help": "Port of the page."})
    share: bool = field(default=False, metadata={"help": "A public address for 72 hours, through gradio's servers."})


def example_users(data: DataFolder, count: int) -> list[ExampleUser]:
    """The first users of the test split."""
    test, ids = data.splits["test"], np.asarray(data.items["item_id"])
    check_columns(f"test split of {data.path}", test.column_names, ["user", "history"])
    names = data.columns("users", ["user_id"])["user_id"]
    rows = test.select(range(min(count, len(test))))
    return [
        ExampleUser(
            f"user {names[row['user']]}, {len(row['history'])} items", ids[row["history"]].tolist(), row["user"]
        )
        for row in rows
    ]


def truth_of(world: ShortVideoWorld, data: DataFolder) -> Truth:
    """Expected watch time in seconds of items that are shown to a user of the data folder at the end of the log."""
    names = np.asarray(data.columns("users", ["user_id"])["user_id"])
    end = world.start_time_ms + world.num_days * DAY_MS

    def seconds(user: int, items) -> list[float]:
        videos = np.asarray(items, dtype=np.int64)
        expected = world.expected_feedback(np.full(len(videos), names[user]), videos, np.full(len(videos), end))
        return (expected["play_time_ms"] / 1000).tolist()

    return seconds


def world_of(text: str) -> ShortVideoWorld:
    """The world of `--world`; `ValueError` where it is no JSON of arguments."""
    try:
        return ShortVideoWorld(**json.loads(text))
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(
            f"--world {text}: {error}. It is JSON of ShortVideoWorld's arguments, such as "
            '\'{"num_users": 2000, "num_items": 2000, "seed": 0}\'.'
        ) from error


def build(args: DemoArguments) -> Any:
    """The page; all that can be said of the arguments is said before a model is loaded."""
    if args.world is not None and args.data is None:
        raise ValueError("--world without --data: the truth belongs to users, who come from a data folder.")
    data = None if args.data is None else DataFolder(args.data)
    truth = None
    if args.world is not None and data is not None:
        truth = truth_of(world_of(args.world), data)
    repos = [args.repo] if args.compare is None else [args.repo, args.compare]
    names = [Path(repo).name for repo in repos]
    names = names if len(set(names)) == len(names) else repos
    recommenders = {name: Recommender.from_pretrained(repo, args.num_beams) for name, repo in zip(names, repos)}
    if data is not None:
        for repo, one in zip(repos, recommenders.values()):
            data.check_model(repo, one.model.catalogue)
    return make_demo(recommenders, [] if data is None else example_users(data, args.num_users), truth)


def main(args: DemoArguments) -> None:
    """Serves the page until it is stopped."""
    page = build(args)
    page.launch(server_name=args.host, server_port=args.port, share=args.share, css=STYLE)


def run(argv: list[str] | None = None) -> None:
    """`onerec demo`; `argv`: its arguments, by default those of the command line."""
    main(*ScriptParser("demo", __doc__, [DemoArguments]).parse(argv))


if __name__ == "__main__":
    run()
