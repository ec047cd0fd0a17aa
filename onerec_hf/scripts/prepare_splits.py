"""`onerec prepare` from shards of a log to its splits and training histories, behind those that a stopped run has
written.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from transformers.utils import logging

from .. import data as logs
from .model_arguments import mapping
from .prepare_arguments import PrepareArguments, session_config
from .prepare_work import SPLITS_DONE, read_json, write_json


def make_splitter(args: PrepareArguments) -> logs.Splitter:
    """What makes the splits that were asked for."""
    if config := session_config(args):
        return logs.SessionSplit(config, args.validation_start, args.test_start)
    if args.validation_start is None:
        return logs.LeaveLastOut()
    return logs.GlobalTimeSplit(args.validation_start, args.test_start, min_history=1)


class Histories:
    """Training histories, one row per user, that embeddings and popularity may learn from: a data set per shard."""

    def __init__(self, work: Path, num_items: int):
        self.work, self.popularity = work, np.zeros(num_items, dtype=np.int64)
        self.files: list[Path] = []

    def add(self, train: datasets.Dataset | None) -> None:
        """The rows of one more shard; None: they are written already."""
        path = self.work / f"histories-{len(self.files):05d}.parquet"
        if train is not None:
            logs.write_part(path, train.select_columns("history"))
        self.files.append(path)
        rows = logs.read_part(path) if train is None else train
        items = rows.with_format("arrow")[:]["history"].combine_chunks().flatten()
        self.popularity += np.bincount(items.to_numpy(), minlength=len(self.popularity))

    def __iter__(self) -> Iterator[datasets.Dataset]:
        return map(logs.read_part, self.files)


def write_splits(
    args: PrepareArguments, shards: logs.EventShards, output: Path, histories: Histories
) -> tuple[logs.SplitWriter, list[str]]:
    """Writes the splits, shard by shard, behind those that an earlier run has written; returns their writer, and the
    columns of the training split.
    """
    splitter, watched, state = make_splitter(args), mapping(args.watched), histories.work / SPLITS_DONE
    known = read_json(state)
    done, columns = known.get("shards", 0), known.get("columns", [])
    writer = logs.SplitWriter(output, histories.work, known.get("rows"))
    splitter.counts.update(known.get("counts", {}))
    splitter.times += known.get("times", [])
    for _ in range(done):
        histories.add(None)
    left = logs.EventShards(shards.shards[done:], shards.user_ids, shards.item_ids, {}, {})
    progress = logging.tqdm(left, desc="splits", unit="shard", disable=len(shards) == 1, initial=done)
    for shard, (users, events) in enumerate(progress, start=done):
        if watched and args.sessions is None:
            events = events.where(logs.reaches(events.feedback, watched))
        splits = splitter.rows(events)
        histories.add(splitter.training_events(events, splits))
        splits = {name: logs.with_users(rows, users) for name, rows in splits.items()}
        writer.write(splits, shard, len(shards))
        columns = splits["train"].column_names
        found = {"shards": shard + 1, "rows": writer.rows, "columns": columns}
        found |= {"counts": splitter.counts, "times": splitter.times}
        write_json(state, found)  # behind all files of the shard
    splitter.finish()
    if empty := [name for name, count in writer.rows.items() if not count]:
        nobody = "no user has enough events, 2 for a test row and 3 for a validation row."
        raise ValueError(f"no rows in {empty}: {nobody}" if writer.rows["train"] else "there are no events to split.")
    return writer, columns
