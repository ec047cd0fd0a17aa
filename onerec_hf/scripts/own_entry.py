"""An entry of the leaderboard that is one's own: a file of recommendations, or a function that makes them."""

import importlib
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from ..data import DataFolder, match_ids, read_table
from ..data.data_folder import id_fingerprint
from .baseline import ITEM_FINGERPRINT
from .checks import check_columns, check_output
from .ending import remove_earlier_results, score, write_metrics


@dataclass
class OwnEntryArguments:
    data: str = field(metadata={"help": "Folder that `onerec prepare` wrote."})
    output: str = field(metadata={"help": "Folder to write."})
    seed: int = field(default=0, metadata={"help": "Not used by an entry of your own."})
    predictions: str | None = field(
        default=None,
        metadata={"help": "Table with a row per test user: user_id, and item_ids, a list of item ids, best first."},
    )
    python: str | None = field(
        default=None,
        metadata={
            "help": "module:function, found from the folder you are in; function(histories, k) takes lists of item "
            "ids, oldest first, and returns one list of item ids per history, best first."
        },
    )


def check(args: OwnEntryArguments) -> tuple[DataFolder, Callable]:
    """The data folder, and `recommend(examples, k, exclude_seen)` as `evaluate` takes it; of a function, tried on two
    users.
    """
    check_output(args.output)
    data = DataFolder(args.data)
    if args.predictions is not None:
        return data, from_file(args.predictions, data)
    recommend = from_function(str(args.python), data)
    recommend(data.splits["test"].remove_columns("targets")[:2], 20, False)
    return data, recommend


def main(args: OwnEntryArguments) -> dict:
    """Scores it on the test split; returns what it writes to `metrics.json`."""
    data, recommend = check(args)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    remove_earlier_results(output)
    start = time.perf_counter()
    report = score(recommend, data.splits["test"], data.num_items, output, args.seed)
    report |= {"arguments": asdict(args), "num_items": data.num_items, "seconds": time.perf_counter() - start}
    report[ITEM_FINGERPRINT] = id_fingerprint(data.items["item_id"][:])
    write_metrics(output, report)
    return report


def best(items: np.ndarray, seen: list[int], k: int) -> np.ndarray:
    """The first k of a list that are not among the seen ones; -1 where there are no more."""
    left = items[~np.isin(items, seen)][:k]
    return np.pad(left, (0, k - len(left)), constant_values=-1)


def indices(ids: Any, data: DataFolder, what: str) -> np.ndarray:
    """
    Item indices of a list of item ids. An id that the data folder does not have can be nobody's target: -1.

    Raises:
        ValueError: Where none of them is known, or one stands twice.
    """
    ids = np.asarray(ids)
    found = match_ids(ids, data.catalogue.item_ids) if ids.size else np.zeros(0, np.int64)
    known = found[found >= 0]
    if ids.size and not len(known):
        raise ValueError(f"{what} has no item id of {data.path}; the first is {ids[0]!r}. Give ids of the log.")
    if len(np.unique(known)) < len(known):
        raise ValueError(f"{what} has an item twice: each one once, best first.")
    return found


def from_file(path: str, data: DataFolder) -> Callable:
    """What a file recommends."""
    table = read_table(path, ids=["user_id"])
    check_columns(f"predictions={path}", table.column_names, ["user_id", "item_ids"])
    users = match_ids(table["user_id"].to_numpy(zero_copy_only=False), np.array(data.users["user_id"]))
    lists = dict(zip(users.tolist(), table["item_ids"].to_pylist()))
    wanted = set(data.splits["test"]["user"])
    if absent := sorted(wanted - set(lists)):
        first = data.users[absent[0]]["user_id"]
        raise ValueError(
            f"{path} has no row for {len(absent)} of the {len(wanted)} test users; the first is {first!r}. A user "
            "without recommendations has an empty list."
        )
    known = {user: indices(lists[user] or [], data, f"{path}, user_id {data.users[user]['user_id']!r},")
             for user in wanted}  # fmt: skip

    def recommend(examples: dict, k: int, exclude_seen: bool) -> np.ndarray:
        seen = examples["history"] if exclude_seen else [[]] * len(examples["user"])
        return np.stack([best(known[user], own, k) for user, own in zip(examples["user"], seen)])

    return recommend


def from_function(name: str, data: DataFolder) -> Callable:
    """What a function recommends; it is asked for as many more items as a history is long where those are left out."""
    module, _, path = name.partition(":")
    if not path:
        raise ValueError(f"python={name!r}: write module:function, such as my_model:recommend.")
    if os.getcwd() not in sys.path:  # `onerec` does not look there by itself, as `python file.py` does
        sys.path.insert(0, os.getcwd())
    function = attrgetter(path)(importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"python={name!r} is a {type(function).__name__}: name a function(histories, k).")
    item_ids = data.catalogue.item_ids

    def recommend(examples: dict, k: int, exclude_seen: bool) -> np.ndarray:
        histories = [list(row) for row in examples["history"]]
        longest = max(map(len, histories)) if exclude_seen else 0
        found = list(function([item_ids[row].tolist() for row in histories], min(k + longest, data.num_items)))
        if len(found) != len(histories):
            raise ValueError(f"{name} returned {len(found)} lists for {len(histories)} histories: one for each.")
        lists = (indices(row, data, f"a list of {name}") for row in found)
        return np.stack([best(row, own if exclude_seen else [], k) for row, own in zip(lists, histories)])

    return recommend
