"""What the parts of `onerec loop` share: its settings, its simulated world, and the folder that is all they know of
one another.

Whatever one part leaves for another is written beside its place and then renamed, so it is whole or not there.
"""

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import pandas as pd

from ..simulator import ShortVideoWorld
from ..simulator.population import DAY_MS

POLICIES = ("frozen", "sft", "ipa", "gbpo")


@dataclass
class LoopArguments:
    output: str = field(metadata={"help": "Folder of the loop; one that is there goes on where it stopped."})
    policy: Literal["frozen", "sft", "ipa", "gbpo"] = field(
        default="sft",
        metadata={
            "help": "What the trainer does with a new day: nothing (new videos get codes), supervised training, and "
            "after it preference pairs every --align_every days, or GBPO on the new impressions."
        },
    )
    num_days: int = field(default=10, metadata={"help": "Days that are served."})
    warm_days: int = field(default=8, metadata={"help": "Days of another recommender's log, of which day 0 learns."})
    num_users: int = field(default=400, metadata={"help": "Of the simulated world."})
    num_videos: int = field(default=800, metadata={"help": "Of the simulated world, new ones included."})
    mean_events: float = field(default=80, metadata={"help": "Of a user in the world's whole log."})
    seed: int = field(default=0, metadata={"help": "Of the world and of the training."})
    return_slope: float = field(default=1.0, metadata={"help": "As of onerec ab_test: who liked it comes back."})
    list_size: int = field(default=20, metadata={"help": "Videos of a list."})
    held_out: float = field(
        default=0.1, metadata={"help": "Share of a day, its end, that is scored before it is trained on the next day."}
    )
    model: str = field(default="{}", metadata={"help": "Arguments of the model's config, as of onerec sft."})
    codebook_size: int = field(default=32, metadata={"help": "Codes of a level."})
    first_epochs: float = field(default=30, metadata={"help": "Of day 0, on the log."})
    epochs: float = field(default=2, metadata={"help": "Of each other day, on its new events."})
    learning_rate: float = field(default=3e-4, metadata={"help": "Of each other day."})
    align_every: int = field(default=3, metadata={"help": "Days between preference alignments."})
    align_steps: int = field(default=20, metadata={"help": "Steps of an alignment, or of a day's GBPO."})
    num_beams: int = field(default=50, metadata={"help": "Width of the search."})
    port: int = field(default=8017, metadata={"help": "Of the service, on this machine alone."})

    def __post_init__(self) -> None:
        for name, least in (("num_days", 1), ("warm_days", 2), ("list_size", 1), ("align_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least}.")
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r}: allowed are {', '.join(POLICIES)}.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: a share of a day, between 0 and 1.")


class Loop:
    r"""
    The folder of a loop. Day 0 is the log before it, days 1 to `num_days` are served.

    | place | written by | holds |
    |---|---|---|
    | `settings.json` | supervisor | the arguments |
    | `events/day-001/` | users | per batch of users the lists that they got, and what they made of them |
    | `impressions/day-001/` | logger | the day's impressions, a file per shard of users |
    | `trained/day-001/` | trainer | the model after that day, with `day.json` |
    | `versions/day-001/` | publisher | its repository, which never changes |
    | `served/day-002.json` | publisher | which version the day is served with |
    | `days.json`, `tensorboard/` | supervisor | what each day brought |
    """

    def __init__(self, folder: str | os.PathLike, args: LoopArguments | None = None):
        self.root = Path(folder)
        if args is None:
            args = LoopArguments(**json.loads((self.root / "settings.json").read_text(encoding="utf-8")))
        self.args = args

    def place(self, kind: str, day: int, suffix: str = "") -> Path:
        """Of a day: `place("served", 3, ".json")` is `served/day-003.json`."""
        return self.root / kind / f"day-{day:03d}{suffix}"

    @property
    def log_pattern(self) -> str:
        """Every impression until now, as `onerec prepare` and `onerec grpo` read it."""
        return str(self.root / "impressions" / "day-*" / "part-*.parquet")

    @cached_property
    def world(self) -> ShortVideoWorld:
        """The simulated world; its own log would go on through the days that are served."""
        args = self.args
        days = args.warm_days + args.num_days
        return ShortVideoWorld(
            args.num_users, args.num_videos, num_days=days, mean_events=args.mean_events, seed=args.seed
        )

    def end_of(self, day: int) -> int:
        """The midnight at which a day ends, in ms."""
        return self.world.start_time_ms + (self.args.warm_days + day) * DAY_MS

    def cut(self, day: int) -> int:
        """The time of a day until which it is trained on; what comes then is trained on with the next day."""
        return int(self.end_of(day) - self.args.held_out * DAY_MS)

    def videos(self, day: int) -> pd.DataFrame:
        """The videos that are there on a day, those that are new in its morning among them."""
        return self.world.items[self.world.items.upload_day < self.args.warm_days + day]


def write_json(path: Path, content: object) -> None:
    """A file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2), encoding="utf-8")
    partial.replace(path)


def write_table(path: Path, table: pd.DataFrame) -> None:
    """The same of a table, as parquet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    table.to_parquet(partial, index=False)
    partial.replace(path)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tables(folder: Path, pattern: str) -> pd.DataFrame:
    """The files of a folder in the order of their names, one below the other."""
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.glob(pattern))], ignore_index=True)


def wait_for(ready: Path | Callable[[], bool]) -> None:
    """Until a file or a folder is there, or something is true."""
    there = ready.exists if isinstance(ready, Path) else ready
    while not there():
        time.sleep(0.2)
