"""Preference pairs on disk: a `datasets` set and its settings, complete or absent."""

import json
import os
import shutil
from pathlib import Path

import datasets
from transformers.utils import logging

from ..data import arrow_dataset, read_table
from ..models import Catalogue

logger = logging.get_logger(__name__)

_METADATA = "pairs.json"


def save_rows(rows: list[dict], folder: Path, metadata: dict) -> None:
    """Writes rows as a `datasets` set and its metadata, complete or not at all: the folder appears under its name at the end."""
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    datasets.Dataset.from_list(rows).save_to_disk(str(unfinished))
    (unfinished / _METADATA).write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def load_rows(folder: Path, metadata: dict) -> datasets.Dataset:
    """
    Reads what [`save_rows`] wrote.

    Raises:
        ValueError: When it is not there, or was made with other settings.
    """
    if not folder.is_dir():
        raise ValueError(
            f"the run continues inside an iteration, but its pairs are not at {folder}: keep them beside the checkpoints, or "
            "resume from a checkpoint at the end of an iteration."
        )
    found = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    if different := sorted(name for name in metadata if found.get(name) != metadata[name]):
        raise ValueError(
            f"the pairs in {folder} were made with other settings: "
            + ", ".join(f"{name}={found.get(name)!r}, now {metadata[name]!r}" for name in different)
            + ". Resume with the settings of the interrupted run."
        )
    return datasets.load_from_disk(str(folder))


def load_pairs(folder: str | os.PathLike, num_rows: int, catalogue: Catalogue) -> datasets.Dataset:
    """
    Pairs that somebody brings, for [`IPATrainer`]: a folder that another run of it left (`pairs/iteration_000`), or a table of
    one's own, which says nothing of where it comes from; then a warning says what is assumed.

    Args:
        folder: Of any kind that `data.read_table` reads: a folder of `datasets`, parquet, JSONL, CSV (token ids as `[4, 20, 36]`).
        num_rows (`int`): Rows of the training set, which the column `row` of the pairs counts.
        catalogue (`Catalogue`): The policy's.

    Raises:
        ValueError: When the pairs were mined with other items, or for another training set, or lack a column.
    """
    path, known = Path(folder) / _METADATA, {}
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
    own = {"catalogue_fingerprint": catalogue.fingerprint(), "num_rows": num_rows}
    if different := sorted(name for name in own if known.get(name, own[name]) != own[name]):
        raise ValueError(
            f"the pairs in {folder} do not fit this run: "
            + ", ".join(f"{name}={known[name]!r}, here {own[name]!r}" for name in different)
            + ". Their token ids and row numbers would mean other items and other users. Take the policy and the data folder they "
            "were mined with, or mine new ones with a reward."
        )
    if absent := sorted(own.keys() - known.keys()):
        logger.warning(
            f"{folder} does not say of which items and rows its pairs are ({_METADATA} has no {', '.join(absent)}). Assumed is: "
            f"`row` counts the {num_rows} training rows of this run from 0, and token ids are those of {catalogue}."
        )
    pairs = arrow_dataset(read_table(folder))
    if lacking := [name for name in ("row", "chosen", "rejected") if name not in pairs.column_names]:
        raise ValueError(f"the pairs in {folder} have no columns {lacking}; they have {pairs.column_names}.")
    for name in ("chosen", "rejected"):
        if isinstance(pairs[0][name], str):  # a CSV file has no lists
            pairs = pairs.add_column(f"{name}_ids", [json.loads(text) for text in pairs[name]])
            pairs = pairs.remove_columns(name).rename_column(f"{name}_ids", name)
    return pairs


__all__ = ["load_pairs", "load_rows", "save_rows"]
