"""Preference pairs on disk: a `datasets` set and its settings, complete or absent."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ..data import arrow_dataset, read_table
from ..models import Catalogue

logger = logging.get_logger(__name__)

_METADATA = "pairs.json"


def save_rows(rows: list[dict], folder: Path, metadata: dict) -> None:
    """Writes rows as a `datasets` set and its metadata, complete or not at all: the folder appears under its name at
    the end.
    """
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
            f"the run continues inside an iteration, but its pairs are not at {folder}: keep them beside the "
            "checkpoints, or resume from a checkpoint at the end of an iteration."
        )
    found = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    if different := sorted(name for name in metadata if found.get(name) != metadata[name]):
        raise ValueError(
            f"the pairs in {folder} were made with other settings: "
            + ", ".join(f"{name}={found.get(name)!r}, now {metadata[name]!r}" for name in different)
            + ". Resume with the settings of the interrupted run."
        )
    return datasets.load_from_disk(str(folder))


class PairFiles:
    """What a run of [`IPATrainer`] keeps in `output_dir/pairs`: the pairs of each iteration, and the samples of the
    seed model.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.folder = trainer, Path(trainer.args.output_dir) / "pairs"

    def read_pairs(self, iteration: int) -> datasets.Dataset:
        """Those that this run, or the one that it resumes, mined; given pairs are those of iteration 0 for ever."""
        return self._read(*self._pairs(iteration))

    def write_pairs(self, iteration: int, rows: list[dict], logs: dict[str, float]) -> None:
        name, settings = self._pairs(iteration)
        self._write(name, rows, settings | {"logs": logs})
        self.trainer.accelerator.wait_for_everyone()

    def read_seed_samples(self) -> list[dict]:
        return list(self._read("seed_samples", self._settings("kl_users", "seed")))

    def write_seed_samples(self, rows: list[dict]) -> None:
        self._write("seed_samples", rows, self._settings("kl_users", "seed"))

    def _pairs(self, iteration: int) -> tuple[str, dict]:
        mined = self.trainer.reward is not None
        number = iteration if mined else 0
        names = ("dpo_ratio", "num_candidates", "num_rejected", "seed") if mined else ("num_rejected",)
        fingerprint = {"catalogue_fingerprint": self.trainer.policy.catalogue.fingerprint()}
        return f"iteration_{number:03d}", {"iteration": number} | fingerprint | self._settings(*names)

    def _settings(self, *names: str) -> dict:
        return {"num_rows": len(self.trainer.rows)} | {name: getattr(self.trainer.args, name) for name in names}

    def _write(self, name: str, rows: list[dict], settings: dict) -> None:
        if self.trainer.is_world_process_zero():
            save_rows(rows, self.folder / name, settings)

    def _read(self, name: str, settings: dict) -> datasets.Dataset:
        source = self.folder
        if self.trainer.resumed_from is not None:
            source = self.trainer.resumed_from.parent / "pairs"
        rows = load_rows(source / name, settings)
        self.trainer.accelerator.wait_for_everyone()
        if source.resolve() != self.folder.resolve():
            self._write(name, list(rows), settings)  # to be there when this run is resumed
        return rows


def load_pairs(folder: str | os.PathLike, num_rows: int, catalogue: Catalogue) -> datasets.Dataset:
    """
    Pairs that somebody brings, for [`IPATrainer`]: a folder that another run of it left (`pairs/iteration_000`), or a
    table of one's own, which says nothing of where it comes from; then a warning says what is assumed.

    Args:
        folder: Of any kind that `data.read_table` reads: a folder of `datasets`, parquet, JSONL, CSV (token ids as
            `[4, 20, 36]`).
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
            + ". Their token ids and row numbers would mean other items and users. Take the policy and the data "
            "folder they were mined with, or mine new ones with a reward."
        )
    if absent := sorted(own.keys() - known.keys()):
        logger.warning(
            f"{folder} does not say of which items and rows its pairs are ({_METADATA} has no {', '.join(absent)}). "
            f"Assumed is: `row` counts the {num_rows} training rows of this run from 0, and token ids are those of "
            f"{catalogue}."
        )
    pairs = arrow_dataset(read_table(folder))
    if lacking := [name for name in ("row", "chosen", "rejected") if name not in pairs.column_names]:
        raise ValueError(f"the pairs in {folder} have no columns {lacking}; they have {pairs.column_names}.")
    for name in ("chosen", "rejected"):
        if isinstance(pairs[0][name], str):  # a CSV file has no lists
            pairs = pairs.add_column(f"{name}_ids", [json.loads(text) for text in pairs[name]])
            pairs = pairs.remove_columns(name).rename_column(f"{name}_ids", name)
    return pairs


__all__ = ["PairFiles", "load_pairs", "load_rows", "save_rows"]
